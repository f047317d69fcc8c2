"""What a network says of some images, and the pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinocomp.pictures.attention import attention_picture
from dinocomp.pictures.embedding import embedding_picture
from dinocomp.pictures.neighbours import neighbours_picture
from dinocomp.pictures.pca import pca_picture
from dinocomp.pictures.prototypes import Usage, prototypes_picture

THUMBNAIL = 128  # pixels
_ATTENTION = 6  # images, a row each


@dataclass
class Looks:
    """What a network says of n images, and of m of them patch by patch.

    Attributes:
        thumbnails: uint8 [n, 3, t, t].
        vectors: class tokens [n, D].
        labels: int64 [n], -1 where unknown.
        classes: names, by label.
        views: uint8 [m, 3, S, S], what the network saw of those that are looked at patch by patch.
        patches: [m, N, D], their patch tokens.
        grid: rows and columns of patches.
        attention: [m, heads, T] of the class token; None where the network does not show it.
        prefix: tokens before the patches, in the attention.
        usage: of the prototypes; None where there is no head.
        note: on that usage.
    """

    thumbnails: Tensor
    vectors: Tensor
    labels: Tensor
    classes: Sequence[str]
    views: Tensor
    patches: Tensor
    grid: tuple[int, int]
    attention: Tensor | None = None
    prefix: int = 1
    usage: Usage | None = None
    note: str = ""

    @property
    def finite(self) -> bool:
        """Whether the network's weights were numbers still."""
        return bool(self.vectors.isfinite().all() and self.patches.isfinite().all())


def thumbnails(views: Tensor) -> Tensor:
    """uint8 [n, 3, S, S] -> uint8 [n, 3, t, t], at most `THUMBNAIL` pixels a side."""
    if views.shape[-1] <= THUMBNAIL:
        return views
    small = F.interpolate(views.float(), size=(THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def makers(looks: Looks, *, width: int) -> dict[str, Callable[[], Image.Image]]:
    """What draws each picture that can be drawn of these looks, by name."""
    few = (looks.thumbnails, looks.vectors, looks.labels, looks.classes)
    found = {"pca": lambda: pca_picture(looks.views, looks.patches, looks.grid, width=width)}
    if looks.attention is not None:
        found["attention"] = lambda: attention_picture(
            looks.views[:_ATTENTION], looks.attention[:_ATTENTION], looks.grid, prefix=looks.prefix, width=width
        )
    if len(looks.vectors) > 1:
        found["neighbours"] = lambda: neighbours_picture(*few, width=width)
        found["embedding"] = lambda: embedding_picture(*few, width=width)
    if looks.usage is not None:
        found["prototypes"] = lambda: prototypes_picture(looks.usage, note=looks.note, width=width)
    return found
