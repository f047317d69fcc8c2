"""What the nearest training images take an image for: whole rankings of classes, not only who is right."""

from collections.abc import Callable, Sequence

import torch
from composer.utils import dist
from torch import Tensor

from dinocomp.evaluate.choose import few_of_each
from dinocomp.evaluate.features import Features
from dinocomp.evaluate.knn import TOP, knn_top
from dinocomp.evaluate.share import gather_rows


def knn(
    train: Features,
    val: Features,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    device: torch.device | str = "cpu",
    shots: Sequence[int] = (),
    tries: int = 5,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[dict, Tensor]:
    """k-NN classification, with all training images and with few of each class.

    Ranks share the queries. Few-shot: for each number in `shots` that many images of each class vote, drawn `tries`
    times (the draw's seed is its number, as in the reference). A k beyond all that vote is left out, unless each k is.

    Args:
        train, val: whole sets, on every rank.
        advance: told of each search, of all images and of each draw.

    Returns:
        ``{"top1": {k: share}, "top5": {k: share}, "few_shot": {shots: {k: {"mean", "std", "tries"}}}}`` (few_shot where
        it is asked for), and the predictions of the first k, int64 [m].
    """
    mine = val.vectors[dist.get_global_rank() :: dist.get_world_size()]

    def top(some: Features, ks: Sequence[int] = ks) -> dict[int, Tensor]:
        own = knn_top(some, mine, ks=ks, temperature=temperature, num_classes=num_classes, device=device)
        advance(1)
        return {k: gather_rows(classes.to(device), len(val.labels)).cpu() for k, classes in own.items()}

    ranked = top(train)
    result: dict = {
        f"top{n}": {str(k): share_right(classes[:, :n], val.labels) for k, classes in ranked.items()} for n in (1, TOP)
    }
    if shots:
        result["few_shot"] = {}
    for number in shots:
        of_tries: dict[int, list[float]] = {}
        for seed in range(tries):
            index = few_of_each(train.labels, number, seed)
            few = Features(train.vectors[index], train.labels[index])
            for k, classes in top(few, fitting(ks, len(index))).items():
                of_tries.setdefault(k, []).append(share_right(classes[:, :1], val.labels))
        result["few_shot"][str(number)] = {str(k): spread(values) for k, values in of_tries.items()}
    return result, ranked[ks[0]][:, 0]


def fitting(ks: Sequence[int], voters: int) -> tuple[int, ...]:
    """Those of `ks` that are not more than the images that can vote; if each is, the number of those."""
    return tuple(k for k in ks if k <= voters) or (voters,)


def share_right(classes: Tensor, labels: Tensor) -> float:
    """Share of the labelled images [m] whose label is among their `classes` [m, n]."""
    known = labels >= 0
    return float((classes == labels[:, None]).any(dim=1)[known].double().mean())


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Mean and standard deviation (of the sample; 0 for a single one) of several tries."""
    tensor = torch.tensor(values, dtype=torch.float64)
    deviation = float(tensor.std()) if len(values) > 1 else 0.0
    return {"mean": float(tensor.mean()), "std": deviation, "tries": len(values)}
