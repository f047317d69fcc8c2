"""Features of images from a frozen backbone."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinocomp.data import Images, decode_rgb, evaluation_view
from dinocomp.data.workers import leave_signals_to_parent
from dinocomp.models import VisionTransformer


class Features(NamedTuple):
    """Class tokens of n images."""

    vectors: Tensor  # [n, D] fp32, on the CPU
    labels: Tensor  # [n] int64


class _Views(Dataset):
    """The evaluation view and label of the images whose number is `rank` modulo `world_size`."""

    def __init__(self, images: Images, resize: int, crop: int, rank: int, world_size: int) -> None:
        self.images, self.resize, self.crop = images, resize, crop
        self.index = range(rank, len(images), world_size)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        sample = self.images[self.index[i]]
        return evaluation_view(decode_rgb(sample.image), self.resize, self.crop), sample.label


@torch.no_grad()
def extract_features(
    backbone: VisionTransformer,
    images: Images,
    *,
    resize: int,
    crop: int,
    normalize: torch.nn.Module,
    batch_size: int,
    num_workers: int = 0,
    timeout_seconds: float = 0,
    autocast: torch.dtype | None = None,
) -> Features:
    """Class tokens of this rank's share of the images: those whose number is `rank` modulo the world size.

    The global random generator is neither read nor moved.

    Args:
        backbone: on the device to use; called in its present mode, so `eval()` it if it has drop path.
        resize, crop: see `evaluation_view`, in pixels.
        normalize: uint8 images to the network's input.
        timeout_seconds: fail when a worker takes longer than this for a batch; 0 waits for ever.
        autocast: number type to compute in; None for that of the weights.
    """
    device = backbone.cls_token.device
    views = _Views(images, resize, crop, dist.get_global_rank(), dist.get_world_size())
    workers = num_workers if len(views) > batch_size else 0
    loader = DataLoader(
        views,
        batch_size,
        num_workers=workers,
        timeout=timeout_seconds if workers else 0,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader draws a seed from the global one
    )
    vectors, labels = [torch.zeros(0, backbone.embed_dim)], [torch.zeros(0, dtype=torch.int64)]
    with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
        for pixels, label in loader:
            tokens = backbone(normalize(pixels.to(device, non_blocking=True)))
            vectors.append(tokens.cls.float().cpu())  # [b, D]
            labels.append(label)
    return Features(torch.cat(vectors), torch.cat(labels))


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
