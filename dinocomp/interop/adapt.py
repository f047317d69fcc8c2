"""Making a backbone's weights fit a network of the same width and depth, with other patches or another image size."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinocomp.models import VisionTransformer
from dinocomp.models.embeddings import interpolate_pos_embed

_PATCH = "patch_embed.proj.weight"


@dataclass(frozen=True)
class Adapted:
    """A file's tensors, made to fit.

    Attributes:
        tensors: by published names.
        changed: what was resampled, in words.
        fresh: names of the network's that the file leaves out and that start as every run's do.
    """

    tensors: dict[str, Tensor]
    changed: tuple[str, ...]
    fresh: tuple[str, ...]


def adapt(tensors: dict[str, Tensor], net: VisionTransformer) -> Adapted:
    """Resamples position embeddings and the patch projection where the network's sizes are others.

    Nothing else is changed: what does not fit then is for the loader to refuse.

    Args:
        tensors: a backbone's, by published names.
    """
    tensors, changed = dict(tensors), []
    length, patch_size = net.pos_embed.shape[1], net.patch_size
    if "pos_embed" in tensors:
        have, want = (math.isqrt(count - 1) for count in (tensors["pos_embed"].shape[1], length))
        if have != want and (have**2, want**2) == (tensors["pos_embed"].shape[1] - 1, length - 1):
            tensors["pos_embed"] = resample_pos_embed(tensors["pos_embed"], want)
            changed.append(f"position embeddings from {have} x {have} to {want} x {want} patches")
    if _PATCH in tensors and tensors[_PATCH].shape[-2:] != (patch_size, patch_size):
        have = tensors[_PATCH].shape[-1]
        tensors[_PATCH] = resample_patch_embed(tensors[_PATCH], patch_size)
        changed.append(f"patch projection from {have} to {patch_size} px")
    fresh = ()
    if "mask_token" not in tensors:  # writers without masks leave it out; it starts at 0
        tensors["mask_token"] = torch.zeros(1, net.embed_dim)
        fresh = ("mask_token",)
    return Adapted(tensors, tuple(changed), fresh)


def resample_pos_embed(pos_embed: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + M * M, D] for a grid of side x side patches, [1, 1 + side * side, D].

    Bicubic, filtered where the grid shrinks; the class token's stays.
    """
    patches = interpolate_pos_embed(pos_embed[:, 1:], (side, side), offset=0.0, antialias=True)
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def resample_patch_embed(weight: Tensor, patch_size: int) -> Tensor:
    """The projection of p-px patches [D, C, p, p] for patches of another size, [D, C, patch_size, patch_size].

    Of all projections it is the one that gives resized patches most nearly the tokens of the original ones (the
    pseudo-inverse of resizing; Beyer et al. 2023, FlexiViT, section 3.4). Of a patch that has been enlarged tokens are
    the same.
    """
    old = weight.shape[-1]
    basis = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    resized = F.interpolate(basis, (patch_size, patch_size), mode="bicubic", antialias=True)
    matrix = resized.flatten(1).T  # [patch_size^2, old^2]: resizing, as it acts on a patch
    inverse = torch.linalg.pinv(matrix.T)  # [patch_size^2, old^2]
    flat = weight.flatten(2).double() @ inverse.T  # [D, C, patch_size^2]
    return flat.unflatten(2, (patch_size, patch_size)).to(weight.dtype)
