"""How weights start."""

from torch import Tensor, nn


def normal_(weight: Tensor, std: float) -> Tensor:
    """Draws from a normal distribution, cut off at 6 standard deviations.

    The reference's `trunc_normal_(weight, std=std)` is cut off at -2 and 2 instead. Its draws are those here, but about
    one in 2^24 comes out as -2 itself, a hundred deviations of 0.02: one or a few in every ViT.
    """
    return nn.init.trunc_normal_(weight, std=std, a=-6 * std, b=6 * std)
