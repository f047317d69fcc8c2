"""Weighted k-nearest-neighbour classification of frozen features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dinocomp.distributed import all_reduce
from dinocomp.evaluate.features import Features


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
        chunk: queries at a time; `chunk` x training images numbers are in memory at once.

    Returns:
        k -> share of `val` classified right, in [0, 1].
    """
    train, val = _kept(train), _kept(val)
    keys = F.normalize(train.vectors.to(device).float(), dim=-1)  # [n, D]
    key_labels = train.labels.to(device)  # [n]
    num_classes = int(train.labels.max()) + 1
    largest = min(max(ks), len(keys))
    counts = torch.zeros(len(ks) + 1, dtype=torch.float64, device=device)  # right for each k, and the queries
    for vectors, labels in zip(val.vectors.split(chunk), val.labels.split(chunk), strict=True):
        query = F.normalize(vectors.to(device).float(), dim=-1)  # [c, D]
        similarity, index = (query @ keys.T).topk(largest)  # [c, k], [c, k]
        votes = F.softmax(similarity / temperature, dim=1)  # [c, k]
        neighbours = key_labels[index]  # [c, k]
        for i, k in enumerate(ks):
            score = votes.new_zeros(len(query), num_classes)  # [c, classes]
            score.scatter_add_(1, neighbours[:, :k], votes[:, :k])
            counts[i] += (score.argmax(dim=1) == labels.to(device)).sum()
        counts[-1] += len(query)
    *right, total = all_reduce(counts).tolist()
    return {k: count / total for k, count in zip(ks, right, strict=True)}


def _kept(features: Features) -> Features:
    kept = features.labels >= 0
    return Features(features.vectors[kept], features.labels[kept])
