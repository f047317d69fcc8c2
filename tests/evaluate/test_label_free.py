"""Measures without labels, against what they must be in cases that can be worked out."""

import math

import numpy as np
import pytest
import torch

from dinocomp.data import CropSettings, Sample
from dinocomp.data.reader import BadImage
from dinocomp.evaluate import Chosen, draw, extract_views, label_free_measures
from dinocomp.evaluate.label_free import lidar, neighbour_consistency, rankme
from dinocomp.models import VisionTransformer


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rankme_counts_directions() -> None:
    directions = torch.linalg.qr(normal(64, 6))[0]  # [64, 6], orthonormal
    for rank in (1, 3, 6):
        assert rankme(directions[:, :rank] @ normal(rank, 20).div(1e9).add(torch.eye(rank, 20))) == pytest.approx(rank)
    shares = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    by_hand = math.exp(-sum(p * math.log(p) for p in shares.tolist()))
    assert rankme(directions[:, :3] * shares) == pytest.approx(by_hand)
    assert rankme(torch.zeros(5, 3)) == 0


def test_lidar_divides_by_what_augmentation_does() -> None:
    """Images differ alike in 4 directions; where views of one image differ much more, images cannot be told apart."""
    images = torch.cat([torch.eye(4), -torch.eye(4)]).double().repeat(8, 1)  # [64, 4]
    noise = normal(64, 200, 4)
    noise = noise - noise.mean(dim=1, keepdim=True)
    assert lidar(images[:, None] + 0.01 * noise) == pytest.approx(4, rel=0.01)
    loud = noise * torch.tensor([100.0, 0.1, 0.1, 100.0], dtype=torch.float64)
    assert lidar(images[:, None] + loud) == pytest.approx(2, rel=0.01)

    # Against scikit-learn's discriminants: its eigenvalues are those of S_w^-1 S_b.
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    views = normal(12, 40, 5, seed=1) + normal(12, 1, 5, seed=2)
    model = LinearDiscriminantAnalysis(solver="eigen").fit(views.flatten(0, 1), np.repeat(np.arange(12), 40))
    shares = model.explained_variance_ratio_
    assert lidar(views, delta=0) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_neighbour_consistency() -> None:
    plain = normal(200, 1, 16)
    assert neighbour_consistency(plain.expand(-1, 3, -1)) == 1
    chance = neighbour_consistency(torch.cat([plain, normal(200, 4, 16, seed=1)], dim=1))
    assert chance == pytest.approx(10 / 199, abs=0.02)
    # By hand, k = 1: on a circle at 0, 10, 30 and 70 degrees; the augmented view of the second goes to 21 degrees.
    angles = torch.tensor([[0.0, 0.0], [10, 21], [30, 30], [70, 70]]).deg2rad()
    views = torch.stack([angles.cos(), angles.sin()], dim=-1)  # [4, 2, 2]
    assert neighbour_consistency(views, k=1) == 0.75


def test_collapse_shows() -> None:
    """Features that are nearly the same for all images have a lower rank, by all that is different in them."""
    spread, same = normal(100, 5, 32), torch.ones(100, 5, 32) + 1e-6 * normal(100, 5, 32)
    assert label_free_measures(same)["rankme"] < 1.01 < 25 < label_free_measures(spread)["rankme"]


class Noise:
    """Images of noise in memory; every fifth cannot be decoded."""

    path, classes, labelled = "noise", (), False

    def __len__(self) -> int:
        return 23

    def decode(self, i: int) -> tuple[Sample, torch.Tensor]:
        if i % 5 == 4:
            raise BadImage(f"image {i}")
        pixels = torch.randint(256, (3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        return Sample(b"", -1, str(i)), pixels


def test_views_of_a_fixed_draw() -> None:
    backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3).eval()
    settings = CropSettings(global_crops_size=16, local_crops_number=0)

    def extract(batch_size: int, **changes: object) -> torch.Tensor:
        return extract_views(
            backbone,
            Noise(),
            count=12,
            views=3,
            settings=settings,
            resize=18,
            normalize=lambda pixels: pixels / 255,
            batch_size=batch_size,
            skip_bad=True,
            **changes,
        )

    torch.manual_seed(3)
    found = extract(4)
    assert torch.initial_seed() == 3 and torch.equal(torch.rand(3), torch.rand(3, generator=torch.manual_seed(3)))
    good = [i for i in draw(23, 12) if i % 5 != 4]
    assert found.shape == (len(good), 4, 24) and 0 < len(good) < 12
    assert torch.allclose(found, extract(100, num_workers=2), atol=1e-5)
    assert (found[:, 1] - found[:, 2]).abs().max() > 0.01, "views differ"
    with pytest.raises(BadImage):
        extract_views(
            backbone,
            Noise(),
            count=0,
            views=2,
            settings=settings,
            resize=18,
            normalize=lambda pixels: pixels / 255,
            batch_size=4,
        )


def test_a_draw_is_fixed() -> None:
    assert draw(5, 0) == draw(5, 9) == [0, 1, 2, 3, 4]
    assert draw(1000, 10) == draw(1000, 10) == sorted(set(draw(1000, 10))) and len(draw(1000, 10)) == 10
    drawn = Chosen(Noise(), draw(23, 3))
    assert len(drawn) == 3 and drawn.decode(1)[0].key == str(draw(23, 3)[1])
