"""Multi-crop augmentation: parameters drawn by pure functions, applied to uint8 tensors.

The order of a crop's operations is crop and resize, flip, colour jitter, grey, blur, solarize, as in the reference.
Pixels are normalised later, on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dinocomp.data import pixels as operations
from dinocomp.errors import ConfigError

GLOBAL_CROPS = 2  # the losses pair exactly two views
_REDUCTIONS = (8, 4, 2)  # what a JPEG decoder can divide an image's sides by
_SPARE = 2.0  # pixels of a reduced box for each of its crop, at least, in both directions: about 50 dB of the whole box


@dataclass(frozen=True)
class CropSettings:
    """What may happen to a crop; names and defaults are those of the configuration's `crops.*`.

    `blur_probability` is for (global crop 1, global crop 2, local crops). The default is what the reference's code
    did and its weights were trained with; the paper's intent was (1.0, 0.1, 0.5).
    """

    global_crops_scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area
    local_crops_number: int = 8
    local_crops_scale: tuple[float, float] = (0.05, 0.32)
    global_crops_size: int = 224  # pixels
    local_crops_size: int = 96  # pixels
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, before resizing to a square
    horizontal_flip_probability: float = 0.5
    color_jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur_probability: tuple[float, float, float] = (0.0, 0.9, 0.5)
    blur_kernel_size: int = 9  # pixels, odd
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_probability: float = 0.2  # second global crop only
    solarize_threshold: int = 128

    def __post_init__(self) -> None:
        if self.blur_kernel_size < 1 or self.blur_kernel_size % 2 == 0:
            raise ConfigError(f"crops.blur_kernel_size is {self.blur_kernel_size}; it must be odd and positive, e.g. 9")
        if not 0.0 <= self.hue <= 0.5:
            raise ConfigError(f"crops.hue is {self.hue}; it must lie in 0..0.5 (0.5 turns the colour circle half-way)")
        sizes = {"global": (self.global_crops_size, max(self.blur_probability[:2]))}
        if self.local_crops_number:
            sizes["local"] = (self.local_crops_size, self.blur_probability[2])
        for name, (size, probability) in sizes.items():
            if probability > 0 and size <= self.blur_kernel_size // 2:
                raise ConfigError(
                    f"crops.{name}_crops_size is {size} pixels, too small for crops.blur_kernel_size="
                    f"{self.blur_kernel_size}; use crops.blur_kernel_size={2 * size - 1} or smaller, or no blur"
                )


@dataclass(frozen=True)
class CropParameters:
    """Everything drawn for one crop.

    Attributes:
        box: top, left, height, width in pixels of the source image.
        jitter: (operation, factor) in the order they are applied; empty for none.
        blur_sigma: in pixels of the crop; None for no blur.
    """

    box: tuple[int, int, int, int]
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    grayscale: bool
    blur_sigma: float | None
    solarize: bool

    @property
    def colours(self) -> bool:
        """Whether anything happens behind cutting."""
        return bool(self.jitter) or self.grayscale or self.blur_sigma is not None or self.solarize


_JITTER = {
    "brightness": operations.brightness,
    "contrast": operations.contrast,
    "saturation": operations.saturation,
    "hue": operations.hue,
}


def multi_crop(
    image: torch.Tensor, settings: CropSettings, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw all crops of one image, uint8 [3, H, W], and carry them out; see `draw_crops` and `make_crops`."""
    return make_crops(image, draw_crops(*image.shape[-2:], settings, rng), settings)


def draw_crops(height: int, width: int, settings: CropSettings, rng: np.random.Generator) -> list[CropParameters]:
    """Draw all crops of an image of `height` x `width`: the global ones, then the local ones.

    Args:
        rng: the only source of randomness; the same state gives the same crops.
    """
    views = (*range(GLOBAL_CROPS), *[None] * settings.local_crops_number)
    return [draw_crop(height, width, settings, view, rng) for view in views]


def largest_reduction(drawn: Sequence[CropParameters], settings: CropSettings) -> int:
    """By how much (1, 2, 4, 8) an image's sides may be divided so that each crop still has pixels to spare.

    Args:
        drawn: of the global crops, then of the local ones.
    """
    sizes = [settings.global_crops_size] * GLOBAL_CROPS + [settings.local_crops_size] * settings.local_crops_number
    ratio = min(min(parameters.box[2:]) / size for parameters, size in zip(drawn, sizes, strict=True))
    return next((by for by in _REDUCTIONS if ratio >= _SPARE * by), 1)


def on_reduced(parameters: CropParameters, size: tuple[int, int], reduced: tuple[int, int]) -> CropParameters:
    """What was drawn for an image of `size` (height, width), for the same one decoded at the size `reduced`.

    The box's edges go to the nearest pixels.
    """
    down, across = (small / whole for small, whole in zip(reduced, size, strict=True))
    top, left, height, width = parameters.box
    top, bottom = round(top * down), round((top + height) * down)
    left, right = round(left * across), round((left + width) * across)
    return replace(parameters, box=(top, left, bottom - top, right - left))


def make_crops(
    image: torch.Tensor, drawn: Sequence[CropParameters], settings: CropSettings, *, colours: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry out all crops of one image.

    Args:
        image: uint8 [3, H, W].
        drawn: of the global crops, then of the local ones, for an image of that size.
        colours: whether to change them; else crops are only cut and flipped.

    Returns:
        global crops uint8 [2, 3, G, G] (two independent draws) and local crops uint8 [L, 3, l, l] (L may be 0).
    """
    large, small = settings.global_crops_size, settings.local_crops_size
    global_crops = torch.empty((GLOBAL_CROPS, 3, large, large), dtype=torch.uint8)
    local_crops = torch.empty((settings.local_crops_number, 3, small, small), dtype=torch.uint8)
    for crop, parameters in zip((*global_crops, *local_crops), drawn, strict=True):
        cut(image, parameters, crop)
        if colours:
            colour(crop, parameters, settings)
    return global_crops, local_crops


def draw_crop(
    height: int, width: int, settings: CropSettings, view: int | None, rng: np.random.Generator
) -> CropParameters:
    """Draw one crop's parameters for an image of `height` x `width`; `view` is 0 or 1 (global) or None (local)."""
    scale = settings.local_crops_scale if view is None else settings.global_crops_scale
    box = draw_box(height, width, scale, settings.aspect_ratio, rng)
    flip = rng.random() < settings.horizontal_flip_probability
    jitter = draw_jitter(settings, rng) if rng.random() < settings.color_jitter_probability else ()
    grayscale = rng.random() < settings.grayscale_probability
    blur = rng.random() < settings.blur_probability[2 if view is None else view]
    sigma = _between(*settings.blur_sigma, rng) if blur else None
    solarize = view == 1 and rng.random() < settings.solarize_probability
    return CropParameters(box, bool(flip), jitter, bool(grayscale), sigma, bool(solarize))


def draw_box(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width): area uniform in `scale`, aspect log-uniform in `ratio` (width/height).

    As torchvision's RandomResizedCrop: ten tries for a box that fits, else the largest centred box within `ratio`.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * _between(*scale, rng)
        aspect = math.exp(_between(log_low, log_high, rng))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_jitter(settings: CropSettings, rng: np.random.Generator) -> tuple[tuple[str, float], ...]:
    """Colour operations in random order with uniform factors, as torchvision's ColorJitter; strength 0: left out."""
    operations = []
    for index in rng.permutation(len(_JITTER)):
        name = tuple(_JITTER)[index]
        strength = getattr(settings, name)
        if strength > 0:
            low, high = (-strength, strength) if name == "hue" else (max(0.0, 1.0 - strength), 1.0 + strength)
            operations.append((name, _between(low, high, rng)))
    return tuple(operations)


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    """The number that `rng.uniform` would give, in a third of its time."""
    return low + (high - low) * rng.random()


def apply_crop(image: torch.Tensor, size: int, parameters: CropParameters, settings: CropSettings) -> torch.Tensor:
    """Carry out one drawn crop: uint8 [3, H, W] -> uint8 [3, size, size]."""
    crop = torch.empty((3, size, size), dtype=torch.uint8)
    cut(image, parameters, crop)
    colour(crop, parameters, settings)
    return crop


def cut(image: torch.Tensor, parameters: CropParameters, crop: torch.Tensor) -> None:
    """Fill `crop`, uint8 [3, size, size], with its box of the image, uint8 [3, H, W], flipped or not."""
    top, left, height, width = parameters.box
    box = image[None, :, top : top + height, left : left + width]  # [1, 3, height, width]
    resized = interpolate(box, crop.shape[-2:], mode="bicubic", antialias=True)[0]  # [3, size, size]
    crop.copy_(resized.flip(-1) if parameters.flip else resized)


def colour(crop: torch.Tensor, parameters: CropParameters, settings: CropSettings) -> None:
    """Change the colours of `crop`, uint8 [3, size, size], as drawn: everything behind `cut`."""
    if not parameters.colours:
        return
    pixels = operations.to_pixels(crop)  # [3, size, size], as all below
    for name, factor in parameters.jitter:
        pixels = _JITTER[name](pixels, factor)
    if parameters.grayscale:
        pixels = operations.grey(pixels)
    if parameters.blur_sigma is not None:
        pixels = operations.blur(pixels, settings.blur_kernel_size, parameters.blur_sigma)
    if parameters.solarize:
        pixels = operations.solarize(pixels, settings.solarize_threshold)
    crop.copy_(operations.to_crop(pixels))


def evaluation_view(image: torch.Tensor, resize: int, crop: int) -> torch.Tensor:
    """The view that features are taken of: shorter side to `resize` pixels, bicubic, then the centre.

    Args:
        image: uint8 [3, H, W].

    Returns:
        uint8 [3, crop, crop].
    """
    image = F.resize(image, [resize], interpolation=InterpolationMode.BICUBIC, antialias=True)  # [3, H', W']
    return F.center_crop(image, [crop, crop])
