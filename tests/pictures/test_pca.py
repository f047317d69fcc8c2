"""Colours of patches: a planted foreground, signs, and sets without anything in them."""

import pytest
import torch
from PIL import Image
from torch import Tensor

from dinocomp.pictures.pca import patch_brightness, patch_colours, pca_picture, principal_components

GRID = (6, 6)


def planted(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [3, 36, 16] whose inner 3 x 3 patches are of another kind and vary along three axes; where these are, and
    images whose foreground is bright."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.zeros(3, *GRID, dtype=torch.bool)
    inside[:, 2:5, 1:4] = True
    tokens = torch.full((3, 36, 16), 0.3) + 0.01 * torch.randn(3, 36, 16, generator=generator)
    flat = inside.flatten(1)
    tokens[..., 0] += 10 * flat
    for axis, size in ((1, 3.0), (2, 2.0), (3, 1.0)):
        tokens[..., axis] += flat * size * torch.randn(3, 36, generator=generator)
    images = torch.full((3, 3, 48, 48), 20, dtype=torch.uint8)
    images[:, :, 16:40, 8:32] = torch.randint(100, 255, (3, 1, 24, 24), generator=generator, dtype=torch.uint8)
    return tokens, flat, images


def test_a_planted_foreground_is_found_whatever_its_sign() -> None:
    tokens, inside, images = planted()
    brightness = patch_brightness(images, GRID)
    assert brightness.shape == (3, 36) and brightness[~inside].max() == 20
    colours = patch_colours(tokens, GRID, brightness)
    assert torch.equal(colours.foreground, inside)
    assert colours.rgb[~inside].max() <= 0.11, "background is dark"
    assert colours.rgb[inside].min() == 0 and colours.rgb[inside].max() == 1
    dark = patch_colours(tokens, GRID, 255 - brightness)
    assert torch.equal(dark.foreground, inside), "the border decides, not the light"


def test_the_same_colours_of_features_turned_round_and_over() -> None:
    """A network's axes are its own business, and so is a component's sign: pictures over a run can be compared."""
    tokens, _, images = planted()
    brightness = patch_brightness(images, GRID)
    first = patch_colours(tokens, GRID, brightness)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    for other in (tokens.clone(), -tokens, (tokens.double() @ rotation).float(), 7 * tokens):
        again = patch_colours(other, GRID, brightness)
        torch.testing.assert_close(again.rgb, first.rgb, atol=1e-4, rtol=0)


def test_components_by_hand() -> None:
    """Along x + y they are sqrt(2), along x - y half of that; both grow with what they are to be like."""
    steps = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    across = torch.tensor([-0.5, 1.0, -1.0, 0.5])
    features = torch.stack([steps + across, steps - across], dim=1) + 5
    found = principal_components(features, 3, like=-steps + 0.1 * across)
    torch.testing.assert_close(found[:, 0], -(2**0.5) * steps.double())
    torch.testing.assert_close(found[:, 1], 2**0.5 * across.double())
    assert not found[:, 2].any(), "two dimensions have two components"


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 5)])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_features_that_do_not_vary_are_grey(grid: tuple[int, int], value: float) -> None:
    tokens = torch.full((2, grid[0] * grid[1], 8), value)
    colours = patch_colours(tokens, grid, torch.zeros(2, grid[0] * grid[1]))
    assert colours.foreground.all() and (colours.rgb == 0.5).all()


def test_one_dimension_is_one_colour() -> None:
    colours = patch_colours(torch.randn(2, 16, 1), (4, 4), torch.rand(2, 16))
    assert colours.rgb.isfinite().all() and (colours.rgb[colours.foreground][:, 1:] == 0.5).all()


@pytest.mark.parametrize(("number", "grid", "side"), [(1, (37, 37), 518), (4, (4, 4), 16), (12, (6, 6), 48)])
def test_the_picture(number: int, grid: tuple[int, int], side: int) -> None:
    images = torch.randint(256, (number, 3, side, side), dtype=torch.uint8)
    patches = torch.randn(number, grid[0] * grid[1], 24)
    picture = pca_picture(images, patches, grid)
    assert isinstance(picture, Image.Image) and picture.width == 780 and picture.height > 300
    assert picture.tobytes() == pca_picture(images, patches, grid).tobytes()
