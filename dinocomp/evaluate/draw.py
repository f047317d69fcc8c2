"""Some of the images, the same ones every time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from dinocomp.data import Images, Sample


def draw(total: int, count: int) -> list[int]:
    """`count` of `total` numbers, rising, drawn by a fixed seed; all of them where `count` is 0 or too many."""
    if not 0 < count < total:
        return list(range(total))
    return sorted(np.random.default_rng(0).permutation(total)[:count].tolist())


class Drawn:
    """A fixed draw of `images`, in their place: what evaluation asks of `Images`.

    Args:
        count: how many; 0 for all.
    """

    def __init__(self, images: Images, count: int) -> None:
        self.images = images
        self.index = draw(len(images), count)
        self.path, self.classes, self.labelled = images.path, images.classes, images.labelled

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        return self.images[self.index[i]]

    def decode(self, i: int) -> tuple[Sample, Tensor]:
        return self.images.decode(self.index[i])

    def fault(self, i: int) -> tuple[str, str]:
        return self.images.fault(self.index[i])
