"""Colours of many crops at once: the workers' results, and torchvision's."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from dinocomp.data.crops import CropParameters, CropSettings, colour, draw_crop
from dinocomp.data.device import DRAWN, colour_crops, pack
from dinocomp.method.pixels import Colours

PLAIN = CropParameters((0, 0, 48, 48), False, (), False, None, False)
SETTINGS = CropSettings()


def crops_of(number: int, side: int = 48, seed: int = 0) -> torch.Tensor:
    """uint8 [number, 3, side, side]: coarse and fine noise, a grey stripe, and a stripe of black and white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 6, 6, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic") * 230
    crops = (pixels + 25 * torch.rand(pixels.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    crops[:, :, 2:5] = crops[:, :1, 2:5]
    crops[:, :, 6:8, ::2], crops[:, :, 6:8, 1::2] = 0, 255
    return crops


def done(crops: torch.Tensor, drawn: list[CropParameters]) -> torch.Tensor:
    """As the device does them: all crops in one call."""
    packed = torch.tensor([pack(parameters) for parameters in drawn])
    assert packed.shape == (len(crops), DRAWN)
    return Colours(SETTINGS.blur_kernel_size, SETTINGS.solarize_threshold)(crops, packed)


def differences(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    """The largest, and the share of values that differ at all."""
    difference = (a.int() - b.int()).abs()
    return int(difference.max()), float((difference > 0).float().mean())


OPERATIONS: dict[str, tuple[dict, Callable[[torch.Tensor], torch.Tensor]]] = {
    "brightness up": ({"jitter": (("brightness", 1.375),)}, lambda x: F.adjust_brightness(x, 1.375)),
    "brightness down": ({"jitter": (("brightness", 0.625),)}, lambda x: F.adjust_brightness(x, 0.625)),
    "contrast up": ({"jitter": (("contrast", 1.375),)}, lambda x: F.adjust_contrast(x, 1.375)),
    "contrast down": ({"jitter": (("contrast", 0.625),)}, lambda x: F.adjust_contrast(x, 0.625)),
    "saturation up": ({"jitter": (("saturation", 1.1875),)}, lambda x: F.adjust_saturation(x, 1.1875)),
    "saturation down": ({"jitter": (("saturation", 0.8125),)}, lambda x: F.adjust_saturation(x, 0.8125)),
    "hue forward": ({"jitter": (("hue", 0.0625),)}, lambda x: F.adjust_hue(x, 0.0625)),
    "hue back": ({"jitter": (("hue", -0.0625),)}, lambda x: F.adjust_hue(x, -0.0625)),
    "grey": ({"grayscale": True}, lambda x: F.rgb_to_grayscale(x, num_output_channels=3)),
    "narrow blur": ({"blur_sigma": 0.1}, lambda x: F.gaussian_blur(x, [9, 9], [0.1, 0.1])),
    "wide blur": ({"blur_sigma": 2.0}, lambda x: F.gaussian_blur(x, [9, 9], [2.0, 2.0])),
    "solarize": ({"solarize": True}, lambda x: F.solarize(x, 128)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name: str) -> None:
    """Alone, beside crops that nothing happens to."""
    change, theirs = OPERATIONS[name]
    crops = crops_of(3)
    ours = done(crops, [PLAIN, replace(PLAIN, **change), PLAIN])
    largest, share = differences(ours[1], theirs(crops[1]))
    assert largest <= 1 and share < 0.002
    assert not torch.equal(ours[1], crops[1]) or name == "narrow blur"
    assert torch.equal(ours[0], crops[0]) and torch.equal(ours[2], crops[2])


@pytest.mark.parametrize("view", [0, 1, None])
def test_crops_are_those_of_the_workers(view: int | None) -> None:
    """Everything as it is drawn in a run, in one call for 200 crops, against one crop after the other.

    Rounding of fp32 may turn a value by one level, and what follows may make more of that: contrast and solarising (at
    whose threshold neighbours part) do.
    """
    rng = np.random.default_rng(7)
    drawn = [draw_crop(48, 48, SETTINGS, view, rng) for _ in range(200)]
    crops = crops_of(200)
    ours, workers = done(crops, drawn), crops.clone()
    for crop, parameters in zip(workers, drawn, strict=True):
        colour(crop, parameters, SETTINGS)
    difference = (ours.int() - workers.int()).abs()
    assert (difference > 0).float().mean() < 1e-3
    assert (difference > 1).float().mean() < 1e-4
    for crop in difference:
        assert (crop > 0).float().mean() < 0.02, "no crop is another picture"


@pytest.mark.parametrize("side", [1, 4, 5, 16])
def test_small_crops(side: int) -> None:
    """Smaller than the kernel, of which configuration has it that none is blurred."""
    crops = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)
    jittered = replace(PLAIN, jitter=(("brightness", 0.5),))
    ours = done(crops, [PLAIN, jittered])
    assert torch.equal(ours[0], crops[0]) and torch.equal(ours[1], crops[1] // 2)


def test_no_crops() -> None:
    """As of a run without local crops."""
    crops = torch.empty((0, 3, 16, 16), dtype=torch.uint8)
    assert colour_crops(crops, torch.empty(0, DRAWN), 9, 128).shape == crops.shape


def test_half_precision_around_it_changes_nothing() -> None:
    crops, drawn = crops_of(2), [replace(PLAIN, jitter=(("contrast", 1.3), ("hue", 0.07)), blur_sigma=1.5)] * 2
    expected = done(crops, drawn)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(done(crops, drawn), expected)
