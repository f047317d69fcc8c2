"""What raw pixels reach, against numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray

from dinocomp.build.evaluation import labelled_pair
from dinocomp.config import load_config
from dinocomp.data import evaluation_view
from dinocomp.evaluate import Chosen
from dinocomp.evaluate.pixels import Thumbnails, measure_pixels
from dinocomp.method.pixels import Normalize

from ..helpers import words

pytestmark = pytest.mark.usefixtures("one_cache")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def vectors_of(images: Chosen, size: int) -> tuple[ndarray, ndarray]:
    """Means over cells, of length 1, [n, 768], and labels."""
    found = [images.decode(i) for i in range(len(images))]
    pixels = np.stack([evaluation_view(image, size, size).numpy() for _, image in found]) / 255.0
    pixels = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    cell = size // 16
    cells = pixels.reshape(len(found), 3, 16, cell, 16, cell).mean((3, 5)).reshape(len(found), -1)
    return cells / np.linalg.norm(cells, axis=1, keepdims=True), np.array([sample.label for sample, _ in found])


@pytest.mark.parametrize("size", [16, 32])
def test_against_numpy(tmp_path: Path, size: int) -> None:
    changes = {"evaluation__train_images": 300, "evaluation__val_images": 120}
    pair = labelled_pair(load_config(None, words(tmp_path / "run", **changes)).config)
    measured = measure_pixels(
        torch.nn.Linear(1, 1),
        pair=pair,
        resize=size,
        crop=size,
        ks=(1, 10),
        temperature=0.07,
        normalize=Normalize(MEAN, STD),
        batch_size=50,
        autocast=torch.bfloat16,  # of training; not of this
    )
    (train, labels), (val, wanted) = vectors_of(pair.train, size), vectors_of(pair.val, size)
    cosines = val @ train.T  # [120, 300]
    for k, accuracy in measured.items():
        nearest = np.argsort(-cosines, axis=1)[:, :k]
        votes = np.exp(np.take_along_axis(cosines, nearest, 1) / 0.07)
        scores = np.stack([(votes * (labels[nearest] == label)).sum(1) for label in range(10)], 1)
        assert accuracy == pytest.approx((scores.argmax(1) == wanted).mean(), abs=1e-9) and 0.8 < accuracy < 1


@pytest.mark.parametrize(("shape", "width"), [((2, 3, 224, 224), 768), ((2, 3, 20, 20), 768), ((2, 3, 8, 8), 192)])
def test_sizes(shape: tuple[int, ...], width: int) -> None:
    images = torch.randn(shape)
    assert Thumbnails()(images).cls.shape == (2, width)
    if width < 768:
        assert torch.equal(Thumbnails()(images).cls, images.flatten(1)), "smaller images are taken as they are"
