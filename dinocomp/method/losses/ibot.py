"""iBOT: patches of the student predict the teacher's at the same place."""

from torch import Tensor

from dinocomp.method.losses.cross_entropy import Targets, cross_entropy


def ibot_loss(targets: Targets, logits: Tensor, weight: Tensor, num_crops: int, temperature: float) -> Tensor:
    """The iBOT loss (Zhou et al. 2022, equation 2) as DINOv2 weighs it.

    (1 / crops) * sum over masked patches p of CE_p / (masked patches in p's crop). The divisor counts every global
    crop, masked or not. In distillation all patches take part.

    Args:
        targets, logits: [rows, K], of the patches that take part.
        weight: [rows], 1 / (those of the row's crop); 0 for a padding row.
        num_crops: global crops in the batch, 2B.
        temperature: of the student.
    """
    terms = cross_entropy(targets.unflatten(1, -1), logits[None], temperature)[0]  # [rows]
    return (terms * weight).sum() / num_crops
