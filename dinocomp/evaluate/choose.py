"""Which images: a draw of them, a part held out, a few of each class; and labels that mean the same in two sets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinocomp.data import Images, Sample
from dinocomp.data.listing import NO_LABEL, ClassName, some
from dinocomp.errors import DataError

_HELD_OUT, _FEW = 302, 303  # streams of random numbers


class Chosen:
    """Some of the images, in a given order, with labels of another numbering; otherwise like `Images`.

    Args:
        index: numbers of the images; None for all.
        labels: new label of each old one; None for the old ones.
        classes: by new label; None for those of the images.
    """

    def __init__(
        self,
        images: Images,
        index: Sequence[int] | None = None,
        labels: Sequence[int] | None = None,
        classes: Sequence[ClassName] | None = None,
    ) -> None:
        self.images = images
        self.index = range(len(images)) if index is None else index
        self.labels = labels
        self.path, self.labelled = images.path, images.labelled
        self.classes = images.classes if classes is None else classes

    def __len__(self) -> int:
        return len(self.index)

    def decode(self, i: int) -> tuple[Sample, Tensor]:
        """Sample and pixels, uint8 [3, H, W]."""
        sample, pixels = self.images.decode(self.index[i])
        if self.labels is not None and sample.label != NO_LABEL:
            sample = sample._replace(label=self.labels[sample.label])
        return sample, pixels

    def fault(self, i: int) -> tuple[str, str]:
        return self.images.fault(self.index[i])


def draw(total: int, count: int) -> list[int]:
    """`count` of `total` numbers, rising, drawn by a fixed seed; all of them where `count` is 0 or too many."""
    if not 0 < count < total:
        return list(range(total))
    return sorted(np.random.default_rng(0).permutation(total)[:count].tolist())


def hold_out(labels: Tensor, fraction: float, seed: int = 0) -> Tensor:
    """Which images to hold out: `fraction` of each class, at least one of those that have two (none for 0): bool [n].

    Images without a label (-1) are not among them.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)  # [n]
    rng = _generator(seed, _HELD_OUT)
    for label in labels.unique().tolist():
        if label == NO_LABEL or not fraction:
            continue
        places = (labels == label).nonzero().flatten()  # [images of the class]
        number = min(max(1, round(fraction * len(places))), len(places) - 1)
        held[places[torch.from_numpy(rng.permutation(len(places))[:number])]] = True
    return held


def few_of_each(labels: Tensor, number: int, seed: int) -> Tensor:
    """Numbers of `number` images of each class (of all of them, where a class has fewer): int64 [m], sorted."""
    rng, found = _generator(seed, _FEW), []
    for label in labels.unique().tolist():
        if label != NO_LABEL:
            places = (labels == label).nonzero().flatten()
            found.append(places[torch.from_numpy(rng.permutation(len(places))[:number])])
    return torch.cat(found).sort().values


def match_classes(train: Any, val: Any) -> list[int] | None:
    """The label in `train` of each label of `val`, for two sets that number their classes each in its own way.

    Classes are the same where their ids (the folders' names) are.

    Args:
        train, val: `Images`, or what has their `classes` and `path`.

    Returns:
        None where the numbers agree already, or the classes of one of them have no names.

    Raises:
        DataError: `val` has classes that `train` has not.
    """
    ids = [entry.id for entry in train.classes]
    wanted = [entry.id for entry in val.classes]
    if not ids or not wanted or ids == wanted:
        return None
    place = {name: label for label, name in enumerate(ids)}
    if missing := [name for name in wanted if name not in place]:
        raise DataError(
            f"{len(missing)} of the {len(wanted)} classes of {val.path} are not in {train.path}: {some(missing)}. "
            f"Its {len(ids)} classes are {some(ids)}: give two sets with the same class folders"
        )
    return [place[name] for name in wanted]


def check_labels(train: Tensor, val: Tensor, names: Sequence[str], where: str, *, drawn: bool = False) -> None:
    """Refuses labels that nothing can be learnt or measured with.

    Args:
        train, val: [n], [m] int64.
        names: of the classes, by label; may be empty.
        where: the place of the training images, for the message.
        drawn: whether `train` is a draw of more images, which may have missed a class: those then count as wrong.

    Raises:
        DataError: one class only, or classes of `val` that no image of `train` has.
    """
    known, asked = ({label for label in part.unique().tolist() if label != NO_LABEL} for part in (train, val))
    if len(known) < 2:
        raise DataError(
            f"{where} has {len(known)} class(es); telling classes apart needs at least two: give a folder with class "
            "folders"
        )
    missing = sorted(asked - known)
    if missing and not drawn:
        named = some([names[label] if label < len(names) else str(label) for label in missing])
        raise DataError(f"no image of {where} is of these classes, which are asked for: {named}")


def check_held_out(labels: Tensor, fraction: float, where: str, protocol: str, instead: str) -> None:
    """Refuses training images of which none can be held out to choose on.

    Args:
        labels, fraction: see `hold_out`.
        where, protocol, instead: the images' place, who is to choose, and what else can be done, for the message.

    Raises:
        DataError: no class has two images.
    """
    if not hold_out(labels, fraction).any():
        raise DataError(
            f"{protocol}: {where} has one image of each class, so that none can be held out to choose on; give more "
            f"images of each class, or {instead}"
        )


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox((seed, stream)))
