"""Features of images from a frozen backbone."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, repeat
from typing import NamedTuple

import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dinocomp.data import Images, PlainLoader
from dinocomp.data.listing import NO_LABEL
from dinocomp.errors import DataError
from dinocomp.evaluate.views import CentreViews

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names of `performance.precision`
_NAMED = 3  # of the images left out

log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Class tokens of n images; zeros with the label -1 for one that could not be decoded and is left out."""

    vectors: Tensor  # [n, D] fp32, on the CPU
    labels: Tensor  # [n] int64


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Computes in that type of numbers; None: in that of the weights."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def equal_passes(
    mine: Dataset,
    total: int,
    nothing: tuple[Tensor, ...],
    device: torch.device,
    batch_size: int,
    num_workers: int,
    timeout_seconds: float,
) -> Iterator[Sequence[Tensor]]:
    """Batches of this rank's share of `total` items, then `nothing` until the rank with the most has seen its own.

    Sharded weights are gathered for each forward pass, so each rank has to make as many as the others.
    """
    workers = num_workers if len(mine) > batch_size else 0
    loader = PlainLoader(
        mine,
        batch_size,
        num_workers=workers,
        timeout=timeout_seconds if workers else 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader draws a seed from the global one
    )
    most = math.ceil(total / dist.get_world_size())  # items of a rank
    return chain(loader, repeat(nothing, math.ceil(most / batch_size) - len(loader)))


@torch.no_grad()
def class_tokens(
    backbone: torch.nn.Module, normalize: torch.nn.Module, pixels: Tensor, autocast: torch.dtype | None
) -> Tensor:
    """Class tokens [b, D] (fp32, CPU) of uint8 images [b, 3, H, W]."""
    device = next(backbone.parameters()).device
    with autocasting(device, autocast):
        return backbone(normalize(pixels.to(device, non_blocking=True))).cls.float().cpu()


def extract_features(
    backbone: torch.nn.Module,
    images: Images,
    *,
    resize: int,
    crop: int,
    normalize: torch.nn.Module,
    batch_size: int,
    num_workers: int = 0,
    timeout_seconds: float = 0,
    autocast: torch.dtype | None = None,
    skip_bad: bool = False,
    advance: Callable[[int], object] = lambda count: None,
) -> Features:
    """Class tokens of this rank's share of the images: those whose number is `rank` modulo the world size.

    The global random generator is neither read nor moved. All ranks must call it together: sharded weights are gathered
    for each forward pass, so each rank makes as many as the others.

    Args:
        backbone: gives `Tokens`; on the device to use; called in its present mode, so `eval()` it if it has drop path.
        resize, crop: see `evaluation_view`, in pixels.
        normalize: uint8 images to the network's input.
        timeout_seconds: fail when a worker takes longer than this for a batch; 0 waits for ever.
        autocast: number type to compute in; None for that of the weights.
        skip_bad: whether an image that cannot be decoded is left out (and logged); else it is an error.
        advance: told of the images of this rank that each forward pass was of.

    Raises:
        DataError: no image of any rank could be decoded, or one could not and is not to be left out.
    """
    share = range(dist.get_global_rank(), len(images), dist.get_world_size())
    views = Subset(CentreViews(images, resize, crop, skip_bad), share)
    nothing = torch.zeros(1, 3, crop, crop, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    device = next(backbone.parameters()).device
    loader = equal_passes(views, len(images), nothing, device, batch_size, num_workers, timeout_seconds)
    vectors, labels = [], []
    for pixels, label in loader:  # uint8 [b, 3, crop, crop], [b]
        vectors.append(class_tokens(backbone, normalize, pixels, autocast)[: len(label)])  # [b, D]
        labels.append(label)
        advance(len(label))
    features = Features(torch.cat(vectors), torch.cat(labels))
    features.vectors[features.labels == NO_LABEL] = 0.0
    mine = [share[i] for i in (features.labels == NO_LABEL).nonzero().flatten().tolist()]
    left_out = sorted(number for part in dist.all_gather_object(mine) for number in part)
    if len(left_out) == len(images):
        raise DataError(f"none of the {len(images)} images of {images.path} can be decoded; convert them again")
    if left_out and dist.get_global_rank() == 0:
        log.warning(
            "%d of %d images of %s are left out of the evaluation: %s",
            len(left_out),
            len(images),
            images.path,
            "; ".join(images.fault(number)[1] for number in left_out[:_NAMED]),
        )
    return features


def gather_features(mine: Features, total: int, chunk: int = 16384) -> Features:
    """All ranks' shares of `total` images, in the images' order, on every rank; `chunk` rows of a rank at a time."""
    world_size = dist.get_world_size()
    vectors = torch.zeros(total, mine.vectors.shape[1])  # [n, D]
    labels = torch.zeros(total, dtype=torch.int64)  # [n]
    for start in range(0, -(-total // world_size), chunk):  # the same number of turns on every rank
        part = Features(*(field[start : start + chunk] for field in mine))
        for rank, (vector, label) in enumerate(dist.all_gather_object(tuple(part))):
            where = rank + world_size * torch.arange(start, start + len(label))
            vectors[where], labels[where] = vector, label
    return Features(vectors, labels)
