"""When the numbers of a run mean that it goes wrong. Numbers alone: nothing slow is imported for it."""

import math
from collections.abc import Mapping, Sequence

# Where it begins: of the spread of features, of the prototypes in use, of the entropy's share of log K.
LEAST_SPREAD = 0.05
LEAST_PROTOTYPES = 1.5
MOST_ENTROPY = 0.999

A_POINT = 0.01  # of k-NN accuracy: a smaller difference is none
_ROUNDING = 1e-9  # of accuracies, which are counts over counts

Score = tuple[int, float]
"""An iteration, and the teacher's k-NN accuracy there."""


def signs_of_collapse(gauges: Mapping[str, float], prototypes: Mapping[str, int]) -> list[str]:
    """What the gauges say is wrong, in words; nothing where all is well.

    Args:
        gauges: `feature_std`, and `entropy_H` and `prototypes_H` of each loss H ("dino", "ibot") that is on.
        prototypes: K of each loss's head.
    """
    signs = []
    if gauges["feature_std"] < LEAST_SPREAD:
        signs.append(f"the teacher's features are nearly the same for all images (spread {gauges['feature_std']:.2g})")
    for loss, count in prototypes.items():
        used, entropy = gauges.get(f"prototypes_{loss}", math.nan), gauges.get(f"entropy_{loss}", math.nan)
        if used < LEAST_PROTOTYPES:
            signs.append(f"the {loss} targets use {used:.1f} of {count} prototypes")
        if entropy > MOST_ENTROPY * math.log(count):
            signs.append(f"the {loss} targets are the same for all {count} prototypes, and teach nothing")
    return signs


def signs_of_decline(
    scores: Sequence[Score], iterations: int, pixels: float | None = None, *, from_weights: bool = False
) -> list[str]:
    """What k-NN accuracies say is wrong by the last of them, in words; nothing where all is well.

    Args:
        scores: of one k, in order. That of iteration 0 is what the run started from.
        iterations: of the whole run; 0 where that is not known.
        pixels: what raw pixels reach; None where that is not known.
        from_weights: whether the run started from trained weights, which need not become better (or are frozen).
    """
    return [*_fall(scores).values(), *_no_better(scores, iterations, pixels, from_weights).values()] if scores else []


def news_of_decline(
    scores: Sequence[Score], iterations: int, pixels: float | None = None, *, from_weights: bool = False
) -> list[str]:
    """The signs of decline that an evaluation is the first to show, or a fall that has grown by another point."""
    if not scores:
        return []
    ends = range(1, len(scores))
    told = {sign for end in ends for sign in _no_better(scores[:end], iterations, pixels, from_weights)}
    new = [text for sign, text in _no_better(scores, iterations, pixels, from_weights).items() if sign not in told]
    return [*(_fall(scores).values() if _has_deepened(scores) else ()), *new]


def fell(scores: Sequence[Score]) -> bool:
    """Whether the last score is more than a point below the best."""
    return bool(scores and _fall(scores))


def _best(scores: Sequence[Score]) -> int:
    """Place of the highest score, the first of equal ones."""
    return max(range(len(scores)), key=lambda i: scores[i][1])


def _fall(scores: Sequence[Score]) -> dict[str, str]:
    (iteration, best), (_, last) = scores[_best(scores)], scores[-1]
    if best - last <= A_POINT + _ROUNDING:
        return {}
    return {"fell": f"k-NN accuracy fell from {_percent(best)} (iteration {iteration:,}) to {_percent(last)}"}


def _has_deepened(scores: Sequence[Score]) -> bool:
    """Whether the last score is a point below the last of those, from the best on, that were one below the one told."""
    place = _best(scores)
    told, deepened = scores[place][1], False
    for _, score in scores[place + 1 :]:
        deepened = told - score > A_POINT + _ROUNDING
        told = score if deepened else told
    return deepened


def _no_better(scores: Sequence[Score], iterations: int, pixels: float | None, from_weights: bool) -> dict[str, str]:
    (first, start), (iteration, last) = scores[0], scores[-1]
    found = {}
    from_start = _best(scores) == 0 and _fall(scores)  # says it, and more
    late = first == 0 and 0 < iterations <= 4 * iteration
    enough = min(A_POINT, (1 - start) / 20)  # where nearly all is right from the start, less than a point is much
    if late and last - start < enough - _ROUNDING and not from_start and not from_weights:
        found["start"] = f"k-NN accuracy of {_percent(last)} is no better than before training ({_percent(start)})"
    if pixels is not None and 0 < iterations <= 2 * iteration and pixels - last > A_POINT + _ROUNDING:
        found["pixels"] = f"k-NN accuracy of {_percent(last)} is worse than that of raw pixels ({_percent(pixels)})"
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
