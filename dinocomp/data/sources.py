"""What can be converted: finds images, labels and class names. Everything is counted, no length is written down.

A `Source` is one split: a list of items (where the bytes lie, label, key) and the names of its classes.
"""

import csv
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinocomp.errors import DataError

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jfif"})
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
NO_LABEL = -1
DIGITS = "digits"
_DIGITS_TRAIN = 0.8  # the rest is `val`


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


def find_sources(src: str | Path, extra: str | Path | None = None) -> dict[str, Source]:
    """Find out what `src` is and list its splits.

    In this order: `digits`; a tar file; the reference's metadata (`extra`, or `SRC/extra`, with `entries-TRAIN.npy`,
    images in SRC or SRC/root); a folder with `train` (and `val`, `test`) in it; a folder of tar files; a folder of
    images.

    Raises:
        DataError: nothing there, or no images in it.
    """
    if str(src) == DIGITS:
        return digits_sources()
    root = Path(src).expanduser()
    if not root.exists():
        raise DataError(f"{root} does not exist; give a folder of images, a .tar file, or `digits`")
    if root.is_file():
        if not root.name.lower().endswith(TAR_ENDINGS):
            raise DataError(f"{root} is a file, but not a tar file ({', '.join(TAR_ENDINGS)}); give a folder of images")
        sources = tar_sources([root], root)
    elif (metadata := Path(extra) if extra else root / "extra").is_dir() and any(metadata.glob("entries-*.npy")):
        from dinocomp.data.metadata import metadata_sources

        sources = metadata_sources(root / "root" if not extra and (root / "root").is_dir() else root, metadata)
    elif (root / "train").is_dir():
        sources = layout_sources(root)
    else:
        tars = sorted(path for path in root.iterdir() if path.name.lower().endswith(TAR_ENDINGS) and path.is_file())
        folder = folder_source(root)
        sources = tar_sources(tars, root) if tars and not folder.items else {"train": folder}
    for source in sources.values():
        _check(source)
    return sources


def folder_source(root: Path, split: str = "train") -> Source:
    """A folder of images at any depth.

    The first folder level gives the labels if every image lies in such a folder and there are at least two of them;
    else there are no labels.
    """
    files, skipped = list_images(root)
    folders = sorted({key.partition("/")[0] if "/" in key else "" for key, *_ in files})
    labelled = len(folders) > 1 and "" not in folders
    classes = tuple(ClassName(name, name) for name in folders) if labelled else ()
    items = _items(files, classes)
    return Source(split, "folder of images", str(root), items, classes, skipped)


def layout_sources(root: Path) -> dict[str, Source]:
    """ImageNet's layout: root/{train,val,test}/CLASS/files, and optionally root/labels.txt with `class_id,class_name`.

    A label is the class id's place among the sorted ids of all splits. A split with images outside class folders has
    no labels.
    """
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and path.name in SPLIT_FOLDERS}
    listed = {}
    for name, path in folders.items():
        split = SPLIT_FOLDERS[name]
        if split in listed:
            raise DataError(f"{root} has more than one folder for the split `{split}` ({', '.join(folders)}); keep one")
        listed[split] = (path, *list_images(path))
    # A test set often has no labels: it must not take them from the other splits.
    labelled = {split: bool(files) and all("/" in key for key, *_ in files) for split, (_, files, _) in listed.items()}
    ids = sorted({key.partition("/")[0] for s, (_, files, _) in listed.items() if labelled[s] for key, *_ in files})
    if len(ids) < 2:
        ids, labelled = [], dict.fromkeys(listed, False)
    names, notes = read_labels(root / "labels.txt", ids)
    classes = tuple(ClassName(i, names.get(i, i)) for i in ids)
    others = sorted(p.name for p in root.iterdir() if p.is_dir() and p not in folders.values() and p.name[0] != ".")
    if others:
        notes += (f"folders beside the splits were not read: {', '.join(others)}",)
    sources = {}
    for split, (path, files, skipped) in listed.items():
        own = classes if labelled[split] else ()
        sources[split] = Source(split, "ImageNet layout", str(path), _items(files, own), own, skipped, notes)
    return {split: source for split, source in sources.items() if source.items or split == "train"}


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
        notes.append(f"{path.name} names no class for {len(missing)} of {len(known)} folders: {_some(missing)}")
    if unused:
        notes.append(f"{path.name} names {len(unused)} classes that have no images: {_some(unused)}")
    return names, tuple(notes)


def tar_sources(tars: list[Path], origin: Path) -> dict[str, Source]:
    """Images inside tar files. Labels: the tar's name if there are several, else the first folder level inside.

    Tars whose names begin with a split's name (`val.tar`, `train-00.tar`) are that split; other tars are `train`.
    """
    by_split: dict[str, list[Path]] = {}
    for path in tars:
        by_split.setdefault(_split_of(path) if _all_splits(tars) else "train", []).append(path)
    sources = {}
    for split, paths in by_split.items():
        found, skipped = [], 0
        for path in paths:
            members, others = list_tar(path)
            prefix = "" if len(paths) == 1 or _all_splits(tars) else tar_stem(path) + "/"
            found += [(prefix + key, str(path), *rest) for key, *rest in members]
            skipped += others
        folders = sorted({key.partition("/")[0] if "/" in key else "" for key, *_ in found})
        classes = tuple(ClassName(n, n) for n in folders) if len(folders) > 1 and "" not in folders else ()
        sources[split] = Source(split, "tar files", str(origin), _items(found, classes), classes, skipped)
    every = sorted({c for source in sources.values() for c in source.classes})
    if len(sources) > 1 and every:  # one numbering for all splits
        sources = {s: _relabel(source, tuple(every)) for s, source in sources.items()}
    return sources


def digits_sources() -> dict[str, Source]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey, in the package's own order: first 80 % train, rest val.

    The order follows the writers, so that most of `val` is by hands that `train` has not seen.
    """
    from sklearn.datasets import load_digits

    labels = load_digits().target
    classes = tuple(ClassName(str(n), str(n)) for n in range(int(labels.max()) + 1))
    items = [Item(f"{i:04d}.png", int(label), DIGITS, i, 0, 0) for i, label in enumerate(labels)]
    cut = int(len(items) * _DIGITS_TRAIN)
    parts = {"train": items[:cut], "val": items[cut:]}
    return {split: Source(split, "scikit-learn digits", DIGITS, part, classes) for split, part in parts.items()}


def list_images(root: Path) -> tuple[list[tuple[str, str, int, int, int]], int]:
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
            files.append((key, entry.path, -1, size, changed))
        else:
            skipped += 1
    return sorted(files), skipped


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


def list_tar(path: Path) -> tuple[list[tuple[str, int, int, int]], int]:
    """Images of a tar as (key, offset, size, changed) and the number of other files; offsets are uncompressed ones."""
    members, skipped = [], 0
    try:
        changed = path.stat().st_mtime_ns
        with tarfile.open(path) as tar:
            for member in tar:
                key = member.name.removeprefix("./")
                hidden = any(part.startswith(".") for part in key.split("/"))
                if member.isfile() and not hidden and os.path.splitext(key)[1].lower() in IMAGE_ENDINGS:
                    members.append((key, member.offset_data, member.size, changed))
                elif not member.isdir():
                    skipped += 1
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"the tar file {path} cannot be read: {error}; copy or download it again") from None
    return members, skipped


def tar_stem(path: Path) -> str:
    """The name of a tar file without its ending."""
    ending = next(ending for ending in sorted(TAR_ENDINGS, key=len, reverse=True) if path.name.lower().endswith(ending))
    return path.name[: -len(ending)]


def hold_out(source: Source, fraction: float, seed: int = 0) -> dict[str, Source]:
    """Split off a random `val` with this fraction of every class (of all images where there are no labels)."""
    if not 0.0 < fraction < 1.0:
        raise DataError(f"--val-fraction is {fraction}; it must lie between 0 and 1, e.g. 0.1")
    rng = np.random.default_rng(seed)
    labels = np.array([item.label for item in source.items])  # [items]
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: round(fraction * len(members))]] = True
    if not held.any() or held.all():
        raise DataError(f"--val-fraction {fraction} of {len(labels)} images leaves one split empty; choose another")
    pick = {"train": ~held, "val": held}
    return {
        split: replace(source, split=split, items=[source.items[i] for i in np.flatnonzero(chosen)])
        for split, chosen in pick.items()
    }


def _items(files: Iterable[tuple[str, str, int, int, int]], classes: tuple[ClassName, ...]) -> list[Item]:
    index = {entry.id: label for label, entry in enumerate(classes)}
    return [Item(key, index.get(key.partition("/")[0], NO_LABEL) if index else NO_LABEL, *rest) for key, *rest in files]


def _relabel(source: Source, classes: tuple[ClassName, ...]) -> Source:
    index = {entry.id: label for label, entry in enumerate(classes)}
    new = [index[entry.id] for entry in source.classes]
    items = [item._replace(label=new[item.label]) for item in source.items] if new else source.items
    return replace(source, items=items, classes=classes if new else ())


def _split_of(path: Path) -> str | None:
    word = tar_stem(path).lower().replace("_", "-").partition("-")[0]
    return SPLIT_FOLDERS.get(word)


def _all_splits(tars: list[Path]) -> bool:
    return "train" in (found := [_split_of(path) for path in tars]) and None not in found


def _check(source: Source) -> None:
    if not source.items:
        endings = " ".join(sorted(IMAGE_ENDINGS))
        raise DataError(
            f"no images found in {source.origin} (files of other kinds: {source.skipped}); "
            f"images end in {endings}, at any depth below the folder, or lie in tar files"
        )
    twice = [key for key, count in Counter(item.key for item in source.items).items() if count > 1]
    if twice:
        raise DataError(f"{source.origin} holds {len(twice)} names twice, e.g. {twice[0]!r}; rename or remove them")


def _some(values: list[str]) -> str:
    return ", ".join(values[:5]) + (", …" if len(values) > 5 else "")
