"""Pixels on the device, before the networks: augmented colours, if they are left to the device, and normalisation."""

import torch
from torch import Tensor, nn

from dinocomp.data.device import colour_crops


class Colours(nn.Module):
    """The part of augmentation that workers leave to the device, see `data/device.py`.

    Args:
        blur_kernel_size: pixels, odd; 1 for no blur at all.
        solarize_threshold: values from here on are inverted.
    """

    def __init__(self, blur_kernel_size: int, solarize_threshold: int) -> None:
        super().__init__()
        self.blur_kernel_size = blur_kernel_size
        self.solarize_threshold = solarize_threshold

    @torch.no_grad()
    def forward(self, crops: Tensor, drawn: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] and what was drawn for them, fp32 [N, P] -> uint8 [N, 3, H, W]."""
        with torch.autocast(crops.device.type, enabled=False):  # values are whole numbers, which bf16 would round
            return colour_crops(crops, drawn, self.blur_kernel_size, self.solarize_threshold)


class Normalize(nn.Module):
    """uint8 pixels to (x / 255 - mean) / std, fp32: [..., C, H, W] -> the same."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() / 255 - self.mean) / self.std
