"""Random access to the images of one split of shards."""

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinocomp.data.convert import read_manifest
from dinocomp.data.listing import NO_LABEL, ClassName
from dinocomp.data.report import MANIFEST
from dinocomp.errors import DataError

INDEX = "index.json"
_FILE_COLUMNS = ("jpeg", "png", "bytes")  # MDS stores all three as the bytes of a file


class Sample(NamedTuple):
    """One stored image.

    Attributes:
        image: the bytes of the image file.
        label: index into `Images.classes`, or -1.
        key: the image's name in its source.
    """

    image: bytes
    label: int
    key: str


class Images:
    """The images of one split, by number: `images[i]` is a `Sample`.

    Local uncompressed shards are read by Streaming's LocalDataset: a plain file reader without shared memory, locks or
    background threads, so that it survives kill -9, fork and spawn. Compressed and remote shards need
    StreamingDataset, which fetches and unpacks a shard when one of its images is asked for first.

    Attributes:
        path: where the shards are.
        classes: the classes, by label; empty if they are unknown.
        labelled: whether every sample has a label.
        shard_sizes: int64 [shards], images of each.
        remote: whether shards have to be fetched, so that visiting them one after another pays.
    """

    def __init__(self, path: str, shards: Any, manifest: dict[str, Any] | None, *, remote: bool) -> None:
        self.path = path
        self.remote = remote
        self.shard_sizes = np.array([shard.samples for shard in shards.shards], dtype=np.int64)  # [shards]
        self._length = int(self.shard_sizes.sum())
        self.classes = [ClassName(entry["id"], entry["name"]) for entry in (manifest or {}).get("classes", [])]
        self._shards = shards
        columns = shards.shards[0].column_names
        if "image" not in columns:
            raise DataError(
                f"the shards in {path} have the columns {', '.join(columns)}, but no `image`; "
                "write them with `dinocomp convert SRC DST`"
            )
        self.labelled = bool(manifest["labelled"]) if manifest else "label" in columns
        for shard in shards.shards:  # other people's shards: take the stored file, not a decoded picture
            where = shard.column_names.index("image")
            if shard.column_encodings[where] not in _FILE_COLUMNS:
                raise DataError(
                    f"the `image` column of {path} is stored as `{shard.column_encodings[where]}`, expected one of "
                    f"{', '.join(_FILE_COLUMNS)}; write the shards with `dinocomp convert SRC DST`"
                )
            shard.column_encodings = [*shard.column_encodings]
            shard.column_encodings[where] = "bytes"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        try:
            sample = self._shards[index]
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise DataError(
                f"image {index} of {self.path} cannot be read: {error}; check that the shards are still there and whole"
            ) from error
        return Sample(sample["image"], int(sample.get("label", NO_LABEL)), str(sample.get("key", index)))


def open_local(folder: Path) -> Images:
    """Open a local folder of shards (one with an index.json).

    Raises:
        DataError: a shard is missing or has the wrong size, or the index is damaged or empty.
    """
    index = read_index(folder)
    compressed = any(shard.get("zip_data") for shard in index["shards"])
    for shard in index["shards"]:
        check_shard(folder, shard)
    if compressed:
        shards = _streaming(None, str(folder))
    else:
        from streaming import LocalDataset

        shards = LocalDataset(str(folder))
    return Images(str(folder), shards, read_manifest(folder), remote=False)


def open_remote(remote: str, split: str, folder: Path) -> Images:
    """Open shards in an object store, at `remote` or `remote/split`; what is read is kept in `folder`.

    Raises:
        DataError: there is no index at either place, or the store cannot be reached.
    """
    if cached_index(remote, split, folder, fetch=True) is None:
        reason = _fetch(f"{remote}/{INDEX}", folder / "root" / INDEX)
        raise DataError(
            f"neither {remote}/{INDEX} nor {remote}/{split}/{INDEX} can be fetched ({reason}); check the address and "
            "the store's credentials (and its endpoint, e.g. S3_ENDPOINT_URL)"
        )
    at_root = (folder / "root" / INDEX).is_file()
    where, local = (remote, folder / "root") if at_root else (f"{remote}/{split}", folder / split)
    reason = _fetch(f"{where}/{MANIFEST}", local / MANIFEST)
    if reason:  # shards written by other means have none
        print(f"{where} has no {MANIFEST} ({reason}): its classes have no names", file=sys.stderr, flush=True)
    return Images(where, _streaming(where, str(local)), read_manifest(local), remote=True)


def cached_index(
    remote: str, split: str, folder: Path, *, fetch: bool = False, exact: bool = False
) -> dict[str, Any] | None:
    """The index of a remote's shards, at `remote` or `remote/split` (`exact`: only there).

    Without `fetch` only one fetched earlier is looked at. None if there is none.
    """
    places = [(remote, folder / "root"), (f"{remote}/{split}", folder / split)]
    for where, local in places[1:] if exact else places:
        if (local / INDEX).is_file() or (fetch and not _fetch(f"{where}/{INDEX}", local / INDEX)):
            return read_index(local)
    return None


def _fetch(remote: str, local: Path) -> str:
    """Get one small file from an object store, all or nothing; gives the reason where that fails, else ""."""
    from streaming.base.storage.download import CloudDownloader

    if local.is_file():
        return ""
    local.parent.mkdir(parents=True, exist_ok=True)
    temporary = local.with_name(f"{local.name}.{os.getpid()}")
    try:
        CloudDownloader.direct_download(remote, str(temporary), timeout=60.0)
        temporary.replace(local)
        return ""
    except Exception as error:  # every store's client has errors of its own, also for "no such file"
        temporary.unlink(missing_ok=True)
        return f"{type(error).__name__}: {error}"


@cache
def _streaming(remote: str | None, local: str) -> Any:
    """One StreamingDataset a process for a folder: Streaming refuses a second one."""
    from streaming import StreamingDataset

    hashed = all("xxh64" in shard.get("hashes", ()) for shard in read_index(Path(local))["shards"])
    return StreamingDataset(remote=remote, local=local, batch_size=1, validate_hash="xxh64" if hashed else None)


def read_index(folder: Path) -> dict[str, Any]:
    """Streaming's index of a folder of shards, checked to be one with at least one sample."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        samples = sum(shard["samples"] for shard in index["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); copy it again or convert the images again") from None
    if samples == 0:
        raise DataError(f"{path} lists no samples; convert some images with `dinocomp convert SRC DST`")
    return index


def check_shard(folder: Path, shard: dict[str, Any]) -> None:
    """Missing shards would end an epoch early or hang a worker, so they are found before training."""
    forms = [form for form in (shard["raw_data"], shard.get("zip_data")) if form]
    sizes = {}
    for form in forms:
        path = folder / form["basename"]
        sizes[path] = os.path.getsize(path) if path.is_file() else None
        if sizes[path] == form["bytes"]:
            return
    found = "; ".join(f"{path} {'is missing' if s is None else f'has {s} bytes'}" for path, s in sizes.items())
    raise DataError(
        f"{found}; {folder / INDEX} says {forms[-1]['bytes']} bytes. Copy the shard again, or delete {folder} and "
        "convert the images again"
    )
