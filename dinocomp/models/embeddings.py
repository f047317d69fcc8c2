"""Patch and position embeddings."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: [B, C, H, W] -> [B, (H / p) * (W / p), dim].

    The weights are those of a convolution, as published ones are; computed is one matrix product over all patches,
    which matrix units do at full speed and convolutions of so large a stride do not.

    Raises:
        ValueError: the image is not a whole number of patches high and wide.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"an image of {height} x {width} pixels is not a whole number of {self.patch_size}-pixel patches; "
                f"crop or resize it to multiples of {self.patch_size}"
            )
        p = self.patch_size
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # [B, H / p, W / p, C, p, p]
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


def blur_pos_embed(pos_embed: Tensor, share: float) -> Tensor:
    """Position embeddings that are alike where patches are near: blurred by a Gaussian, of the same size as before.

    Args:
        pos_embed: [1, M * M, dim], of patches only.
        share: standard deviation of the Gaussian, as a share of the grid's side M.
    """
    side = math.isqrt(pos_embed.shape[1])
    at = torch.arange(side, dtype=torch.float32, device=pos_embed.device)
    weight = (-(at[:, None] - at).square() / (2 * (share * side) ** 2)).exp()  # [M, M]
    weight = weight / weight.norm(dim=1, keepdim=True)  # so that each position keeps its size, at the edges too
    grid = pos_embed.unflatten(1, (side, side)).float()  # [1, M, M, dim]
    return torch.einsum("ia,jb,zabc->zijc", weight, weight, grid).flatten(1, 2).to(pos_embed.dtype)


def interpolate_pos_embed(pos_embed: Tensor, grid: tuple[int, int], *, offset: float, antialias: bool) -> Tensor:
    """Bicubic resampling of a square grid of position embeddings, in fp32.

    Args:
        pos_embed: [1, M * M, dim], of patches only.
        grid: patches (high, wide) that are wanted.
        offset: added to the wanted size where the scale factor is computed; 0 passes the size itself. Published
            weights without registers were trained with 0.1, which shifts the sampling points and so matters.
        antialias: filter when shrinking; published weights with registers were trained so.

    Returns:
        [1, high * wide, dim] in the dtype of `pos_embed`.
    """
    side = math.isqrt(pos_embed.shape[1])
    if grid == (side, side):
        return pos_embed
    image = pos_embed.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, dim, M, M]
    where = {"scale_factor": tuple((n + offset) / side for n in grid)} if offset else {"size": grid}
    image = F.interpolate(image, mode="bicubic", antialias=antialias, **where)  # [1, dim, high, wide]
    if image.shape[-2:] != grid:
        raise ValueError(
            f"offset {offset} resamples the {side} x {side} position grid to {tuple(image.shape[-2:])}, "
            f"not {grid}; use an offset between 0 and 1"
        )
    return image.flatten(2).transpose(1, 2).to(pos_embed.dtype)
