"""DINO: the class tokens of all crops predict those of the teacher's global crops."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """-sum_k targets_k log softmax(logits / temperature)_k in fp32: [..., K], [..., K] -> [...]."""
    return -(targets * F.log_softmax(logits.float() / temperature, dim=-1)).sum(dim=-1)


def dino_loss(
    targets: Tensor, global_logits: Tensor, local_logits: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """The two parts of the DINO loss (Caron et al. 2021, equation 3).

    Every student crop predicts every teacher view but itself: 2 pairs of global crops and 2 * L of local ones. The loss
    is the mean over these 2 + 2 * L pairs (18 for 8 local crops); its two parts add up to it.

    Args:
        targets: [2, B, K]; view v holds what student crop v is to predict, that is, the other view's target.
        global_logits: [2, B, K] of the student.
        local_logits: [L, B, K] of the student, or None.
        temperature: of the student.

    Returns:
        (global part, local part or None).
    """
    num_local = 0 if local_logits is None else len(local_logits)
    pairs = 2 + 2 * num_local
    global_part = 2 * cross_entropy(targets, global_logits, temperature).mean() / pairs
    if local_logits is None:
        return global_part, None
    # Cross-entropy is linear in the target, so both views are compared in one pass over the logits.
    both = targets.sum(dim=0)  # [B, K]
    return global_part, cross_entropy(both, local_logits, temperature).mean(dim=1).sum() / pairs
