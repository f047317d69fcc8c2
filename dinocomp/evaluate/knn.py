"""Weighted k-nearest-neighbour classification of frozen features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinocomp.distributed import all_reduce
from dinocomp.evaluate.features import Features

TOP = 5  # classes of a ranking that are kept


def knn_accuracy(
    train: Features,
    val: Features,
    *,
    ks: Sequence[int],
    temperature: float,
    device: torch.device | str = "cpu",
    chunk: int = 256,
) -> dict[int, float]:
    """Top-1 accuracy of the vote of the k nearest training images (Wu et al. 2018; Caron et al. 2021, section 4.1).

    Neighbours are found by cosine; a neighbour's vote is softmax(cosine / temperature) over the largest k, so that the
    votes of a smaller k are the first of a larger one.

    On several ranks each gives its share of `val`; what is right is counted over all of them.

    Args:
        train, val: features and labels; every label of `val` should occur in `train`. Images with the label -1 are
            left out.
        ks: how many neighbours vote. A k beyond the training images counts all of them.
        device: where to compare, and for several ranks one that the process group can add on.
        chunk: queries at a time.

    Returns:
        k -> share of `val` classified right, in [0, 1].
    """
    val = _kept(val)
    num_classes = int(train.labels.max()) + 1
    ranked = knn_top(
        train, val.vectors, ks=ks, temperature=temperature, num_classes=num_classes, device=device, chunk=chunk, top=1
    )
    right = [(ranked[k][:, 0] == val.labels).sum() for k in ks]
    counts = torch.tensor([*right, len(val.labels)], dtype=torch.float64, device=device)
    *right, total = all_reduce(counts).tolist()
    return {k: count / total for k, count in zip(ks, right, strict=True)}


def knn_top(
    train: Features,
    queries: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    device: torch.device | str = "cpu",
    chunk: int = 256,
    top: int = TOP,
) -> dict[int, Tensor]:
    """The classes with the most votes, by the rule of `knn_accuracy`.

    Args:
        train: images with the label -1 are left out.
        queries: [m, D].
        top: how many classes.

    Returns:
        k -> int64 [m, min(top, classes)], best first. Of classes with the same votes (most have none) the smaller label
        comes first.
    """
    train = _kept(train)
    similarity, index = nearest(queries, train.vectors, max(ks), device=device, chunk=chunk)  # [m, k], [m, k]
    found: dict[int, list[Tensor]] = {k: [torch.zeros(0, min(top, num_classes), dtype=torch.int64)] for k in ks}
    for close, numbers in zip(similarity.split(chunk), index.split(chunk), strict=True):
        votes = F.softmax(close / temperature, dim=1)  # [c, k]
        neighbours = train.labels[numbers]  # [c, k]
        for k in ks:
            score = votes.new_zeros(len(votes), num_classes)  # [c, classes]
            score.scatter_add_(1, neighbours[:, :k], votes[:, :k])
            # Sorting all classes of each image is most of the work where there are thousands.
            best = score.argmax(1, True) if top == 1 else score.sort(dim=1, descending=True, stable=True).indices
            found[k].append(best[:, :top])
    return {k: torch.cat(parts) for k, parts in found.items()}


@torch.no_grad()
def nearest(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    device: torch.device | str = "cpu",
    chunk: int = 256,
    key_chunk: int = 65536,
) -> tuple[Tensor, Tensor]:
    """The k keys nearest to each query by cosine, nearest first.

    Args:
        queries, keys: [m, D] and [n, D].
        k: n is taken where it is more.
        device: where to compare. Of the keys `key_chunk` are there at a time, a training run's memory being scarce.

    Returns:
        cosines [m, k] fp32, and numbers of the keys [m, k] int64; on the CPU.
    """
    k = min(k, len(keys))
    similarity = torch.full((len(queries), k), -torch.inf)  # [m, k]
    index = torch.zeros(len(queries), k, dtype=torch.int64)  # [m, k]
    for first in range(0, len(keys), key_chunk):
        part = F.normalize(keys[first : first + key_chunk].to(device).float(), dim=-1)  # [n', D]
        for start in range(0, len(queries), chunk):
            rows = slice(start, start + chunk)
            found = F.normalize(queries[rows].to(device).float(), dim=-1) @ part.T  # [c, n']
            close, numbers = found.topk(min(k, len(part)))
            close = torch.cat([similarity[rows], close.cpu()], dim=1)
            numbers = torch.cat([index[rows], numbers.cpu() + first], dim=1)
            similarity[rows], best = close.topk(k)
            index[rows] = numbers.gather(1, best)
    return similarity, index


def _kept(features: Features) -> Features:
    kept = features.labels >= 0
    if kept.all():
        return features  # not a copy: they may be gigabytes
    return Features(features.vectors[kept], features.labels[kept])
