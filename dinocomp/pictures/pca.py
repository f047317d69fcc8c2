"""Principal components of patch tokens as colours (Oquab et al. 2024, figure 1 and section 7.6)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinocomp.pictures.canvas import WIDTH, Tile, enlarged, page, to_picture, wall

_FLAT = 1e-8  # a component with less than this share of the features' length is rounding noise
_PERCENTILES = (0.02, 0.98)  # of the foreground: black and full colour, so that no single patch sets the scale
_BACKGROUND = torch.tensor([0.07, 0.08, 0.1])
_GREY = 0.5  # of a component that does not vary


class PatchColours(NamedTuple):
    """Of B images of N patches."""

    rgb: Tensor  # [B, N, 3] in [0, 1]
    foreground: Tensor  # [B, N] bool


def principal_components(features: Tensor, number: int, like: Tensor) -> Tensor:
    """Coordinates [n, number] of features [n, D] along their principal components, the largest first, in fp64.

    A component is given up to its sign. Here it is the one that grows with `like` [n] (their correlation is positive),
    which means the same for other features of the same images: pictures of one run can be compared. A component that
    does not vary, or that there is none of, is 0.
    """
    x = features.double()
    length = x.square().sum(dim=1).mean()
    x = x - x.mean(dim=0)
    values, axes = torch.linalg.eigh(x.T @ x / len(x))  # [D] rising, [D, D]
    keep = min(number, x.shape[1])
    values, axes = values.flip(0)[:keep], axes.flip(1)[:, :keep]
    found = x @ axes  # [n, keep]
    anchor = (like.double() - like.double().mean()) @ found  # [keep]
    # Where nothing correlates, as with a grey image, the largest weight decides.
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))[0]  # [keep]
    weak = anchor.abs() <= 1e-9 * like.double().norm() * found.norm(dim=0)
    found = found * torch.where(torch.where(weak, largest, anchor) < 0, -1.0, 1.0)
    found = torch.where(values > _FLAT * length, found, torch.zeros_like(found))
    return F.pad(found, (0, number - keep))


def patch_colours(patches: Tensor, grid: tuple[int, int], brightness: Tensor) -> PatchColours:
    """Colours of the patches of a set of images, by what they are to the network.

    As in the paper: the first component over all patches, cut at their mean, parts foreground from background; three
    components over the foreground alone become red, green and blue. Which side is the foreground: the one that covers
    fewer of the patches at the images' borders, where things photographed seldom are.

    Args:
        patches: [B, N, D].
        grid: rows and columns of patches; N of them.
        brightness: [B, N] of the patches' pixels; it settles the components' signs, see `principal_components`.

    Returns:
        Background is nearly black. Where features do not vary all is foreground, and grey.
    """
    flat, like = patches.flatten(0, 1), brightness.flatten()  # [B * N, D], [B * N]
    first = principal_components(flat, 1, like)[:, 0]  # [B * N]
    rows, columns = torch.arange(grid[0])[:, None], torch.arange(grid[1])[None]
    border = (rows == 0) | (rows == grid[0] - 1) | (columns == 0) | (columns == grid[1] - 1)
    border = border.flatten().repeat(len(patches))  # [B * N]
    above = first > 0
    foreground = above if (above & border).sum() <= (~above & border).sum() else ~above
    if not first.any() or foreground.sum() < 2:
        foreground = torch.ones_like(above)
    inside = principal_components(flat[foreground], 3, like[foreground])  # [n, 3]
    low, high = torch.quantile(inside, torch.tensor(_PERCENTILES, dtype=inside.dtype), dim=0)  # [3] each
    spread = high - low
    scaled = torch.where(spread > 0, (inside - low) / spread.clamp_min(1e-300), torch.full_like(inside, _GREY))
    rgb = _BACKGROUND.repeat(len(flat), 1)  # [B * N, 3]
    rgb[foreground] = scaled.clamp(0, 1).float()
    return PatchColours(rgb.view(*patches.shape[:2], 3), foreground.view(patches.shape[:2]))


def patch_brightness(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean pixel of each patch: uint8 [B, 3, H, W] -> [B, N]."""
    return F.adaptive_avg_pool2d(images.float().mean(dim=1, keepdim=True), grid).flatten(1)


def pca_picture(images: Tensor, patches: Tensor, grid: tuple[int, int], *, width: int = WIDTH) -> Image.Image:
    """Images, each beside the colours of its patches.

    Args:
        images: uint8 [B, 3, H, W], as the network saw them.
        patches: [B, N, D], their tokens.
        grid: rows and columns of patches; N of them.
    """
    colours = patch_colours(patches, grid, patch_brightness(images, grid))
    maps = (colours.rgb * 255).round().to(torch.uint8).view(-1, *grid, 3).permute(0, 3, 1, 2)  # [B, 3, rows, columns]
    pairs = min(3, 1 + (len(images) > 3) + (len(images) > 8))
    across = [
        Tile(picture)
        for image, of_patches in zip(images, maps, strict=True)
        for picture in (to_picture(image), enlarged(to_picture(of_patches)))
    ]
    rows = [across[i : i + 2 * pairs] for i in range(0, len(across), 2 * pairs)]
    gaps = ([4, 16] * pairs)[:-1]
    share = colours.foreground.float().mean()
    return page(
        "What patches are to the network",
        "Right of each: its patch tokens by their three largest principal components, as red, green and blue. Like "
        "colours are like features, across images. Dark: background by the first component "
        f"({1 - share:.0%} of the patches).",
        wall(rows, gaps, width=width),
    )
