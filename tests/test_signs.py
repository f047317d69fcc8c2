"""What gauges call by its name."""

import math

import pytest

from dinocomp.signs import signs_of_collapse

HEALTHY = {
    "feature_std": 0.6,
    "entropy_dino": 3.0,
    "prototypes_dino": 60.0,
    "entropy_ibot": 2.0,
    "prototypes_ibot": 9.0,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"feature_std": 0.001}, ["features are nearly the same for all images"]),
        ({"prototypes_dino": 1.01}, ["dino targets use 1.0 of 128 prototypes"]),
        ({"entropy_ibot": math.log(64)}, ["ibot targets are the same for all 64 prototypes"]),
        ({"feature_std": math.nan, "entropy_dino": math.nan}, []),
    ],
)
def test_signs(change: dict, said: list[str]) -> None:
    signs = signs_of_collapse(HEALTHY | change, {"dino": 128, "ibot": 64})
    assert len(signs) == len(said) and all(part in sign for part, sign in zip(said, signs, strict=True))


def test_a_loss_that_is_off_has_no_signs() -> None:
    assert signs_of_collapse({"feature_std": 0.5}, {}) == []
