"""Tokens of a frozen backbone, batch by batch: each rank computes its share, every rank gets all of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import Dataset

from dinocomp.data import BadImage, PlainLoader, evaluation_view
from dinocomp.data.crops import CropParameters, cut, draw_box
from dinocomp.data.listing import NO_LABEL
from dinocomp.evaluate.choose import Chosen
from dinocomp.evaluate.share import gather_rows
from dinocomp.interop import Backbone

_CROPS = 304  # stream of random numbers
_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop


class CentreViews(Dataset):
    """Image i as evaluations see it: (uint8 [3, crop, crop], label); black, with label -1, if it cannot be decoded."""

    def __init__(self, images: Chosen, resize: int, crop: int) -> None:
        self.images, self.resize, self.crop = images, resize, crop

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        try:
            sample, pixels = self.images.decode(i)  # pixels: uint8 [3, H, W]
        except BadImage:
            return torch.zeros(3, self.crop, self.crop, dtype=torch.uint8), NO_LABEL
        return evaluation_view(pixels, self.resize, self.crop), sample.label


class RandomViews(Dataset):
    """A random crop of image i, mirrored or not, in pass p over the images; a function of (seed, p, i).

    Args:
        crop: side of the view in pixels.
        scale: smallest share of the image's area; the largest is all of it.
        flip: probability of mirroring.
    """

    def __init__(self, images: Chosen, crop: int, scale: float, flip: float, seed: int) -> None:
        self.images, self.crop, self.scale, self.flip, self.seed = images, crop, scale, flip, seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        passes, i = place
        view = torch.zeros(3, self.crop, self.crop, dtype=torch.uint8)
        try:
            sample, pixels = self.images.decode(i)  # pixels: uint8 [3, H, W]
        except BadImage:
            return view, NO_LABEL
        rng = np.random.Generator(np.random.Philox((self.seed, _CROPS, passes, i)))
        box = draw_box(*pixels.shape[-2:], (self.scale, 1.0), _RATIO, rng)
        cut(pixels, CropParameters(box, bool(rng.random() < self.flip), (), False, None, False), view)
        return view, sample.label


@torch.no_grad()
def token_batches(
    backbone: Backbone,
    views: Dataset,
    batches: Sequence[Sequence],
    *,
    blocks: int,
    normalize: torch.nn.Module,
    batch_size: int,
    num_workers: int = 0,
    autocast: torch.dtype | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Class tokens of the last blocks and the mean patch token of the last one, of each batch, on every rank.

    All ranks must call it together, with the same `batches`. The global random generator is neither read nor moved.

    Args:
        views: place -> (uint8 [3, S, S], label).
        batches: places of each batch, all ranks' together; no place is computed or counted twice.
        blocks: L.
        batch_size: images of one rank that go through the backbone together.
        advance: told of the images of each batch.

    Yields:
        tokens fp32 [b, L + 1, D] (class tokens, first to last block, then the mean) and labels int64 [b], on the
        backbone's device. -1 is the label of an image that could not be decoded.
    """
    device = next(backbone.parameters()).device
    rank, world = dist.get_global_rank(), dist.get_world_size()
    loader = PlainLoader(
        views,
        batch_sampler=_Shares(batches, rank, world),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader draws a seed from the global one
    )
    for batch, (pixels, labels) in zip(batches, loader, strict=True):
        found = []
        for some in pixels.split(batch_size):
            with autocasting(device, autocast):
                layers = backbone.get_intermediate_layers(normalize(some.to(device, non_blocking=True)), blocks)
            mean = layers[-1][0].float().mean(dim=1)  # [c, D]
            found.append(torch.stack([*(cls.float() for _, cls in layers), mean], dim=1))  # [c, L + 1, D]
        number = len(batch[rank::world])
        tokens = gather_rows(torch.cat(found)[:number], len(batch))
        labels = gather_rows(labels[:number].to(device), len(batch))
        yield tokens, labels
        advance(len(batch))


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Computes in that type of numbers; None: in that of the weights."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class _Shares:
    """This rank's part of each batch; where it has none, with fewer images than ranks, the first one, to be dropped."""

    def __init__(self, batches: Sequence[Sequence], rank: int, world_size: int) -> None:
        self.batches, self.rank, self.world_size = batches, rank, world_size

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list]:
        for batch in self.batches:
            yield list(batch[self.rank :: self.world_size]) or [batch[0]]
