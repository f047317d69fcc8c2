"""What augmentation does to colours, drawn in the workers and done on the device for many crops at once.

Every crop has its own operations in its own order, but all crops go through the same arithmetic: shapes never depend on
what was drawn, nothing is read back from the device, and `torch.compile` makes few kernels of it. Each colour operation
of a crop is one row of a table: a value becomes

    scale * value + own * (its pixel's grey value) + mean * (the crop's mean grey value)

and then its hue is turned. Results are those of the workers' way (`colour` in `crops.py`), which rounds at the same
places, up to the rounding of fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinocomp.data.crops import CropParameters
from dinocomp.data.pixels import grey_plane, hue

SLOTS = 4  # colour operations of a crop, at most
ROW = 4  # scale, own, mean, turn
DRAWN = SLOTS * ROW + 3  # and: grey or not, sigma of the blur (0 = none), solarised or not
_NOTHING = (1.0, 0.0, 0.0, 0.0)
_NO_SIGMA = 1e-3  # pixels; the neighbours' weights are exactly 0


def pack(parameters: CropParameters) -> list[float]:
    """What was drawn of one crop's colours, as `DRAWN` numbers."""
    rows = [_row(name, factor) for name, factor in parameters.jitter]
    rows += [_NOTHING] * (SLOTS - len(rows))
    rest = (parameters.grayscale, parameters.blur_sigma or 0.0, parameters.solarize)
    return [float(number) for numbers in (*rows, rest) for number in numbers]


def _row(name: str, factor: float) -> tuple[float, float, float, float]:
    return {
        "brightness": (factor, 0.0, 0.0, 0.0),
        "saturation": (factor, 1.0 - factor, 0.0, 0.0),
        "contrast": (factor, 0.0, 1.0 - factor, 0.0),
        "hue": (1.0, 0.0, 0.0, factor),
    }[name]


def colour_crops(crops: Tensor, drawn: Tensor, blur_kernel_size: int, solarize_threshold: int) -> Tensor:
    """Change the colours of crops that were cut and flipped.

    Args:
        crops: uint8 [N, 3, H, W].
        drawn: fp32 [N, DRAWN], see `pack`.
        blur_kernel_size: pixels, odd; 1 for no blur at all.

    Returns:
        uint8 [N, 3, H, W].
    """
    pixels = crops.float()  # [N, 3, H, W], whole numbers 0..255, as all below
    columns = drawn[:, :, None, None, None].unbind(1)  # DRAWN x [N, 1, 1, 1]
    for slot in range(SLOTS):
        scale, own, mean, turn = columns[slot * ROW : (slot + 1) * ROW]
        plane = grey_plane(pixels)[:, None]  # [N, 1, H, W]
        average = plane.mean((2, 3), keepdim=True) * mean  # [N, 1, 1, 1]
        pixels = (pixels * scale + plane * own).add_(average).clamp_(0, 255).floor_()
        pixels = hue(pixels, turn[:, 0])
    grey, sigma, solarize = columns[SLOTS * ROW :]
    pixels = torch.where(grey > 0, grey_plane(pixels)[:, None], pixels)
    pixels = _blur(pixels, sigma, blur_kernel_size // 2)
    pixels = torch.where((solarize > 0) & (pixels >= solarize_threshold), 255 - pixels, pixels)
    return pixels.to(torch.uint8)


def _blur(pixels: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Each crop, [N, 3, H, W], with a Gaussian of its own sigma, [N, 1, 1, 1], reflecting at the borders."""
    height, width = pixels.shape[-2:]
    radius = min(radius, height - 1, width - 1)  # smaller crops are never blurred
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=pixels.device)  # [2r + 1]
    weights = torch.softmax(-0.5 * (offsets / sigma.clamp_min(_NO_SIGMA)) ** 2, -1).unsqueeze(-2).unbind(-1)
    padded = F.pad(pixels, [radius] * 4, mode="reflect")  # [N, 3, H + 2r, W + 2r]
    rows = padded[..., :height, :] * weights[0]  # [N, 3, H, W + 2r]; weights: (2r + 1) x [N, 1, 1, 1]
    for shift, weight in enumerate(weights[1:], 1):
        rows = torch.addcmul(rows, padded[..., shift : shift + height, :], weight)
    blurred = rows[..., :width] * weights[0]  # [N, 3, H, W]
    for shift, weight in enumerate(weights[1:], 1):
        blurred = torch.addcmul(blurred, rows[..., shift : shift + width], weight)
    return blurred.round_()
