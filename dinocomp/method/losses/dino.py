"""DINO: the class tokens of all crops predict those of the teacher's global crops."""

from torch import Tensor

from dinocomp.method.losses.cross_entropy import Targets, cross_entropy


def dino_loss(
    targets: Targets, global_logits: Tensor, local_logits: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """The two parts of the DINO loss (Caron et al. 2021, equation 3).

    Every student crop predicts every teacher view but itself: 2 pairs of global crops and 2 * L of local ones. The loss
    is the mean over these 2 + 2 * L pairs (18 for 8 local crops); its two parts add up to it.

    Args:
        targets: [2 * B, K], view by view; view v holds what student crop v is to predict, that is, the other view's
            target.
        global_logits: [2, B, K] of the student.
        local_logits: [L, B, K] of the student, or None.
        temperature: of the student.

    Returns:
        (global part, local part or None).
    """
    num_local = 0 if local_logits is None else len(local_logits)
    pairs = 2 + 2 * num_local
    one_by_one = cross_entropy(targets.unflatten(1, -1), global_logits.flatten(0, 1)[None], temperature)  # [1, 2B]
    global_part = 2 * one_by_one.mean() / pairs
    if local_logits is None:
        return global_part, None
    with_both = cross_entropy(targets.unflatten(2, -1), local_logits, temperature)  # [L, B]
    return global_part, with_both.mean(dim=1).sum() / pairs
