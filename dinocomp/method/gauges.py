"""What collapse looks like in numbers, of the teacher: sums of rows first, to be added up over parts and ranks."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dinocomp.distributed import all_reduce
from dinocomp.method.losses import Targets

_MEASURED_ROWS = 1024  # of the targets of a micro-batch; their entropies take as much memory again


@torch.no_grad()
def target_sums(targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """What `target_gauges` needs of some rows: float64 [K + 2].

    Args:
        targets: [rows, K].
        valid: [rows], False for padding; None where there is none.
    """
    weight = targets.new_ones(len(targets)) if valid is None else valid.to(targets.dtype)  # [rows]
    entropy = torch.special.entr(targets).sum(dim=1)  # [rows]
    with torch.autocast(targets.device.type, enabled=False):  # it would multiply in half precision
        return torch.cat([weight @ targets, (weight @ entropy)[None], weight.sum()[None]]).double()


def target_gauges(sums: Tensor) -> dict[str, Tensor]:
    """How the teacher's targets use the prototypes.

    Args:
        sums: [K + 2], of `target_sums`.

    Returns:
        `entropy`: mean over rows of -sum_k p_k log p_k, in nats; 0 for one-hot targets, log K for uniform ones.
        `prototypes`: exp of the entropy of the mean target; K where all prototypes are used alike, 1 for a single one.
    """
    means = sums / sums[-1].clamp_min(1)
    return {"entropy": means[-2], "prototypes": torch.special.entr(means[:-2]).sum().exp()}


@torch.no_grad()
def feature_sums(features: Tensor) -> Tensor:
    """What `feature_std` needs of some rows [rows, D]: float64 [2 D + 1]."""
    features = torch.nn.functional.normalize(features.double(), dim=1)  # [rows, D]
    return torch.cat([features.sum(dim=0), features.square().sum(dim=0), features.new_tensor([len(features)])])


def feature_std(sums: Tensor) -> Tensor:
    """Standard deviation of L2-normalised features over all rows, times sqrt(D).

    1 where features point in all directions alike, 0 where they are all the same (Chen & He 2021, SimSiam, figure 2).

    Args:
        sums: [2 D + 1], of `feature_sums`.
    """
    mean, square = (sums[:-1] / sums[-1]).chunk(2)  # [D] each
    return (square - mean.square()).clamp_min(0).sqrt().mean() * math.sqrt(len(mean))


class TeacherGauges:
    """Collects rows of a step, of all its micro-batches, and reads the gauges of all ranks' rows at once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # of this rank, by loss, and "features"

    def clear(self) -> None:
        """Forgets what was collected."""
        self._sums = {}

    def add(self, features: Tensor, targets: Mapping[str, Targets], valid: Mapping[str, Tensor | None]) -> None:
        """Collects class tokens [rows, D] and, by loss ("dino", "ibot"), targets [rows, K] with the rows that count."""
        found = {"features": feature_sums(features)}
        for loss, rows in targets.items():
            counts = valid[loss]
            found[loss] = target_sums(
                rows[:_MEASURED_ROWS].dense(), None if counts is None else counts[:_MEASURED_ROWS]
            )
        self._sums = {name: self._sums.get(name, 0) + sums for name, sums in found.items()}

    def read(self) -> dict[str, Tensor]:
        """`feature_std`, and `entropy_H` and `prototypes_H` of each loss H; nothing where nothing was collected.

        All ranks must ask.
        """
        if not self._sums:
            return {}
        sizes = [len(sums) for sums in self._sums.values()]
        of_all = all_reduce(torch.cat([*self._sums.values()])).split(sizes)
        sums = dict(zip(self._sums, of_all, strict=True))
        self.clear()
        found = {"feature_std": feature_std(sums.pop("features"))}
        for loss, rows in sums.items():
            found |= {f"{name}_{loss}": value for name, value in target_gauges(rows).items()}
        return found
