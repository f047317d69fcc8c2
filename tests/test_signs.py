"""What numbers call by its name."""

import math

import pytest

from dinocomp.signs import fell, news_of_decline, signs_of_collapse, signs_of_decline

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


FELL = "k-NN accuracy fell from 84.1 % (iteration 500) to 81.0 %"


def scores_of(*values: float, period: int = 250) -> list[tuple[int, float]]:
    return [(period * i, value) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("scores", "pixels", "signs"),
    [
        ([], None, []),
        (scores_of(0.5, 0.6, 0.84), 0.7, []),
        (scores_of(0.5, 0.7, 0.841, 0.81), None, [FELL]),
        (scores_of(0.5, 0.7, 0.84, 0.83), None, []),  # a point, which floats make a little more
        (scores_of(0.5, 0.7, 0.84, 0.829), None, ["fell from 84.0 % (iteration 500) to 82.9 %"]),
        (scores_of(0.5, 0.505), None, ["50.5 % is no better than before training (50.0 %)"]),
        (scores_of(0.5, 0.51), None, []),
        ([(0, 0.5), (249, 0.5)], None, []),  # too early to say
        ([(250, 0.5), (500, 0.5)], None, []),  # not known
        (scores_of(0.5, 0.6, 0.7), 0.711, ["70.0 % is worse than that of raw pixels (71.1 %)"]),
        (scores_of(0.5, 0.6, 0.7), 0.71, []),  # a point
        (scores_of(0.96, 0.9615), None, ["96.2 % is no better than before training (96.0 %)"]),
        (scores_of(0.96, 0.962), None, []),  # a twentieth of what was wrong
        ([(0, 0.5), (499, 0.6)], 0.7, []),
        (scores_of(0.5, 0.48, 0.47), 0.98, ["fell from 50.0 % (iteration 0) to 47.0 %", "that of raw pixels"]),
        (
            scores_of(0.5, 0.9, 0.4),
            0.98,
            ["fell from 90.0 % (iteration 250)", "no better than before training", "that of raw pixels (98.0 %)"],
        ),
    ],
)
def test_signs_of_decline(scores: list[tuple[int, float]], pixels: float | None, signs: list[str]) -> None:
    found = signs_of_decline(scores, 1000, pixels)
    assert len(found) == len(signs) and all(part in sign for part, sign in zip(signs, found, strict=True)), found
    assert fell(scores) == any("fell" in sign for sign in found)


def test_of_a_run_of_unknown_length_only_a_fall_is_said() -> None:
    assert signs_of_decline(scores_of(0.5, 0.5, 0.5), 0, 0.9) == []
    assert signs_of_decline(scores_of(0.5, 0.8, 0.5), 0, 0.9) == [
        "k-NN accuracy fell from 80.0 % (iteration 250) to 50.0 %"
    ]


def test_news_of_decline() -> None:
    """Each sign once; a fall again with every further point, and after a new best."""
    values = [0.5, 0.5, 0.5, 0.505, 0.7, 0.685, 0.68, 0.674, 0.69, 0.66, 0.8, 0.78, 0.5, 0.4]
    scores = scores_of(*values, period=100)
    news = {end: news_of_decline(scores[: end + 1], 1000, 0.6) for end in range(len(scores))}
    said = {place: "; ".join(texts) for place, texts in news.items() if texts}
    assert sorted(said) == [3, 5, 7, 9, 11, 12, 13]
    assert "no better than before training" in said[3]
    assert all("fell from 70.0 %" in said[i] for i in (5, 7, 9)) and "fell from 80.0 %" in said[11]
    assert "to 50.0 %; " in said[12] and "worse than that of raw pixels" in said[12]
    assert said[13] == "k-NN accuracy fell from 80.0 % (iteration 1,000) to 40.0 %", "the others have been said"


def test_weights_to_start_from_need_not_become_better() -> None:
    """Frozen they cannot, and good ones may be as good as they get; to fall or to be worse than pixels is another."""
    scores = scores_of(0.8, 0.8, 0.805)
    assert signs_of_decline(scores, 1000) and news_of_decline(scores[:2], 1000)
    assert signs_of_decline(scores, 1000, from_weights=True) == news_of_decline(scores, 1000, from_weights=True) == []
    assert "fell" in signs_of_decline(scores_of(0.8, 0.7), 1000, from_weights=True)[0]
    assert "raw pixels" in signs_of_decline(scores, 1000, 0.9, from_weights=True)[0]
