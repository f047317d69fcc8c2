"""Logistic regression on class tokens, its regularisation chosen on a part of the training images held out."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from composer.utils import dist
from torch import Tensor

from dinocomp.evaluate.choose import hold_out
from dinocomp.evaluate.features import Features
from dinocomp.evaluate.neighbours import TOP, share_right


def c_grid(number: int) -> list[float]:
    """`number` values from 1e-6 to 1e5, evenly spread in their logarithm; 45 of them are the reference's."""
    return np.logspace(-6, 5, number).tolist()


def logistic_regression(
    train: Features,
    val: Features,
    *,
    c_values: Sequence[float],
    fraction: float = 0.1,
    seed: int = 0,
    max_iterations: int = 1000,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[dict, Tensor]:
    """L2-regularised multinomial logistic regression of scikit-learn, fp64, on features as they are (as the reference).

    Each C is fitted without `fraction` of the training images of every class and scored on those; the best (the
    smallest of those that are equal) is fitted to all of them and scored on `val`, once. Ranks share the values of C.

    Args:
        train, val: whole sets, on every rank.
        advance: told of each fit of this rank.

    Returns:
        ``{"top1", "top5", "C", "grid": [{"C", "held_out_top1", "converged"}], "converged"}`` and the predictions,
        int64 [m].
    """
    known = train.labels >= 0
    train = Features(train.vectors[known].double(), train.labels[known])
    held = hold_out(train.labels, fraction, seed)  # [n]
    rank, world = dist.get_global_rank(), dist.get_world_size()
    mine = []
    for number in range(rank, len(c_values), world):
        model, converged = _fit(Features(*(field[~held] for field in train)), c_values[number], max_iterations)
        right = model.predict(train.vectors[held].numpy()) == train.labels[held].numpy()
        mine.append((number, float(right.mean()), converged))
        advance(1)
    tried = sorted(entry for part in dist.all_gather_object(mine) for entry in part)
    best = max(tried, key=lambda entry: (entry[1], -entry[0]))[0]
    outcome = [None]
    if rank == 0:
        model, converged = _fit(train, c_values[best], max_iterations)
        probabilities = torch.from_numpy(model.predict_proba(val.vectors.double().numpy()))  # [m, classes]
        places = probabilities.topk(min(TOP, probabilities.shape[1]), dim=1).indices  # [m, 5]
        outcome = [(torch.from_numpy(model.classes_)[places], converged)]
    dist.broadcast_object_list(outcome, src=0)
    classes, converged = outcome[0]
    return {
        "top1": share_right(classes[:, :1], val.labels),
        "top5": share_right(classes, val.labels),
        "C": c_values[best],
        "converged": converged,
        "grid": [{"C": c_values[i], "held_out_top1": right, "converged": done} for i, right, done in tried],
    }, classes[:, 0]


def _fit(train: Features, c: float, max_iterations: int) -> tuple["LogisticRegression", bool]:  # noqa: F821
    """A fitted model, and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = LogisticRegression(C=c, max_iter=max_iterations).fit(train.vectors.numpy(), train.labels.numpy())
    return model, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
