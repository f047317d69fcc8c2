"""k-NN against scikit-learn and by hand, and the features it is given."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from dinocomp.data import Sample, evaluation_view
from dinocomp.evaluate import Features, extract_features, gather_features, knn_accuracy
from dinocomp.models import VisionTransformer


def clusters(n: int, noise: float, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (n,), generator=generator)
    return Features(centres[labels] + noise * torch.randn(n, 8, generator=generator), labels)


def test_against_scikit_learn() -> None:
    train, val = clusters(300, 1.0, 1), clusters(100, 1.0, 2)
    ours = knn_accuracy(train, val, ks=[1, 7, 20], temperature=0.07)

    def unit(x: torch.Tensor) -> np.ndarray:
        return torch.nn.functional.normalize(x, dim=1).numpy()

    for k, accuracy in ours.items():
        # On the unit sphere 2 * cosine = 2 - distance^2, so votes are exp(-distance^2 / (2 * temperature)).
        reference = KNeighborsClassifier(k, weights=lambda d: np.exp(-(d**2) / (2 * 0.07)))
        reference.fit(unit(train.vectors), train.labels.numpy())
        assert accuracy == pytest.approx(reference.score(unit(val.vectors), val.labels.numpy()), abs=1e-9), k
    assert 0.3 < ours[20] < 1


def test_by_hand() -> None:
    """Nearest is of class 0; two of class 1 outvote it among three only if the temperature is high."""
    angles = torch.tensor([0.1, 0.4, 0.41])
    train = Features(torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 1]))
    val = Features(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert knn_accuracy(train, val, ks=[1, 3], temperature=0.01) == {1: 1.0, 3: 1.0}
    assert knn_accuracy(train, val, ks=[1, 3], temperature=10) == {1: 1.0, 3: 0.0}


def test_chunks_and_large_k_change_nothing() -> None:
    train, val = clusters(50, 1.0, 1), clusters(33, 1.0, 2)
    assert knn_accuracy(train, val, ks=[20], temperature=0.07, chunk=7) == knn_accuracy(
        train, val, ks=[20], temperature=0.07
    )
    assert knn_accuracy(train, val, ks=[50], temperature=0.07) == {
        50: knn_accuracy(train, val, ks=[500], temperature=0.07)[500]
    }


class Squares:
    """Grey squares in memory, in the shape of `dinocomp.data.Images`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def decode(self, i: int) -> tuple[Sample, torch.Tensor]:
        pixels = torch.zeros(3, 50, 40, dtype=torch.uint8)
        pixels[0] = 20 * i
        return Sample(b"", i % 3, str(i)), pixels


@pytest.mark.parametrize("num_workers", [0, 1])
def test_features_are_in_order_and_the_generator_stands_still(num_workers: int) -> None:
    backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3).eval()
    images, state = Squares(7), torch.get_rng_state()
    settings = {"resize": 36, "crop": 32, "normalize": lambda x: x.float() / 255, "num_workers": num_workers}
    features = gather_features(extract_features(backbone, images, batch_size=3, **settings), 7, chunk=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert features.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    for i in range(7):
        view = torch.zeros(1, 3, 32, 32)
        view[:, 0] = 20 * i / 255
        torch.testing.assert_close(features.vectors[i], backbone(view).cls[0].detach())


def test_images_left_out_do_not_count() -> None:
    train, val = clusters(50, 1.0, 1), clusters(33, 1.0, 2)
    left_out = Features(torch.zeros(2, 8), torch.full((2,), -1))
    more = [Features(*(torch.cat(pair) for pair in zip(left_out, part, strict=True))) for part in (train, val)]
    assert knn_accuracy(*more, ks=[5], temperature=0.07) == knn_accuracy(train, val, ks=[5], temperature=0.07)


def test_evaluation_view() -> None:
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    image[:, :, 100:] = 200
    view = evaluation_view(image, 36, 32)
    assert view.shape == (3, 32, 32) and view.dtype == torch.uint8
    assert (view[..., :12] < 20).all() and (view[..., 20:] > 180).all()
