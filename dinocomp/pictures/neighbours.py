"""Images, each beside those that the network finds most alike."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinocomp.pictures.canvas import RIGHT, WIDTH, WRONG, Tile, page, to_picture, wall


class Nearest(NamedTuple):
    """The k nearest of n images for q queries, the nearest first."""

    index: Tensor  # [q, k] int64
    similarity: Tensor  # [q, k], cosine


def nearest_images(vectors: Tensor, queries: Sequence[int], k: int) -> Nearest:
    """The nearest by cosine among all others.

    Args:
        vectors: class tokens [n, D].
        queries: which of them ask.
        k: fewer, if there are fewer others.
    """
    unit = F.normalize(vectors.float(), dim=-1)  # [n, D]
    asked = torch.as_tensor(queries)
    similarity = unit[asked] @ unit.T  # [q, n]
    similarity[torch.arange(len(asked)), asked] = -torch.inf  # oneself
    found = similarity.topk(min(k, len(unit) - 1), dim=1)
    return Nearest(found.indices, found.values)


def spread_queries(labels: Tensor, number: int) -> list[int]:
    """The first images, one of each class before any is asked a second time; without labels simply the first."""
    seen: dict[int, int] = {}
    turn = []  # how many of the same class came before
    for label in labels.tolist():
        turn.append(seen.get(label, 0) if label >= 0 else 0)
        seen[label] = seen.get(label, 0) + 1
    return sorted(range(len(turn)), key=lambda i: (turn[i], i))[:number]


def neighbours_picture(
    images: Tensor,
    vectors: Tensor,
    labels: Tensor,
    classes: Sequence[str] = (),
    *,
    queries: int = 8,
    k: int = 6,
    width: int = WIDTH,
) -> Image.Image:
    """A row a query: the query, and its k nearest with their cosines, framed by whether they are of its class.

    Args:
        images: uint8 [n, 3, H, W]; thumbnails will do.
        vectors: their class tokens [n, D]; n is at least 2.
        labels: int64 [n]; -1 where unknown, which has no frame.
        classes: names, by label.
        queries: how many rows.
    """
    asked = spread_queries(labels, queries)
    nearest = nearest_images(vectors, asked, k)
    known = [int(label) for label in labels]

    def name(i: int) -> str:
        return (classes[known[i]] if known[i] < len(classes) else str(known[i])) if known[i] >= 0 else ""

    rows, right, judged = [], 0, 0
    for query, others, cosines in zip(asked, nearest.index.tolist(), nearest.similarity.tolist(), strict=True):
        row = [Tile(to_picture(images[query]), name(query))]
        for other, cosine in zip(others, cosines, strict=True):
            both = known[query] >= 0 and known[other] >= 0
            same = known[query] == known[other]
            judged, right = judged + both, right + (both and same)
            caption = f"{cosine:.2f} {name(other)}" if both and not same else f"{cosine:.2f}"
            frame = (RIGHT if same else WRONG) if both else None
            row.append(Tile(to_picture(images[other]), caption, frame))
        rows.append(row)
    text = f"Left: an image. Right: the nearest to it of {len(images):,} images, with their cosines."
    if judged:
        text += f" Green: of its class ({right / judged:.0%}). Orange: of another, named below it."
    return page("Nearest neighbours", text, wall(rows, [20] + [5] * (max(nearest.index.shape[1], 3) - 1), width=width))
