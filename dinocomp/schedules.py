"""Values over iterations. Each is a pure function of the iteration, so a resumed run needs no state for them."""

import math
from dataclasses import dataclass


def cosine(
    iteration: int, start: float, end: float, total: int, *, warmup: int = 0, warmup_start: float = 0.0
) -> float:
    """A line from `warmup_start` to `start`, then half a cosine to `end`.

    The line reaches `start` at its last iteration and the cosine begins with it, so `start` comes twice, as in the
    reference. From `total` on it is `end`.
    """
    if iteration >= total:
        return end
    if iteration < warmup:
        return warmup_start + (start - warmup_start) * iteration / max(warmup - 1, 1)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (iteration - warmup) / (total - warmup)))


@dataclass(frozen=True)
class Values:
    """What one iteration uses."""

    lr: float
    last_layer_lr: float
    backbone_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float


@dataclass(frozen=True)
class Schedules:
    """The schedules of a run. Lengths are in iterations; an iteration counts from 0.

    Args:
        total: iterations of the run.
        lr, min_lr, warmup: peak and final learning rate, and the iterations of its linear warm-up from 0.
        freeze_last_layer: iterations in which the heads' last layers have learning rate 0.
        freeze_backbone: iterations in which the backbone is left as it is. Its learning rate then rises to that of the
            heads in as many iterations as their warm-up.
        weight_decay, weight_decay_end: cosine from one to the other.
        momentum, momentum_end: of the teacher's moving average, cosine from one to the other.
        teacher_temp, warmup_teacher_temp, teacher_temp_warmup: linear from the second to the first, then constant.
    """

    total: int
    lr: float
    min_lr: float
    warmup: int
    freeze_last_layer: int
    weight_decay: float
    weight_decay_end: float
    momentum: float
    momentum_end: float
    teacher_temp: float
    warmup_teacher_temp: float
    teacher_temp_warmup: int
    freeze_backbone: int = 0

    def at(self, iteration: int) -> Values:
        """The values that `iteration` uses."""
        lr = cosine(iteration, self.lr, self.min_lr, self.total, warmup=self.warmup)
        warmup_temp = self.teacher_temp_warmup
        thawed = iteration - self.freeze_backbone
        rise = min(1.0, thawed / max(self.warmup, 1)) if self.freeze_backbone else 1.0
        return Values(
            lr=lr,
            last_layer_lr=0.0 if iteration < self.freeze_last_layer else lr,
            backbone_lr=lr * max(0.0, rise),
            weight_decay=cosine(iteration, self.weight_decay, self.weight_decay_end, self.total),
            momentum=cosine(iteration, self.momentum, self.momentum_end, self.total),
            teacher_temp=cosine(
                iteration,
                self.teacher_temp,
                self.teacher_temp,
                warmup_temp,
                warmup=warmup_temp,
                warmup_start=self.warmup_teacher_temp,
            ),
        )
