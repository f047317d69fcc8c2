"""What `train.dataset_path` may say, and opening it: shards are found, or written on first use."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dinocomp.data.convert import convert, listing_digest, read_manifest
from dinocomp.data.index import INDEX, cached_index, read_index
from dinocomp.data.listing import DIGITS, Source
from dinocomp.data.reader import Images, Keeping, open_local, open_remote
from dinocomp.data.report import MANIFEST
from dinocomp.data.sources import SPLITS, find_sources, parse_reference
from dinocomp.data.tars import TAR_ENDINGS
from dinocomp.errors import DataError

GRAMMAR = (
    "a folder of shards, a folder with train/ and val/ shards, a remote such as s3://bucket/path, a folder of images, "
    "a .tar file, ImageNet:split=TRAIN:root=ROOT:extra=EXTRA, or digits"
)
T = TypeVar("T")


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


def open_images(
    dataset_path: str,
    *,
    split: str = "train",
    cache_dir: str = "",
    cache_limit: int | None = None,
    timeout_seconds: float = 0,
) -> Images:
    """Open one split of a dataset, converting it first where it is not in shards yet.

    On several ranks all must call it: one converts, the others wait.

    Args:
        dataset_path: see `GRAMMAR`. Something with one split only is taken whatever `split` says.
        split: "train", "val" or "test"; an `ImageNet:split=…` string names its own.
        cache_dir: for converted and fetched shards; "" for $XDG_CACHE_HOME/dinocomp or ~/.cache/dinocomp.
        cache_limit: bytes that fetched shards may take there; None for all of them.
        timeout_seconds: how long a batch may take, and so an outage of an object store; 0 for ever.

    Raises:
        DataError: nothing there, no images, damaged or missing shards, no such split, a cache limit that is too small,
            or a store that refuses or does not answer.
    """
    address = parse(dataset_path, split, cache_dir)
    keeping = Keeping(cache_folder(cache_dir), cache_limit, timeout_seconds)
    if address.remote:
        return open_remote(address.remote, address.split, address.home, keeping)
    return open_local(Path(ensure_shards(dataset_path, cache_dir, split)), keeping)


def ensure_shards(dataset_path: str, cache_dir: str = "", split: str = "train") -> str:
    """The folder (or remote address) of one split's shards; images are converted on first use, with a message.

    Converted images lie in a folder named after their listing: when files are added, removed or changed they are
    converted anew, beside the old shards, which a running job may still be reading.

    Raises:
        DataError: as `open_images`.
    """
    address = parse(dataset_path, split, cache_dir)
    if address.remote:
        return address.remote
    if address.shards is not None:
        return str(_pick(address.shards, address))
    sources = address.find()
    source = _pick(sources, address)
    home = _home(address, sources)
    if read_manifest(home / source.split) is None:
        convert(address.text, str(home), sources={source.split: source})
    return str(home / source.split)


def count_images(dataset_path: str, cache_dir: str = "", split: str = "train") -> int | None:
    """How many images there are, without converting or fetching anything; None for a remote not opened before.

    Raises:
        DataError: as `open_images`.
    """
    address = parse(dataset_path, split, cache_dir)
    if address.remote:
        index = cached_index(address.remote, address.split, address.home)
        return None if index is None else sum(shard["samples"] for shard in index["shards"])
    if address.shards is not None:
        return sum(shard["samples"] for shard in read_index(_pick(address.shards, address))["shards"])
    sources = address.find()
    source = _pick(sources, address)
    manifest = read_manifest(_home(address, sources) / source.split)  # knows of unreadable images
    return len(source.items) if manifest is None else manifest["samples"]


def evaluation_pair(
    dataset_path: str, train_path: str = "", val_path: str = "", cache_dir: str = "", **opening: Any
) -> tuple[Images, Images] | None:
    """Labelled images to evaluate with: (those that are searched or fitted, those that are scored).

    The given paths, where there are any; else the training data's own `train` and `val` (also where `dataset_path` is
    the `train` folder beside a `val`), if both have labels; else None. `opening` is for `open_images`.

    Raises:
        DataError: only one path is given and the training data have no such split, or a given path has no labels.
    """
    dataset_path = _family(dataset_path)
    if not train_path and not val_path:
        if not {"train", "val"} <= _splits(dataset_path, cache_dir):
            return None
        pair = tuple(_open_split(dataset_path, split, cache_dir, **opening) for split in ("train", "val"))
        return pair if all(images.labelled for images in pair) else None
    pair = []
    for split, path in (("train", train_path), ("val", val_path)):
        key = f"evaluation.{split}_dataset_path"
        if not path and split not in _splits(dataset_path, cache_dir):
            raise DataError(f"{key} is empty and {dataset_path} has no `{split}` split; set {key}=PATH")
        images = open_images(path, split=split, cache_dir=cache_dir, **opening) if path else None
        images = images or _open_split(dataset_path, split, cache_dir, **opening)
        if not images.labelled:
            raise DataError(f"{images.path} has no labels to evaluate with; set {key} to a folder with class folders")
        pair.append(images)
    return pair[0], pair[1]


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
        raise DataError(f"train.dataset_path is empty; give {GRAMMAR}")
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
        remote = dataset_path.rstrip("/")
        return Address(dataset_path, split, remote=remote, home=cache / "remote" / _mark(remote))
    root = Path(dataset_path.removeprefix("file://")).expanduser()
    if not root.exists():
        raise DataError(f"train.dataset_path: {root} does not exist; give {GRAMMAR}")
    if (root / INDEX).is_file():
        return Address(dataset_path, split, shards={"": root})
    for folder in (root, root / split):
        left = (folder / MANIFEST).is_file() or any(folder.glob("*.mds*"))
        if left and not (folder / INDEX).is_file():
            raise DataError(
                f"{folder} holds shards, but no {INDEX}, without which they cannot be read; copy it again or convert "
                "the images again"
            )
    shards = {name: root / name for name in SPLITS if (root / name / INDEX).is_file()}
    if shards:
        return Address(dataset_path, split, shards=shards)
    if root.is_dir() and any(root.glob(".*.partial")):
        raise DataError(
            f"{root} holds a conversion that was interrupted; run the same `dinocomp convert SRC {root}` again, "
            "it goes on where it stopped"
        )
    if root.is_file() and not root.name.lower().endswith(TAR_ENDINGS):
        raise DataError(f"train.dataset_path: {root} is a file that cannot be read as a dataset; give {GRAMMAR}")
    home = cache / "converted" / f"{root.resolve().name or 'root'}-{_mark(str(root.resolve()))}"
    return Address(dataset_path, split, find=lambda: find_sources(root), home=home)


def _reference(text: str, cache: Path) -> Address:
    """`ImageNet:split=TRAIN:root=ROOT:extra=EXTRA`, the reference's grammar."""
    split, root, extra = parse_reference(text)
    home = extra / "dinocomp-shards" if extra else cache / "converted" / f"ImageNet-{_mark(str(root.resolve()))}"
    return Address(text, split, find=lambda: find_sources(root, extra), home=home)


def _home(address: Address, sources: dict[str, Source]) -> Path:
    return address.home / _mark("".join(listing_digest(sources[split]) for split in sorted(sources)))


def _pick(splits: Mapping[str, T], address: Address) -> T:
    """The wanted split; of a single one there is no choice, unless its name says that it is another one."""
    if address.split in splits:
        return splits[address.split]
    if len(splits) == 1 and next(iter(splits)) in ("", "train") and not address.text.startswith("ImageNet"):
        return next(iter(splits.values()))
    raise DataError(f"{address.text} has no split `{address.split}`; it has {', '.join(splits)}")


def _splits(dataset_path: str, cache_dir: str) -> set[str]:
    address = parse(dataset_path, "train", cache_dir)
    if address.remote:
        found = (cached_index(address.remote, name, address.home, ask=True, exact=True) for name in ("train", "val"))
        return {"train", "val"} if all(found) else {"train"}
    splits = address.shards if address.shards is not None else address.find()
    return {split or "train" for split in splits}


def _family(dataset_path: str) -> str:
    """For the shards of one split, DST/train, the folder with all splits, DST; everything else as it is."""
    parent, _, name = dataset_path.rstrip("/").rpartition("/")
    is_split = "://" in dataset_path or (Path(dataset_path).expanduser() / INDEX).is_file()
    return parent if name == "train" and parent and is_split else dataset_path


def _open_split(dataset_path: str, split: str, cache_dir: str, **opening: Any) -> Images:
    """A split of the training data, also where they are given as `ImageNet:split=TRAIN:…`."""
    if dataset_path.startswith("ImageNet:"):
        parts = [part for part in dataset_path.split(":") if not part.startswith("split=")]
        dataset_path = ":".join([parts[0], f"split={split.upper()}", *parts[1:]])
    return open_images(dataset_path, split=split, cache_dir=cache_dir, **opening)


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
