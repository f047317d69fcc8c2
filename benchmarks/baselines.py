"""What others do between an image's bytes and its crops, to compare with: the same crops, drawn and done their way."""

import io
from collections.abc import Callable

import torch
from PIL import Image
from torch import nn
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from dinocomp.data import CropSettings
from dinocomp.data.crops import GLOBAL_CROPS

Pipeline = Callable[[bytes], list[torch.Tensor]]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pillow_pipeline(settings: CropSettings) -> Pipeline:
    """The reference's way: torchvision's transforms on Pillow images, normalised in the worker; fp32 crops."""
    last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]
    crops = _transforms(settings, last)

    def pipeline(data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [crop(image) for crop in crops]

    return pipeline


def tensor_pipeline(settings: CropSettings) -> Pipeline:
    """torchvision's decoder and its transforms on uint8 tensors; uint8 crops, to be normalised on the device."""
    crops = _transforms(settings, [])

    def pipeline(data: bytes) -> list[torch.Tensor]:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)  # [3, H, W]
        return [crop(image) for crop in crops]

    return pipeline


def _transforms(settings: CropSettings, last: list[nn.Module]) -> list[nn.Module]:
    """One for each crop: the two global ones, then the local ones."""

    def crop(size: int, scale: tuple[float, float], blur: float, solarize: float) -> nn.Module:
        jitter = v2.ColorJitter(settings.brightness, settings.contrast, settings.saturation, settings.hue)
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, settings.aspect_ratio, InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(settings.horizontal_flip_probability),
                v2.RandomApply([jitter], settings.color_jitter_probability),
                v2.RandomGrayscale(settings.grayscale_probability),
                v2.RandomApply([v2.GaussianBlur(settings.blur_kernel_size, settings.blur_sigma)], blur),
                v2.RandomSolarize(settings.solarize_threshold, solarize),
                *last,
            ]
        )

    large = [
        crop(settings.global_crops_size, settings.global_crops_scale, settings.blur_probability[view], solarize)
        for view, solarize in zip(range(GLOBAL_CROPS), (0.0, settings.solarize_probability), strict=True)
    ]
    small = crop(settings.local_crops_size, settings.local_crops_scale, settings.blur_probability[2], 0.0)
    return large + [small] * settings.local_crops_number
