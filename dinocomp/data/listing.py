"""What a source of images is made of: classes, items, and listing the images of a folder."""

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dinocomp.errors import DataError

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jfif"})
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
NO_LABEL = -1
DIGITS = "digits"

Entry = tuple[str, str, int, int, int]  # key, path, offset, size, changed: an `Item` without its label


class ClassName(NamedTuple):
    """A class: `id` as in the folders, `name` for people (the id where nothing better is known)."""

    id: str
    name: str


class Item(NamedTuple):
    """One image to convert.

    Attributes:
        key: what the image is called from here on, unique in its split: a path with "/" for separator.
        label: index into the source's classes, or -1.
        path: the file that holds the bytes; `digits` for those.
        offset: where the image begins in `path`; -1: the whole file is the image; for `digits` the sample's number.
        size: bytes.
        changed: the file's time of change in ns, so that a changed file is noticed.
    """

    key: str
    label: int
    path: str
    offset: int
    size: int
    changed: int


@dataclass(frozen=True)
class Source:
    """One split of what is to be converted.

    Attributes:
        kind: what it was taken for, in words.
        skipped: files that were left aside because they are no images, or hidden.
        notes: what the user should know about how the source was read.
    """

    split: str
    kind: str
    origin: str
    items: list[Item]
    classes: tuple[ClassName, ...] = ()
    skipped: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def labelled(self) -> bool:
        return bool(self.classes)


def list_images(root: Path) -> tuple[list[Entry], int]:
    """All images below a folder as (key, path, offset, size, changed), sorted by key, and the number of other files.

    Links to folders are followed, except back into a folder they lie in. Hidden files and folders are left aside.
    """
    files, skipped = [], 0
    for entry, key in _walk(root, "", frozenset({os.path.realpath(root)})):
        if os.path.splitext(entry.name)[1].lower() in IMAGE_ENDINGS and not entry.name.startswith("."):
            try:
                state = entry.stat()
                size, changed = state.st_size, state.st_mtime_ns
            except OSError:  # a dangling link: the conversion reports it as unreadable
                size, changed = 0, 0
            files.append((printable(key), entry.path, -1, size, changed))
        else:
            skipped += 1
    return sorted(files), skipped


def printable(key: str) -> str:
    """A name that can be stored as UTF-8: bytes of a file name that are not text are written as backslash codes."""
    return key.encode("utf-8", "backslashreplace").decode()


def _walk(folder: str | Path, prefix: str, above: frozenset[str]) -> Iterator[tuple[os.DirEntry[str], str]]:
    try:
        with os.scandir(folder) as entries:
            listed = list(entries)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed: {error.strerror}; check its permissions") from None
    for entry in listed:
        if not entry.is_dir():
            yield entry, prefix + entry.name
        elif not entry.name.startswith("."):
            inside = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
            if inside not in above:
                yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {os.path.realpath(inside)})


def read_labels(path: Path, ids: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Class names of a `class_id,class_name` file (none if it is missing), and notes on ids without a name."""
    if not path.is_file():
        return {}, ()
    names: dict[str, str] = {}
    with open(path, newline="", encoding="utf-8") as lines:
        for number, row in enumerate(csv.reader(lines, skipinitialspace=True), 1):
            if not row or not "".join(row).strip():
                continue
            if len(row) < 2:
                raise DataError(f"{path}, line {number}: found {','.join(row)!r}, expected `class_id,class_name`")
            names[row[0].strip()] = ",".join(row[1:]).strip()
    known = set(ids)
    missing, unused = sorted(known - names.keys()), sorted(names.keys() - known)
    notes = []
    if missing:
        notes.append(f"{path.name} names no class for {len(missing)} of {len(known)} folders: {some(missing)}")
    if unused:
        notes.append(f"{path.name} names {len(unused)} classes that have no images: {some(unused)}")
    return names, tuple(notes)


def make_items(files: Iterable[Entry], classes: tuple[ClassName, ...]) -> list[Item]:
    """Items whose labels are the places of their first folder among the classes; without classes, no labels."""
    index = {entry.id: label for label, entry in enumerate(classes)}
    return [Item(key, index.get(key.partition("/")[0], NO_LABEL) if index else NO_LABEL, *rest) for key, *rest in files]


def some(values: list[str]) -> str:
    """The first few, for a message."""
    return ", ".join(values[:5]) + (", …" if len(values) > 5 else "")
