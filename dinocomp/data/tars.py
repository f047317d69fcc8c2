"""Images inside tar files."""

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from dinocomp.data.listing import IMAGE_ENDINGS, SPLIT_FOLDERS, ClassName, Source, make_items, printable
from dinocomp.errors import DataError

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")


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
            if members and all(key.partition("/")[0] in SPLIT_FOLDERS and "/" in key for key, *_ in members):
                raise DataError(
                    f"{path} holds whole splits (train/, val/, ...), which would become its classes; unpack it and "
                    "give the folder, or make one tar of each (train.tar, val.tar)"
                )
            prefix = "" if len(paths) == 1 or _all_splits(tars) else tar_stem(path) + "/"
            found += [(prefix + key, str(path), *rest) for key, *rest in members]
            skipped += others
        folders = sorted({key.partition("/")[0] if "/" in key else "" for key, *_ in found})
        classes = tuple(ClassName(n, n) for n in folders) if len(folders) > 1 and "" not in folders else ()
        sources[split] = Source(split, "tar files", str(origin), make_items(found, classes), classes, skipped)
    every = sorted({c for source in sources.values() for c in source.classes})
    if len(sources) > 1 and every:  # one numbering for all splits
        sources = {s: _relabel(source, tuple(every)) for s, source in sources.items()}
    return sources


def list_tar(path: Path) -> tuple[list[tuple[str, int, int, int]], int]:
    """Images of a tar as (key, offset, size, changed) and the number of other files; offsets are uncompressed ones."""
    members, skipped = [], 0
    with _opened(path) as tar:
        changed = path.stat().st_mtime_ns
        for member in tar:
            if key := _image_key(member):
                members.append((printable(key), member.offset_data, member.size, changed))
            elif not member.isdir():
                skipped += 1
    return members, skipped


def first_images(path: Path, number: int) -> list[bytes]:
    """The first image files of a tar, compressed or not, as they are."""
    with _opened(path) as tar:
        return [tar.extractfile(member).read() for member in islice(filter(_image_key, tar), number)]


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """Raises DataError: it cannot be read, when it is opened or later."""
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = str(error).partition(":\n")[0]  # of each way of unpacking that was tried, tarfile adds a line
        raise DataError(f"the tar file {path} cannot be read: {reason}; copy or download it again") from None


def _image_key(member: tarfile.TarInfo) -> str:
    """The name of an image in a tar; nothing of other files, and of hidden ones."""
    key = member.name.removeprefix("./")
    hidden = any(part.startswith(".") for part in key.split("/"))
    return key if member.isfile() and not hidden and os.path.splitext(key)[1].lower() in IMAGE_ENDINGS else ""


def tar_stem(path: Path) -> str:
    """The name of a tar file without its ending."""
    ending = next(ending for ending in sorted(TAR_ENDINGS, key=len, reverse=True) if path.name.lower().endswith(ending))
    return path.name[: -len(ending)]


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
