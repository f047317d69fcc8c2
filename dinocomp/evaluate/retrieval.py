"""Image retrieval: does a query's ranking of all images begin with those of its class?"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from composer.utils import dist
from torch import Tensor

from dinocomp.errors import DataError
from dinocomp.evaluate.features import Features
from dinocomp.evaluate.share import gather_rows

_AT_ONCE = 1 << 24  # similarities that are sorted at once


def retrieval(
    index: Features,
    queries: Features | None = None,
    *,
    at: Sequence[int] = (1, 5),
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda count: None,
) -> dict:
    """Mean average precision, and how often one of the first k is of the query's class, by cosine.

    Ranks share the queries. A query without any image of its class to find is left out, and counted. Memory is bounded
    for any number of queries and of images.

    Args:
        index: images that are searched; those with the label -1 are left out.
        queries: None for leave-one-out: each image of `index` searches all the others.

        advance: told of the queries of this rank that are done.

    Returns:
        ``{"map": mean, "recall": {k: share}, "queries": number, "left_out": number, "leave_one_out": bool}``
    """
    leave_one_out = queries is None
    kept = index.labels >= 0
    index = Features(index.vectors[kept], index.labels[kept])
    queries = index if queries is None else Features(*(field[queries.labels >= 0] for field in queries))
    keys = F.normalize(index.vectors.to(device).float(), dim=-1)  # [n, D]
    key_labels = index.labels.to(device)  # [n]
    mine = torch.arange(dist.get_global_rank(), len(queries.labels), dist.get_world_size())  # [m]
    rows = [torch.zeros(0, 2 + len(at), dtype=torch.float64, device=device)]
    for part in mine.split(max(1, _AT_ONCE // len(keys))):
        query = F.normalize(queries.vectors[part].to(device).float(), dim=-1)  # [c, D]
        similarity = query @ keys.T  # [c, n]
        relevant = queries.labels[part].to(device)[:, None] == key_labels  # [c, n]
        if leave_one_out:
            itself = part.to(device)[:, None]
            similarity.scatter_(1, itself, -torch.inf)  # behind all others, where it changes nothing
            relevant.scatter_(1, itself, False)
        rows.append(_measure(similarity, relevant, at))
        advance(len(part))
    measured = gather_rows(torch.cat(rows), len(queries.labels))  # [queries, 2 + k]
    counted = measured[measured[:, 0] > 0]
    if not len(counted):
        raise ValueError("no query has an image of its class to find")
    _, precision, *recall = counted.mean(dim=0).tolist()
    return {
        "map": precision,
        "recall": {str(k): share for k, share in zip(at, recall, strict=True)},
        "queries": len(counted),
        "left_out": len(measured) - len(counted),
        "leave_one_out": leave_one_out,
    }


def check_queries(index: Tensor, queries: Tensor | None, where: str) -> None:
    """Refuses images of which none has another one of its class to find.

    Args:
        index, queries: labels, int64 [n], [m]; see `retrieval`.
        where: the place of the images that are searched, for the message.

    Raises:
        DataError: there is no such query.
    """
    labels, counts = index[index >= 0].unique(return_counts=True)
    if queries is None and not (counts > 1).any():
        raise DataError(
            f"retrieval: {where} has one image of each class, which has none to find; give more images of each class, "
            "or --val PATH with images that are to find these"
        )
    if queries is not None and not torch.isin(queries, labels).any():
        raise DataError(
            f"retrieval: no image of val has one of its class to find in {where}; give more with --limit-train"
        )


def average_precision(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Sum over thresholds of (gain of recall) x precision, of each query, as scikit-learn's average_precision_score.

    Images that are equally similar are found at the same threshold, so their order does not matter.

    Args:
        similarity: fp [c, n].
        relevant: bool [c, n].

    Returns:
        fp64 [c], NaN where nothing is relevant.
    """
    return _measure(similarity, relevant, ())[:, 1]


def _measure(similarity: Tensor, relevant: Tensor, at: Sequence[int]) -> Tensor:
    """[c, n] twice -> fp64 [c, 2 + k]: relevant images, average precision, and whether one is among the first k."""
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)  # [c, n]
    relevant = relevant.gather(1, order)  # [c, n]
    found = relevant.cumsum(dim=1)  # [c, n]
    places = torch.arange(similarity.shape[1], device=similarity.device).expand_as(similarity)  # [c, n]
    tied = F.pad(similarity[:, :-1] == similarity[:, 1:], (0, 1))  # [c, n], with the next one
    last = (
        places.masked_fill(tied, similarity.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    )  # of those equally similar
    precision = found.gather(1, last).double() / (last + 1)  # [c, n]
    total = found[:, -1]  # [c]
    average = (precision * relevant).sum(dim=1) / total
    return torch.stack([total.double(), average, *(relevant[:, :k].any(dim=1).double() for k in at)], dim=1)
