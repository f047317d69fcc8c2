"""Weighted k-nearest-neighbour classification of frozen features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dinocomp.evaluate.features import Features


def knn_accuracy(
    train: Features, val: Features, *, ks: Sequence[int], temperature: float = 0.07, chunk: int = 1024
) -> dict[int, float]:
    """Top-1 accuracy of the vote of the k nearest training images (Wu et al. 2018; Caron et al. 2021, section 4.1).

    Neighbours are found by cosine; a neighbour's vote is softmax(cosine / temperature) over the largest k, so that the
    votes of a smaller k are the first of a larger one.

    Args:
        train, val: features and labels; every label of `val` should occur in `train`.
        ks: how many neighbours vote. A k beyond the training images counts all of them.
        chunk: queries at a time.

    Returns:
        k -> share of `val` classified right, in [0, 1].
    """
    keys = F.normalize(train.vectors.float(), dim=-1)  # [n, D]
    queries = F.normalize(val.vectors.float(), dim=-1)  # [m, D]
    num_classes = int(torch.cat([train.labels, val.labels]).max()) + 1
    largest = min(max(ks), len(keys))
    right = dict.fromkeys(ks, 0)
    for query, label in zip(queries.split(chunk), val.labels.split(chunk), strict=True):
        similarity, index = (query @ keys.T).topk(largest)  # [c, k], [c, k]
        votes = F.softmax(similarity / temperature, dim=1)  # [c, k]
        neighbours = train.labels[index]  # [c, k]
        for k in ks:
            score = votes.new_zeros(len(query), num_classes)
            score.scatter_add_(1, neighbours[:, :k], votes[:, :k])
            right[k] += int((score.argmax(dim=1) == label).sum())
    return {k: count / len(val.labels) for k, count in right.items()}
