"""Raw pixels in a backbone's place: what features have to beat."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinocomp.evaluate.online import measure_knn

SIDE = 16  # pixels, of a thumbnail


class Thumbnail(NamedTuple):
    """What stands for features."""

    cls: Tensor  # [B, 3 * h * w]


class Thumbnails(nn.Module):
    """Answers with the image itself: means over the cells of a grid of 16 x 16, smaller images as they are.

    Args:
        device: where images are expected, as the parameters of a backbone say it.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(0, device=device), requires_grad=False)

    def forward(self, images: Tensor) -> Thumbnail:
        """Normalised images [B, 3, H, W]; 768 numbers of each."""
        height, width = images.shape[-2:]
        small = F.adaptive_avg_pool2d(images, (min(height, SIDE), min(width, SIDE)))  # [B, 3, h, w]
        return Thumbnail(small.flatten(1))


def measure_pixels(backbone: nn.Module, **settings: Any) -> Mapping[int, float]:
    """`measure_knn` of raw pixels, with the same images, views and votes, on the backbone's device."""
    thumbnails = Thumbnails(next(backbone.parameters()).device)
    return measure_knn(thumbnails, **settings | {"autocast": None})
