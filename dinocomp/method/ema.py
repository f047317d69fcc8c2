"""The teacher as a moving average of the student."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place, pair by pair."""
    teacher, student = list(teacher), list(student)
    if hasattr(torch, "_foreach_lerp_"):
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        return
    for t, s in zip(teacher, student, strict=True):
        t.lerp_(s, 1 - momentum)
