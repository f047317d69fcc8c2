"""What augmentation does to the colours of one crop, made cheap on one core.

All take and give fp32 [3, H, W] that hold whole numbers from 0 to 255, so that a crop is converted once and not at
every operation, and may change what they are given. Each gives torchvision's result on uint8 up to rounding: no value
differs by more than 1, and hardly any does. Nothing here selects by a condition, which costs several times as much as
arithmetic.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # weights of red, green, blue in a grey value
TO_STEPS = 255.999 / 255  # as torchvision goes from 0..1 to 0..255: 256 equal steps, less a little so that 1 stays 255
HUE_STARTS = (3 / 6, 1 / 6, -1 / 6)  # for red, green, blue: see `hue`
_NEGLIGIBLE = 5.3  # sigmas from where a Gaussian is below a millionth of its peak


def to_pixels(crop: Tensor) -> Tensor:
    """uint8 [3, H, W] to fp32."""
    return crop.float()


def to_crop(pixels: Tensor) -> Tensor:
    """fp32 [3, H, W] back to uint8. By way of 16 bits: straight from fp32 is five times as slow."""
    return pixels.to(torch.int16).to(torch.uint8)


def grey_plane(pixels: Tensor) -> Tensor:
    """The grey value of each pixel, rounded down: [..., 3, H, W] -> [..., H, W]."""
    red, green, blue = pixels.unbind(-3)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).floor_()


def brightness(pixels: Tensor, factor: float) -> Tensor:
    """All values times `factor`."""
    return _steps(pixels.mul_(factor))


def contrast(pixels: Tensor, factor: float) -> Tensor:
    """All values' distances from the mean grey value times `factor`."""
    mean = grey_plane(pixels).mean()
    return _steps(pixels.mul_(factor).add_(mean * (1 - factor)))


def saturation(pixels: Tensor, factor: float) -> Tensor:
    """All values' distances from their pixel's grey value times `factor`."""
    plane = grey_plane(pixels)
    return _steps(pixels.mul_(factor).add_(plane.mul_(1 - factor)))


def hue(pixels: Tensor, turn: float | Tensor) -> Tensor:
    """Turn the hue (of the HSV colour model) by `turn` of a full circle, from -0.5 to 0.5. No turn changes nothing.

    With value v, chroma c and hue h, a channel is v - c * clamp(2 - 6 d, 0, 1), where d is the distance on the circle
    of h from the hue where the channel is smallest (cyan, magenta, yellow): there is no need for six cases. Nor on the
    way there: seen from the larger of green and blue, h or -h is one formula.

    Args:
        pixels: [..., 3, H, W].
        turn: one for all, or of each crop, [..., 1, 1].
    """
    red, green, blue = pixels.unbind(-3)
    larger, smaller = torch.maximum(green, blue), torch.minimum(green, blue)  # [..., H, W] each, as all below
    value = torch.maximum(red, larger)
    chroma = value - torch.minimum(red, smaller)
    bluish = green.clone().lt_(blue)  # 1 or 0
    unred = red.clone().lt_(larger)
    angle = torch.minimum(red, larger).sub_(smaller).div_(chroma.clamp(min=1.0).mul_(6))  # grey: 0
    angle.add_(unred.mul_((bluish * 2).sub_(1 / 3))).sub_(bluish).abs_()  # h, in turns
    turned = torch.stack([angle + (start + turn) for start in HUE_STARTS], -3)  # [..., 3, H, W], as all below
    turned.sub_(turned.round()).abs_()  # d
    turned.mul_(-6).add_(2).clamp_(0, 1).mul_(chroma.unsqueeze(-3))
    return turned.neg_().add_(value.unsqueeze(-3)).mul_(TO_STEPS).trunc_()


def grey(pixels: Tensor) -> Tensor:
    """All three channels the grey value."""
    return pixels.copy_(grey_plane(pixels))


def blur(pixels: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Blur with a Gaussian of `sigma` pixels cut off at `kernel_size` (odd), reflecting at the borders.

    Rows and columns one after the other, each as a sum of shifted images; with their borders they are one row of
    numbers, so that a shift is an offset. H and W must be greater than kernel_size // 2.
    """
    height, width = pixels.shape[-2:]
    weights = gaussian(kernel_size, sigma)
    radius = len(weights) // 2
    padded = F.pad(pixels, [radius] * 4, mode="reflect")  # [3, H + 2r, W + 2r]
    across = width + 2 * radius
    blurred = _weighted(_weighted(padded.view(-1), weights, across), weights, 1)
    kept = blurred.as_strided((3, height, width), ((height + 2 * radius) * across, across, 1))
    return kept.round()


def gaussian(kernel_size: int, sigma: float) -> list[float]:
    """Weights of `kernel_size` neighbours, or of fewer where the outer ones' would be nothing: odd many, of sum 1."""
    radius = min(kernel_size // 2, math.floor(_NEGLIGIBLE * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)  # [2r + 1]
    return torch.softmax(-0.5 * (offsets / sigma) ** 2, 0).tolist()  # exp over its sum


def solarize(pixels: Tensor, threshold: int) -> Tensor:
    """Values from `threshold` on are inverted."""
    bright = pixels.clone().ge_(threshold)  # 1 or 0
    return pixels.add_(bright.mul_((pixels * -2).add_(255)))


def _steps(pixels: Tensor) -> Tensor:
    return pixels.clamp_(0, 255).floor_()


def _weighted(row: Tensor, weights: list[float], step: int) -> Tensor:
    """Sums of `weights` times the numbers of `row`, [n], every `step` of them: [n - (len(weights) - 1) * step]."""
    length = len(row) - (len(weights) - 1) * step
    total = row[:length] * weights[0]
    for place, weight in enumerate(weights[1:], 1):
        total.add_(row[place * step : place * step + length], alpha=weight)
    return total
