import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import ColorJitter, GaussianBlur, Grayscale, InterpolationMode, RandomSolarize
from torchvision.transforms.v2 import functional as F

from dinocomp.data import pixels
from dinocomp.data.crops import (
    CropParameters,
    CropSettings,
    apply_crop,
    draw_box,
    draw_crop,
    draw_jitter,
    largest_reduction,
    multi_crop,
    on_reduced,
)
from dinocomp.errors import ConfigError

SMALL = CropSettings(global_crops_size=32, local_crops_size=16, local_crops_number=3)
PLAIN = CropParameters((0, 0, 90, 120), False, (), False, None, False)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding: no value differs by more than 1, and fewer than one in 500 differ at all."""
    difference = (a.int() - b.int()).abs()
    return bool(difference.max() <= 1 and (difference > 0).float().mean() < 0.002)


def adjust_hue(image: torch.Tensor, turn: float) -> torch.Tensor:
    return pixels.to_crop(pixels.hue(pixels.to_pixels(image), turn))


def gaussian_blur(image: torch.Tensor, kernel_size: int, sigma: float) -> torch.Tensor:
    return pixels.to_crop(pixels.blur(pixels.to_pixels(image), kernel_size, sigma))


@pytest.mark.parametrize("size", [(5, 9), (31, 64), (224, 224)])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.7, 0.75, 0.76, 2.0])
def test_blur_is_torchvisions(size: tuple[int, int], sigma: float) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert close(gaussian_blur(image, 9, sigma), F.gaussian_blur(image, [9, 9], [sigma, sigma]))


@pytest.mark.parametrize("factor", [-0.5, -0.37, -0.1, 0.0, 0.0371, 0.1, 0.42, 0.5])
def test_hue_is_torchvisions(factor: float) -> None:
    image = torch.randint(0, 256, (3, 200, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image[:, :50] = image[:1, :50]  # grey
    image[1, 50:100] = image[0, 50:100]  # two channels share the largest or smallest value
    image[:, 100:103] = torch.tensor([0, 255, 1]).view(1, 3, 1)
    assert close(adjust_hue(image, factor), F.adjust_hue(image, factor))
    assert torch.equal(adjust_hue(image, 0.0), image)


def test_shapes_and_types(smooth: torch.Tensor) -> None:
    large, small = multi_crop(smooth, SMALL, rng())
    assert large.shape == (2, 3, 32, 32) and small.shape == (3, 3, 16, 16)
    assert large.dtype == small.dtype == torch.uint8
    assert not torch.equal(large[0], large[1])


def test_no_local_crops(smooth: torch.Tensor) -> None:
    _, small = multi_crop(smooth, replace(SMALL, local_crops_number=0), rng())
    assert small.shape == (0, 3, 16, 16) and small.dtype == torch.uint8


def test_same_generator_same_crops(smooth: torch.Tensor) -> None:
    first, again, other = (multi_crop(smooth, SMALL, rng(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 9), (2000, 3)])
def test_odd_images(shape: tuple[int, int]) -> None:
    for seed in range(5):
        large, small = multi_crop(torch.full((3, *shape), 77, dtype=torch.uint8), SMALL, rng(seed))
        assert large.shape == (2, 3, 32, 32) and small.shape == (3, 3, 16, 16)


def test_probabilities() -> None:
    settings = CropSettings()
    for view in (0, 1, None):
        generator = rng(1)
        drawn = [draw_crop(300, 400, settings, view, generator) for _ in range(4000)]
        share = {
            "flip": (np.mean([d.flip for d in drawn]), 0.5),
            "jitter": (np.mean([bool(d.jitter) for d in drawn]), 0.8),
            "grayscale": (np.mean([d.grayscale for d in drawn]), 0.2),
            "blur": (np.mean([d.blur_sigma is not None for d in drawn]), {0: 0.0, 1: 0.9, None: 0.5}[view]),
            "solarize": (np.mean([d.solarize for d in drawn]), 0.2 if view == 1 else 0.0),
        }
        for name, (found, expected) in share.items():
            assert abs(found - expected) < 0.03, name
            assert expected != 0.0 or found == 0.0, name
        sigmas = [d.blur_sigma for d in drawn if d.blur_sigma is not None]
        if sigmas:
            assert 0.1 <= min(sigmas) < 0.15 and 1.95 < max(sigmas) <= 2.0 and abs(np.mean(sigmas) - 1.05) < 0.05


def test_jitter_factors_and_order() -> None:
    generator = rng(2)
    drawn = [dict(draw_jitter(CropSettings(), generator)) for _ in range(3000)]
    bounds = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in bounds.items():
        values = np.array([d[name] for d in drawn])
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
    assert len({tuple(d) for d in drawn}) == 24  # every order of the four occurs


def test_jitter_strength_zero_is_left_out() -> None:
    settings = CropSettings(brightness=0.0, hue=0.0)
    assert all(set(dict(draw_jitter(settings, rng(s)))) == {"contrast", "saturation"} for s in range(20))


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_follow_torchvision(scale: tuple[float, float]) -> None:
    """Same distribution of area, aspect and position as torchvision's own parameters."""
    generator, image = rng(3), torch.empty(3, 300, 400)
    torch.manual_seed(0)
    ours = np.array([draw_box(300, 400, scale, (3 / 4, 4 / 3), generator) for _ in range(6000)], float)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(6000)], float)
    for boxes in (ours, theirs):
        assert (boxes[:, 0] + boxes[:, 2] <= 300).all() and (boxes[:, 1] + boxes[:, 3] <= 400).all()
    features = [
        (np.prod(b[:, 2:], 1) / 120_000, np.log(b[:, 3] / b[:, 2]), b[:, 0] / 300, b[:, 1] / 400)
        for b in (ours, theirs)
    ]
    for a, b in zip(*features, strict=True):
        for share in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert abs(np.quantile(a, share) - np.quantile(b, share)) < 0.03
    assert math.isclose(features[0][0].max(), features[1][0].max(), rel_tol=0.05)


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10), (11, 16), (16, 11)])
def test_box_falls_back_to_the_centre(shape: tuple[int, int]) -> None:
    scale, ratio = (3.0, 4.0), (3 / 4, 4 / 3)  # nothing that large fits
    assert draw_box(*shape, scale, ratio, rng()) == RandomResizedCrop.get_params(torch.empty(3, *shape), scale, ratio)


def test_geometry_is_torchvisions(smooth: torch.Tensor) -> None:
    box = (10, 20, 60, 50)
    ours = apply_crop(smooth, 32, replace(PLAIN, box=box, flip=True), SMALL)
    theirs = F.resized_crop(smooth.contiguous(), *box, [32, 32], InterpolationMode.BICUBIC, antialias=True).flip(-1)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("end", [0, 1])
def test_each_colour_operation_is_torchvisions(smooth: torch.Tensor, name: str, end: int) -> None:
    strength = 0.0625 if name == "hue" else 0.375  # torchvision rounds to float32: take what survives that
    factor = (-strength, strength)[end] if name == "hue" else (1 - strength, 1 + strength)[end]
    crop = apply_crop(smooth, 32, PLAIN, SMALL)
    ours = apply_crop(smooth, 32, replace(PLAIN, jitter=((name, factor),)), SMALL)
    theirs = ColorJitter(**{name: (factor, factor)})(crop)
    assert close(ours, theirs) if name == "hue" else torch.equal(ours, theirs)
    assert not close(ours, crop)


def test_grey_blur_and_solarize_are_torchvisions(smooth: torch.Tensor) -> None:
    crop = apply_crop(smooth, 32, PLAIN, SMALL)
    grey = apply_crop(smooth, 32, replace(PLAIN, grayscale=True), SMALL)
    assert torch.equal(grey, Grayscale(3)(crop)) and torch.equal(grey[0], grey[2])
    assert close(apply_crop(smooth, 32, replace(PLAIN, blur_sigma=1.5), SMALL), GaussianBlur(9, (1.5, 1.5))(crop))
    solarized = apply_crop(smooth, 32, replace(PLAIN, solarize=True), SMALL)
    assert torch.equal(solarized, RandomSolarize(128.0, p=1.0)(crop))
    assert torch.equal(solarized, torch.where(crop >= 128, 255 - crop, crop))


def test_operations_come_in_the_reference_order(smooth: torch.Tensor) -> None:
    everything = CropParameters((5, 5, 80, 90), True, (("hue", 0.05), ("contrast", 1.3)), True, 1.0, True)
    crop = F.resized_crop(smooth, 5, 5, 80, 90, [32, 32], InterpolationMode.BICUBIC, antialias=True)
    for step in (
        F.horizontal_flip,
        lambda x: adjust_hue(x, 0.05),
        lambda x: F.adjust_contrast(x, 1.3),
        Grayscale(3),
        lambda x: gaussian_blur(x, 9, 1.0),
        lambda x: F.solarize(x, 128.0),
    ):
        crop = step(crop)
    assert torch.equal(apply_crop(smooth, 32, everything, SMALL), crop)


def test_how_far_an_image_may_be_reduced() -> None:
    """Each crop keeps twice its pixels, in both directions."""
    settings = CropSettings(local_crops_number=1)
    for boxes, expected in [
        ([(900, 900), (900, 900), (400, 400)], 2),
        ([(1800, 1800), (1800, 1800), (800, 800)], 4),
        ([(1800, 1800), (1800, 1800), (800, 380)], 1),
        ([(1800, 890), (1800, 1800), (800, 800)], 1),
        ([(4000, 4000)] * 3, 8),
        ([(300, 300), (300, 300), (150, 150)], 1),
    ]:
        assert largest_reduction([replace(PLAIN, box=(0, 0, *box)) for box in boxes], settings) == expected


def test_boxes_on_a_reduced_image() -> None:
    """Within it, also where its size was rounded up, and at most a pixel from where they were."""
    for seed in range(50):
        drawn = draw_crop(403, 301, CropSettings(), None, rng(seed))
        top, left, height, width = on_reduced(drawn, (403, 301), (101, 76)).box
        assert 0 <= top < top + height <= 101 and 0 <= left < left + width <= 76
        edges = (drawn.box[0], drawn.box[1], drawn.box[0] + drawn.box[2], drawn.box[1] + drawn.box[3])
        for edge, found in zip(edges, (top, left, top + height, left + width), strict=True):
            assert abs(edge / 4 - found) <= 1
    everything = CropParameters((0, 0, 403, 301), True, (("hue", 0.05),), True, 1.0, True)
    assert on_reduced(everything, (403, 301), (101, 76)) == replace(everything, box=(0, 0, 101, 76))


def test_memory_layout_does_not_matter(smooth: torch.Tensor) -> None:
    assert smooth.stride()[0] == 1  # as decoded: channels last
    for a, b in zip(multi_crop(smooth, SMALL, rng(4)), multi_crop(smooth.contiguous(), SMALL, rng(4)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"blur_kernel_size": 8}, "blur_kernel_size"),
        ({"hue": 0.7}, "hue"),
        ({"local_crops_size": 4}, "local_crops_size"),
        ({"global_crops_size": 3}, "global_crops_size"),
    ],
)
def test_impossible_settings(change: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        CropSettings(**change)


def test_tiny_crops_without_blur(smooth: torch.Tensor) -> None:
    settings = CropSettings(global_crops_size=4, local_crops_size=2, blur_probability=(0.0, 0.0, 0.0))
    assert multi_crop(smooth, settings, rng())[1].shape == (8, 3, 2, 2)
