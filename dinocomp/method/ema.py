"""The teacher as a moving average of the student."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place, pair by pair.

    Of sharded weights each rank updates its share: both networks are cut alike, so nothing is sent.
    """
    teacher, student = [local(t) for t in teacher], [local(s) for s in student]
    if hasattr(torch, "_foreach_lerp_"):
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        return
    for t, s in zip(teacher, student, strict=True):
        t.lerp_(s, 1 - momentum)


def local(x: Tensor) -> Tensor:
    """This rank's share of a tensor that is spread over ranks; any other as it is."""
    return x.to_local() if hasattr(x, "to_local") else x
