"""What `train.dataset_path` may say, and opening it: shards are found, or written on first use."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dinocomp.data.address import Address, cache_folder, mark, parse
from dinocomp.data.convert import convert, listing_digest, read_manifest
from dinocomp.data.images import side_of
from dinocomp.data.index import INDEX, cached_index, check_files, read_index
from dinocomp.data.listing import Source
from dinocomp.data.part import read_item
from dinocomp.data.reader import BadImage, Images, Keeping, open_local, open_remote
from dinocomp.data.tars import first_images
from dinocomp.errors import DataError
from dinocomp.hints import obstacle

T = TypeVar("T")


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
    return _look(dataset_path, split, cache_dir)[0]


class Survey(NamedTuple):
    """What is known of images before they are converted.

    Attributes:
        images: how many; None for a remote that was not opened before.
        side: the median of the shorter sides (pixels) of some; None where none was seen.
    """

    images: int | None
    side: int | None


def survey_images(
    dataset_path: str, *, split: str = "train", fetch: bool = True, look: int = 64, **opening: Any
) -> Survey:
    """How many images there are, and how large they usually are, without converting anything.

    Args:
        fetch: whether the first shard may be fetched, or unpacked, for it.
        look: images whose sides are looked at: from all over, or from the first shard where it has to be fetched.
        opening: for `open_images`.

    Raises:
        DataError: as `open_images`.
    """
    cache_dir = opening.get("cache_dir", "")
    address = parse(dataset_path, split, cache_dir)
    if address.remote and not fetch:
        return Survey(count_images(dataset_path, cache_dir, split), None)
    source = None
    if not address.remote and address.shards is None:
        sources = address.find()
        source = _pick(sources, address)
    if source is None or read_manifest(_home(address, sources) / source.split) is not None:
        try:
            images = open_images(dataset_path, split=split, **opening)
        except OSError as error:
            raise DataError(
                f"{dataset_path} cannot be opened: {error}; type data.cache_dir=FOLDER for another"
            ) from error
        if images.on_demand and not fetch:
            return Survey(len(images), None)
        among = int(images.shard_sizes[0]) if images.on_demand else len(images)
        # A shard that cannot be had is no reason to go on without.
        return Survey(len(images), _usual_side(lambda number: images[number].image, among, look, skip=BadImage))
    items = source.items
    if items[0].offset >= 0 and items[0].path.lower().endswith("gz"):  # a compressed tar is read from its beginning
        first = first_images(Path(items[0].path), look)
        return Survey(len(items), _usual_side(first.__getitem__, len(first), look, skip=DataError))
    return Survey(len(items), _usual_side(lambda number: read_item(items[number]), len(items), look, skip=DataError))


def _usual_side(read: Callable[[int], bytes], among: int, look: int, skip: type[DataError]) -> int | None:
    sides = []
    for number in np.unique(np.linspace(0, among - 1, min(look, among)).round().astype(int)).tolist():
        with suppress(skip):
            sides.append(side_of(read(number)))
    sides = [side for side in sides if side is not None]
    return round(float(np.median(sides))) if sides else None


def check_images(dataset_path: str, train_path: str = "", val_path: str = "", cache_dir: str = "") -> int | None:
    """Whether training data and labelled images can be what they are given as, before anything is converted or fetched.

    Args:
        dataset_path, train_path, val_path: `train.dataset_path` and those of the evaluation, as `evaluation_pair`.

    Returns:
        How many images there are to train on; None for a remote not opened before.

    Raises:
        DataError: as `open_images` and `evaluation_pair`, naming the key; or the cache cannot be written to.
    """
    count = None
    for key, split, path in (
        ("train.dataset_path", "train", dataset_path),
        ("evaluation.train_dataset_path", "train", train_path),
        ("evaluation.val_dataset_path", "val", val_path),
    ):
        if not path and key != "train.dataset_path":
            continue
        try:
            images, labelled, home = _look(path, split, cache_dir)
        except DataError as error:
            raise DataError(f"{key if path and path in str(error) else f'{key}={path}'}: {error}") from error
        if home and (reason := obstacle(home)):
            raise DataError(
                f"the images of {key}={path} have to be written to {home}, but {reason}; "
                "type data.cache_dir=FOLDER with one that you may write to"
            )
        if key == "train.dataset_path":
            count = images
        elif labelled is False:
            raise DataError(_UNLABELLED.format(key=key, path=path))
    if bool(train_path) != bool(val_path):
        _other_split("val" if train_path else "train", _family(dataset_path), cache_dir)
    return count


_UNLABELLED = "{key}={path} has no labels to evaluate with; set {key} to a folder with class folders"


def _look(dataset_path: str, split: str, cache_dir: str) -> tuple[int | None, bool | None, Path | None]:
    """(number of images, whether they have labels, folder that has yet to be written); None where it is not known."""
    address = parse(dataset_path, split, cache_dir)
    if address.remote:
        index = cached_index(address.remote, address.split, address.home)
        return None if index is None else _samples(index), None, address.home
    if address.shards is not None:
        folder = _pick(address.shards, address)
        index, manifest = read_index(folder), read_manifest(folder)
        check_files(folder, index)
        return _samples(index), manifest["labelled"] if manifest else None, None
    sources = address.find()
    source, home = _pick(sources, address), _home(address, sources)
    if obstacle(home):
        return len(source.items), source.labelled, home
    manifest = read_manifest(home / source.split)  # knows of unreadable images
    return (
        (len(source.items), source.labelled, home) if manifest is None else (manifest["samples"], source.labelled, None)
    )


def _samples(index: Mapping[str, Any]) -> int:
    return sum(shard["samples"] for shard in index["shards"])


def _other_split(split: str, dataset_path: str, cache_dir: str) -> None:
    """Refuse an evaluation that has one path of its own and needs the other split of the training data in vain."""
    if split not in _splits(dataset_path, cache_dir):
        key = f"evaluation.{split}_dataset_path"
        raise DataError(f"{key} is empty and {dataset_path} has no `{split}` split; set {key}=PATH")


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
        if not path:
            _other_split(split, dataset_path, cache_dir)
        images = open_images(path, split=split, cache_dir=cache_dir, **opening) if path else None
        images = images or _open_split(dataset_path, split, cache_dir, **opening)
        if not images.labelled:
            raise DataError(_UNLABELLED.format(key=key, path=path or images.path))
        pair.append(images)
    return pair[0], pair[1]


def _home(address: Address, sources: dict[str, Source]) -> Path:
    return address.home / mark("".join(listing_digest(sources[split]) for split in sorted(sources)))


def _pick(splits: Mapping[str, T], address: Address) -> T:
    """The wanted split; of a single one there is no choice, unless its name says that it is another one."""
    if address.split in splits:
        return splits[address.split]
    if len(splits) == 1 and next(iter(splits)) in ("", "train") and not address.text.startswith("ImageNet"):
        return next(iter(splits.values()))
    other = next(iter(splits))
    if address.text.startswith("ImageNet"):
        instead = f"type split={other.upper()}"
    elif address.shards is not None:
        instead = f"give {splits[other]} for it"
    else:
        instead = "give a folder that holds the images themselves"
    raise DataError(f"{address.text} has no split `{address.split}`; it has {', '.join(splits)}: {instead}")


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
