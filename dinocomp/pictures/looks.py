"""What a network says of some images, and the pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinocomp.data import evaluation_view
from dinocomp.interop import Backbone
from dinocomp.pictures.attention import attention_picture, watch_attention
from dinocomp.pictures.embedding import embedding_picture
from dinocomp.pictures.neighbours import neighbours_picture
from dinocomp.pictures.pca import pca_picture
from dinocomp.pictures.prototypes import Usage, prototype_usage, prototypes_picture

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


@torch.no_grad()
def look_at(
    backbone: Backbone,
    pixels: Sequence[Tensor],
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    view: tuple[int, int],
    size: int,
    closely: int,
    with_attention: bool,
    head: nn.Module | None = None,
    temperature: float = 0.07,
    note: str = "",
    batch_size: int = 32,
) -> Looks:
    """What a frozen network says of images.

    Args:
        backbone: on the device to use.
        pixels: uint8 [3, H, W] each.
        view: `resize` and `crop` of `evaluation_view`, in pixels.
        size: side in pixels at which images are looked at patch by patch, of the same part of them; whole patches.
        closely: how many are, the first ones.
        with_attention: whether attention is looked at; of a `VisionTransformer` alone.
        head, temperature, note: for the prototypes.

    Raises:
        WeightsError: of another network attention is asked for.
    """
    device = next(backbone.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (backbone.mean, backbone.std))

    def tokens_of(views: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [b, 3, S, S] -> patches [b, N, D], class tokens [b, D]."""
        return backbone.get_intermediate_layers((views.to(device) / 255 - mean) / std, 1)[0]

    small, vectors, usage = [], [], None
    for start in range(0, len(pixels), batch_size):
        views = torch.stack([evaluation_view(image, *view) for image in pixels[start : start + batch_size]])
        cls = tokens_of(views)[1]
        if head is not None:
            used = prototype_usage(head(cls), temperature)
            usage = used if usage is None else usage + used
        small.append(thumbnails(views))
        vectors.append(cls.float().cpu())
    resize = round(size * view[0] / view[1])
    close = torch.stack([evaluation_view(image, resize, size) for image in pixels[:closely]])  # [m, 3, S, S]
    patches, attention, prefix = [], [], 1
    with watch_attention(backbone) if with_attention else nullcontext() as watched:
        for views in close.split(4):  # fine grids have long sequences
            patches.append(tokens_of(views)[0].float().cpu())
            if watched is not None:
                attention.append(watched.read(len(views)).cpu())
                prefix = watched.prefix
    return Looks(
        torch.cat(small),
        torch.cat(vectors),
        torch.tensor(labels),
        classes,
        close,
        torch.cat(patches),
        (size // backbone.patch_size,) * 2,
        torch.cat(attention) if attention else None,
        prefix,
        usage,
        note,
    )


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
    if len(looks.vectors) > 2:
        found["embedding"] = lambda: embedding_picture(*few, width=width)
    if looks.usage is not None:
        found["prototypes"] = lambda: prototypes_picture(looks.usage, note=looks.note, width=width)
    return found
