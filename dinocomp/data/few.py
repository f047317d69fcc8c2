"""A few images to look at, wherever they are: nothing is converted for that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dinocomp.data.address import parse
from dinocomp.data.images import decode_rgb
from dinocomp.data.listing import DIGITS, IMAGE_ENDINGS, NO_LABEL
from dinocomp.data.part import read_item
from dinocomp.data.reader import Images
from dinocomp.data.shards import open_images
from dinocomp.errors import DataError

_HELD_OUT = ("val", "train", "test", "")  # of splits, the first that is there


@dataclass
class Few:
    """Chosen images, decoded.

    Attributes:
        pixels: uint8 [3, H, W] each.
        labels: index into `classes`, or -1.
        classes: names.
        bad: what is wrong with those that were left out.
    """

    pixels: list[torch.Tensor] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Group:
    """Images of one place: how many, how to get one, its class's name."""

    size: int
    get: Callable[[int], tuple[torch.Tensor, str]]
    alone: bool = False  # a file that was named itself


def choose_images(places: Sequence[str | Images], number: int, seed: int = 0) -> Few:
    """At most `number` images of some places: image files, or what `open_images` opens. Folders of images are read as
    they are; of splits `val` is taken, where there is one.

    Where there are more images, it is a draw by a generator of its own; files that are named come first and are not
    drawn. Images that cannot be decoded are left out, but not files that are named. Tar files are converted after all,
    into the user's cache.

    Raises:
        DataError: a place is not there or holds no images, or none of the images can be decoded.
    """
    groups = [_group_of(place) for place in places]
    named = [(group, 0) for group in groups if group.alone][:number]
    others = [(group, i) for group in groups if not group.alone for i in range(group.size)]
    left = min(number - len(named), len(others))
    drawn = np.random.default_rng(seed).choice(len(others), left, replace=False) if left else []
    few = Few()
    for group, i in [*named, *(others[j] for j in drawn)]:
        try:
            pixels, name = group.get(i)
        except DataError as error:
            if group.alone:
                raise
            few.bad.append(str(error))
            continue
        if name and name not in few.classes:
            few.classes.append(name)
        few.pixels.append(pixels)
        few.labels.append(few.classes.index(name) if name else NO_LABEL)
    if not few.pixels:
        raise DataError(f"none of the images can be decoded: {few.bad[0]}" if few.bad else "there are no images")
    order = {name: i for i, name in enumerate(sorted(few.classes))}
    few.labels = [order[few.classes[label]] if label >= 0 else label for label in few.labels]
    few.classes = sorted(few.classes)
    return few


def _group_of(place: str | Images) -> _Group:
    if isinstance(place, Images):
        return _of_shards(place)
    path = Path(place).expanduser()
    if place != DIGITS and path.is_file() and path.suffix.lower() in IMAGE_ENDINGS:
        return _Group(1, lambda _: (_decoded(path), ""), alone=True)
    address = parse(place, "val")
    if address.shards is not None:
        split = next(name for name in _HELD_OUT if name in address.shards)
        return _of_shards(open_images(place, split=split or "train"))
    if address.remote:
        try:
            return _of_shards(open_images(place, split="val"))
        except DataError:
            return _of_shards(open_images(place, split="train"))
    sources = address.find()
    source = sources[address.split if address.split in sources else next(n for n in _HELD_OUT if n in sources)]
    if any(item.path != DIGITS and item.offset >= 0 for item in source.items):  # in tars, which may be compressed
        return _of_shards(open_images(place, split=source.split))

    def get(i: int) -> tuple[torch.Tensor, str]:
        item = source.items[i]
        try:
            pixels = decode_rgb(read_item(item))
        except DataError as error:
            raise DataError(f"{item.key}: {error}") from error
        return pixels, source.classes[item.label].name if item.label >= 0 else ""

    return _Group(len(source.items), get)


def _of_shards(images: Images) -> _Group:
    def get(i: int) -> tuple[torch.Tensor, str]:
        sample, pixels = images.decode(i)
        known = sample.label >= 0
        named = known and sample.label < len(images.classes)
        return pixels, images.classes[sample.label].name if named else str(sample.label) if known else ""

    return _Group(len(images), get)


def _decoded(path: Path) -> torch.Tensor:
    try:
        return decode_rgb(path.read_bytes())
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
