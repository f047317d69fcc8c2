"""Maps of images."""

import numpy as np
import pytest
import torch

from dinocomp.pictures import embedding_picture, map_images

from ..helpers import random_states


def heaps(n: int = 60, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % classes
    return torch.eye(classes, 12)[labels] + 0.05 * torch.randn(n, 12), labels


def test_what_is_alike_lies_together_and_no_generator_moves() -> None:
    vectors, labels = heaps()
    states = random_states()
    places, method = map_images(vectors)
    assert random_states() == states
    assert method == "t-SNE" and places.shape == (60, 2)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels.numpy()[distances.argmin(axis=1)] == labels.numpy()).all()
    assert (places == map_images(vectors)[0]).all()


@pytest.mark.parametrize("number", [1, 2, 3, 29])
def test_few_images_have_principal_components(number: int) -> None:
    places, method = map_images(torch.randn(number, 8))
    assert places.shape == (number, 2) and np.isfinite(places).all() and method != "t-SNE"


@pytest.mark.parametrize("number", [3, 40])
def test_features_that_are_all_the_same(number: int) -> None:
    images = torch.zeros(number, 3, 8, 8, dtype=torch.uint8)
    for value in (0.0, 2.0):
        vectors = torch.full((number, 8), value)
        assert not map_images(vectors)[0].any()
        assert embedding_picture(images, vectors, torch.full((number,), -1)).width == 780


@pytest.mark.parametrize("classes", [1, 2, 20, 21])
def test_pictures(classes: int) -> None:
    vectors, labels = heaps(42, classes)
    images = torch.randint(256, (42, 3, 16, 16), dtype=torch.uint8)
    names = [f"a class with a long name {i}" for i in range(classes)]
    picture = embedding_picture(images, vectors, labels, names)
    assert picture.width == 780 and picture.height > 780
    labels[::2] = -1
    assert embedding_picture(images, vectors, labels).width == 780
