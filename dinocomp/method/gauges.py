"""What collapse looks like in numbers: of the teacher, over the batch of all ranks."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dinocomp.distributed import all_reduce


@torch.no_grad()
def target_gauges(targets: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    """How the teacher's targets use the prototypes.

    Args:
        targets: [rows, K], of this rank.
        valid: [rows], False for padding; None where there is none.

    Returns:
        `entropy`: mean over rows of -sum_k p_k log p_k, in nats; 0 for one-hot targets, log K for uniform ones.
        `prototypes`: exp of the entropy of the mean target; K where all prototypes are used alike, 1 for a single one.
    """
    weight = targets.new_ones(len(targets)) if valid is None else valid.to(targets.dtype)  # [rows]
    entropy = torch.special.entr(targets).sum(dim=1)  # [rows]
    sums = torch.cat([weight @ targets, (weight @ entropy)[None], weight.sum()[None]])  # [K + 2]
    sums = all_reduce(sums) / sums[-1].clamp_min(1)
    return {"entropy": sums[-2], "prototypes": torch.special.entr(sums[:-2]).sum().exp()}


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Standard deviation of L2-normalised features [rows, D], over the rows of all ranks, times sqrt(D).

    1 where features point in all directions alike, 0 where they are all the same (Chen & He 2021, SimSiam, figure 2).
    """
    features = torch.nn.functional.normalize(features.float(), dim=1)  # [rows, D]
    count = all_reduce(features.new_tensor(float(len(features))))
    mean = all_reduce(features.sum(dim=0)) / count  # [D]
    variance = all_reduce((features - mean).square().sum(dim=0)) / count  # [D]
    return variance.sqrt().mean() * math.sqrt(features.shape[1])


def signs_of_collapse(gauges: Mapping[str, float], prototypes: Mapping[str, int]) -> list[str]:
    """What the gauges say is wrong, in words; nothing where all is well.

    Args:
        gauges: `feature_std`, and `entropy_H` and `prototypes_H` of each loss H ("dino", "ibot") that is on.
        prototypes: K of each loss's head.
    """
    signs = []
    if gauges["feature_std"] < 0.05:
        signs.append(f"the teacher's features are nearly the same for all images (spread {gauges['feature_std']:.2g})")
    for loss, count in prototypes.items():
        used, entropy = gauges.get(f"prototypes_{loss}", math.nan), gauges.get(f"entropy_{loss}", math.nan)
        if used < 1.5:
            signs.append(f"the {loss} targets use {used:.1f} of {count} prototypes")
        if entropy > 0.999 * math.log(count):
            signs.append(f"the {loss} targets are the same for all {count} prototypes, and teach nothing")
    return signs
