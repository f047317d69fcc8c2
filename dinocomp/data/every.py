"""All images of a place, one after the other, with their names. Nothing is converted where that can be helped."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from dinocomp.data.address import parse
from dinocomp.data.images import decode_rgb
from dinocomp.data.listing import DIGITS, IMAGE_ENDINGS, Item, list_images, printable
from dinocomp.data.part import read_item
from dinocomp.data.reader import BadImage, Images
from dinocomp.data.shards import open_images
from dinocomp.errors import DataError


class EveryImage:
    """`images[i]` is (name, uint8 [3, H, W], "") or, of one that cannot be decoded, (name, None, why).

    Args:
        place: a folder of images of any depth, shards with one split, a list of files, one file, or ``digits``. Tar
            files are converted, into the user's cache.

    Raises:
        DataError: it is not there, holds no images, or several splits of shards, of which one must be named.
    """

    def __init__(self, place: str | Path | Sequence[str | Path]) -> None:
        self.place = place
        self.items = self._items()  # None: shards
        if not len(self):
            raise DataError(f"no images in {place}; they end in {', '.join(sorted(IMAGE_ENDINGS))}")

    def _items(self) -> list[Item] | None:
        if not isinstance(self.place, (str, Path)):
            return [_file(path) for path in self.place]
        text = str(self.place)
        path = Path(text).expanduser()
        if text != DIGITS and path.is_file() and path.suffix.lower() in IMAGE_ENDINGS:
            return [_file(path)]
        address = parse(text)
        if address.remote or address.shards is not None:
            return None
        if text == DIGITS:
            return sorted(item for source in address.find().values() for item in source.items)
        if path.is_dir() and (entries := list_images(path)[0]):
            return [Item(key, -1, *rest) for key, *rest in entries]
        return None  # tars

    @cached_property
    def shards(self) -> Images:
        text = str(self.place)
        splits = parse(text).shards or {}
        if len(splits) > 1:
            raise DataError(f"{text} has the splits {', '.join(splits)}; give one of them, such as {text}/val")
        return open_images(text, split=next(iter(splits), "") or "train")

    def __len__(self) -> int:
        return len(self.shards if self.items is None else self.items)

    def __getitem__(self, i: int) -> tuple[str, torch.Tensor | None, str]:
        if self.items is None:
            try:
                sample, pixels = self.shards.decode(i)
            except BadImage as error:
                return self.shards.fault(i)[0], None, str(error)
            return sample.key, pixels, ""
        item = self.items[i]
        try:
            return item.key, decode_rgb(read_item(item)), ""
        except DataError as error:
            return item.key, None, str(error)


def _file(path: str | Path) -> Item:
    return Item(printable(str(path)), -1, str(Path(path).expanduser()), -1, 0, 0)
