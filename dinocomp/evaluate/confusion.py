"""Which classes are taken for which others."""

from collections.abc import Sequence

import torch
from torch import Tensor


def confusion_matrix(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """How many images of class i were taken for class j: int64 [classes, classes]. Those with the label -1 are not."""
    known = labels >= 0
    pairs = labels[known] * num_classes + predicted[known]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def worst_classes(matrix: Tensor, names: Sequence[str], number: int = 10, others: int = 3) -> list[dict]:
    """The `number` classes with the lowest recall that are not perfect, and what they are taken for.

    Returns:
        ``[{"class", "images", "recall", "taken_for": [{"class", "images", "share"}]}]``, the worst first; among equal
        ones the larger class.
    """
    images = matrix.sum(dim=1)  # [classes]
    right = matrix.diagonal()  # [classes]
    rows = []
    for i in range(len(matrix)):
        if not images[i] or right[i] == images[i]:
            continue
        wrong = matrix[i].clone()
        wrong[i] = 0
        order = wrong.sort(descending=True, stable=True).indices[:others].tolist()
        total = int(images[i])
        rows.append(
            {
                "class": names[i],
                "images": total,
                "recall": int(right[i]) / total,
                "taken_for": [
                    {"class": names[j], "images": int(wrong[j]), "share": int(wrong[j]) / total}
                    for j in order
                    if wrong[j]
                ],
            }
        )
    return sorted(rows, key=lambda row: (row["recall"], -row["images"]))[:number]


def to_csv(matrix: Tensor, names: Sequence[str]) -> str:
    """The entries above 0 as lines of `class,taken_for,images`, with a header."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("class", "taken_for", "images"))
    for i, j in matrix.nonzero().tolist():
        writer.writerow((names[i], names[j], int(matrix[i, j])))
    return text.getvalue()


def intersection_over_union(matrix: Tensor) -> Tensor:
    """IoU of each class from a confusion matrix: fp64 [classes], NaN for one that neither is there nor is predicted."""
    right = matrix.diagonal().double()
    return right / (matrix.sum(dim=0) + matrix.sum(dim=1) - matrix.diagonal())
