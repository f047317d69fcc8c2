"""Tokens of a frozen backbone, batch by batch: each rank computes its share, every rank gets all of them."""

from collections.abc import Callable, Iterator, Sequence

import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import Dataset

from dinocomp.data import PlainLoader
from dinocomp.evaluate.features import autocasting
from dinocomp.evaluate.share import gather_rows
from dinocomp.interop import Backbone


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


class _Shares:
    """This rank's part of each batch; where it has none, with fewer images than ranks, the first one, to be dropped."""

    def __init__(self, batches: Sequence[Sequence], rank: int, world_size: int) -> None:
        self.batches, self.rank, self.world_size = batches, rank, world_size

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list]:
        for batch in self.batches:
            yield list(batch[self.rank :: self.world_size]) or [batch[0]]
