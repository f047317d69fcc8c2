"""What `train.dataset_path` may say."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dinocomp.data.index import INDEX
from dinocomp.data.listing import DIGITS, Source
from dinocomp.data.report import MANIFEST
from dinocomp.data.sources import SPLITS, find_sources, parse_reference
from dinocomp.data.tars import TAR_ENDINGS
from dinocomp.errors import DataError
from dinocomp.hints import missing

GRAMMAR = (
    "a folder of shards, a folder with train/ and val/ shards, a remote such as s3://bucket/path, a folder of images, "
    "a .tar file, ImageNet:split=TRAIN:root=ROOT:extra=EXTRA, or digits"
)
STORES = ("s3", "gs", "oci", "azure", "azure-dl", "dbfs", "sftp", "hf", "alipan")  # what Streaming fetches from


@dataclass(frozen=True)
class Address:
    """One `dataset_path`, understood. Exactly one of the fields `remote`, `shards` and `find` is set.

    Attributes:
        text: as it was given.
        split: the wanted split.
        remote: an address in an object store.
        shards: split -> local folder of shards.
        find: lists the images that have to be converted.
        home: where their shards go.
    """

    text: str
    split: str
    remote: str = ""
    shards: dict[str, Path] | None = None
    find: Callable[[], dict[str, Source]] | None = None
    home: Path = Path()


def default_cache() -> Path:
    """$XDG_CACHE_HOME/dinocomp or ~/.cache/dinocomp."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinocomp"


def cache_folder(cache_dir: str) -> Path:
    """What `data.cache_dir` says, or the user's cache folder."""
    return Path(cache_dir).expanduser() if cache_dir else default_cache()


def parse(dataset_path: str, split: str = "train", cache_dir: str = "") -> Address:
    """Understand a `dataset_path`; looks at the file system, but lists, writes and fetches nothing.

    Raises:
        DataError: nothing there, or not in the `GRAMMAR`.
    """
    cache = cache_folder(cache_dir)
    if split not in SPLITS:
        raise DataError(f"the split {split!r} is not known; use one of {', '.join(SPLITS)}")
    if not dataset_path:
        raise DataError(f"it is empty; give {GRAMMAR}")
    if dataset_path == DIGITS:
        return Address(DIGITS, split, find=lambda: find_sources(DIGITS), home=cache / DIGITS)
    name, colon, _ = dataset_path.partition(":")
    if name == "ImageNet22k" and (colon or not Path(name).exists()):
        raise DataError(
            "ImageNet22k is not read in the reference's layout (memory-mapped tars with hand-made indices); convert "
            "its tar files once with `dinocomp convert FOLDER_OF_TARS DST` and set train.dataset_path=DST"
        )
    if name == "ImageNet" and (colon or not Path(name).exists()):
        return _reference(dataset_path, cache)
    if "://" in dataset_path and not dataset_path.startswith("file://"):
        if name not in STORES:
            raise DataError(
                f"{name}:// is not a store that shards are fetched from ({', '.join(STORES)}); for images on the web, "
                "download them and give the folder"
            )
        remote = dataset_path.rstrip("/")
        return Address(dataset_path, split, remote=remote, home=cache / "remote" / mark(remote))
    root = Path(dataset_path.removeprefix("file://")).expanduser()
    if not root.exists():
        raise DataError(f"{_absent(dataset_path, root)} Give {GRAMMAR}")
    for folder in (root, *(root / name for name in SPLITS)):
        if not (folder / INDEX).is_file() and ((folder / MANIFEST).is_file() or any(folder.glob("*.mds*"))):
            raise DataError(
                f"{folder} holds shards, but their index, {folder / INDEX}, is missing; copy it again, or delete the "
                "folder and convert the images again"
            )
    if (root / INDEX).is_file():
        return Address(dataset_path, split, shards={"": root})
    shards = {name: root / name for name in SPLITS if (root / name / INDEX).is_file()}
    if shards:
        return Address(dataset_path, split, shards=shards)
    if root.is_dir() and any(root.glob(".*.partial")):
        raise DataError(
            f"{root} holds a conversion that was interrupted; run the same `dinocomp convert SRC {root}` again, "
            "it goes on where it stopped"
        )
    if root.is_file() and not root.name.lower().endswith(TAR_ENDINGS):
        raise DataError(f"{root} is a file that cannot be read as a dataset; give {GRAMMAR}")
    home = cache / "converted" / f"{root.resolve().name or 'root'}-{mark(str(root.resolve()))}"
    return Address(dataset_path, split, find=lambda: find_sources(root), home=home)


def _absent(text: str, root: Path) -> str:
    """What was likely meant by a path that does not exist."""
    name, colon, rest = text.partition(":")
    for known in (DIGITS, "ImageNet"):
        if name.lower() == known.lower():
            return f"{root} does not exist. Did you mean {known}{colon}{rest}?"
    if name in STORES and colon:
        return f"{root} does not exist. Did you mean {name}://{rest.lstrip('/')}?"
    return missing(root)


def _reference(text: str, cache: Path) -> Address:
    """`ImageNet:split=TRAIN:root=ROOT:extra=EXTRA`, the reference's grammar."""
    split, root, extra = parse_reference(text)
    home = extra / "dinocomp-shards" if extra else cache / "converted" / f"ImageNet-{mark(str(root.resolve()))}"
    return Address(text, split, find=lambda: find_sources(root, extra), home=home)


def mark(text: str) -> str:
    """A short name for a long text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
