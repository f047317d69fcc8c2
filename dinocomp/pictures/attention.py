"""What the class token looks at in the last block."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinocomp.errors import WeightsError
from dinocomp.pictures.canvas import WIDTH, blocks, enlarged, page, resized, to_picture

_TOP = 0.995  # quantile of a map that is drawn brightest


class ClassAttention:
    """Fills with what the last block computes; see `watch_attention`."""

    def __init__(self, num_heads: int, prefix: int) -> None:
        self.num_heads, self.prefix = num_heads, prefix
        self._qkv: Tensor | None = None

    def see(self, module: nn.Module, given: tuple, qkv: Tensor) -> None:
        """The hook: keeps the projection of the last forward pass, [B * T, 3 * D]."""
        self._qkv = qkv.detach()

    def read(self, images: int) -> Tensor:
        """Attention of the class token in the last forward pass, of so many images of one size: [B, heads, T], fp32.

        T counts the class token, the registers, and the patches; rows add up to 1. `[..., prefix:]` are the patches.
        """
        qkv = self._qkv.view(images, -1, 3, self.num_heads, self._qkv.shape[-1] // (3 * self.num_heads)).float()
        query, keys = qkv[:, 0, 0], qkv[:, :, 1]  # [B, heads, d], [B, T, heads, d]
        # fp32 also within autocast, which would multiply in half precision.
        with torch.autocast(qkv.device.type, enabled=False):
            scores = torch.einsum("bhd,bthd->bht", query, keys) * query.shape[-1] ** -0.5
        return scores.softmax(dim=-1)


@contextmanager
def watch_attention(backbone: nn.Module) -> Iterator[ClassAttention]:
    """Within the context the class token's attention can be read after each forward pass of a `VisionTransformer`.

    By a hook on what projects to queries and keys: no kernel gives its softmax away, and sharding does not mind.

    Raises:
        WeightsError: it is a network of another kind.
    """
    try:
        attention, prefix = backbone.blocks[-1].attn, backbone.num_prefix_tokens
        watched = ClassAttention(attention.num_heads, prefix)
        handle = attention.qkv.register_forward_hook(watched.see)
    except AttributeError as error:
        raise WeightsError(
            f"attention is drawn of dinocomp's own networks; this one is a {type(backbone).__name__} ({error}). "
            "Leave it out: --pictures pca,neighbours,embedding"
        ) from error
    try:
        yield watched
    finally:
        handle.remove()


def heat(weights: Tensor) -> np.ndarray:
    """Colours of a map [rows, columns], dark at its least and bright at its largest value: uint8 [rows, columns, 3].

    Inferno, whose brightness rises evenly, for all kinds of sight. A map that is the same everywhere is dark.
    """
    from matplotlib import colormaps

    low, high = weights.min(), torch.quantile(weights.flatten(), _TOP)
    scaled = ((weights - low) / (high - low)).clamp(0, 1) if high - low > 1e-6 * high else torch.zeros_like(weights)
    return (colormaps["inferno"](scaled.numpy())[..., :3] * 255).round().astype(np.uint8)


def overlay(image: Image.Image, weights: Tensor) -> Image.Image:
    """A grey image, dim where nothing is looked at, lit in the map's colours where something is."""
    colours = Image.fromarray(heat(weights)).resize(image.size, Image.Resampling.BICUBIC)
    return Image.blend(image.convert("L").convert("RGB"), colours, 0.65)


def attention_picture(
    images: Tensor, attention: Tensor, grid: tuple[int, int], *, prefix: int, width: int = WIDTH
) -> Image.Image:
    """A row an image: the image, the heads' mean over it, and each head by itself.

    Args:
        images: uint8 [B, 3, H, W], as the network saw them.
        attention: [B, heads, T], of `ClassAttention.read`.
        grid: rows and columns of patches.
        prefix: tokens before the patches.
    """
    on_patches = attention[..., prefix:].cpu().unflatten(-1, grid)  # [B, heads, rows, columns]
    rows = []
    for pixels, maps in zip(images, on_patches, strict=True):
        # Large enough for the overlay to show the map's own resolution.
        image = resized(to_picture(pixels), *[max(pixels.shape[-1], width // 3)] * 2)
        rows.append(([image, overlay(image, maps.mean(dim=0))], [enlarged(Image.fromarray(heat(m))) for m in maps]))
    heads = on_patches.shape[1]
    share = float(on_patches.sum(dim=(-2, -1)).mean())
    where = f"Image, mean over {heads} heads, each head" if heads > 1 else "Image, map over it, the one head"
    return page(
        "What the class token looks at",
        f"{where}: its attention to the patches in the last block, each map from its least (dark) to its most. "
        f"{share:.0%} of the attention goes to patches.",
        blocks(rows, width=width),
    )
