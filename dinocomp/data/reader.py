"""Random access to the images of one split of shards."""

import hashlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dinocomp.data.convert import read_manifest
from dinocomp.data.damage import damage
from dinocomp.data.images import Reduction, decode_rgb
from dinocomp.data.index import INDEX, cached_index, check_files, fetch_json, put_index, read_index
from dinocomp.data.listing import NO_LABEL, ClassName
from dinocomp.data.report import MANIFEST
from dinocomp.errors import DataError

log = logging.getLogger(__name__)

_FILE_COLUMNS = ("jpeg", "png", "bytes")  # MDS stores all three as the bytes of a file
_REMOTE_BLOCK = 1 << 18  # samples shuffled together where shards have to be downloaded
_NOT_AS_WRITTEN = (
    ValueError,
    IndexError,
    TypeError,
    OverflowError,
    MemoryError,
)  # reading flipped bits
_PATIENCE = 0.8  # of the loader's time limit, so that a worker says what it waited for before the limit ends it


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


class Keeping(NamedTuple):
    """Where copies of shards from elsewhere are kept, and how.

    Attributes:
        folder: of all that dinocomp keeps.
        limit: bytes that fetched shards may take on this disk; None for all of them.
        timeout_seconds: how long a batch may take, and so an outage of the store; 0 for ever.
    """

    folder: Path
    limit: int | None = None
    timeout_seconds: float = 0


class BadImage(DataError):
    """One image cannot be read or decoded, while its shard is there and of the right size."""


class Images:
    """The images of one split, by number: `images[i]` is a `Sample`.

    Local uncompressed shards are read by Streaming's LocalDataset: a plain file reader without shared memory, locks or
    background threads, so that it survives kill -9, fork and spawn. Compressed and remote shards are fetched and
    unpacked into a cache by `CachedShards` when one of their images is asked for first.

    Attributes:
        path: where the shards are.
        classes: the classes, by label; empty if they are unknown.
        labelled: whether every sample has a label.
        shard_sizes: int64 [shards], images of each.
        remote: whether shards have to be fetched, so that visiting them one after another pays.
        on_demand: whether shards are fetched, or unpacked, when one of their images is asked for first.
        block: samples to shuffle together then; None to shuffle all of them.
    """

    def __init__(self, path: str, shards: Any, manifest: dict[str, Any] | None, *, block: int | None = None) -> None:
        self.path = path
        self.block = block
        self.remote = block is not None
        self.on_demand = hasattr(shards, "drop_if_damaged")
        self.shard_sizes = np.array([shard.samples for shard in shards.shards], dtype=np.int64)  # [shards]
        self._length = int(self.shard_sizes.sum())
        self.classes = [ClassName(entry["id"], entry["name"]) for entry in (manifest or {}).get("classes", [])]
        self._shards = shards
        self._verdicts: dict[tuple[Path, int], str] = {}  # (shard, time of change) -> what is wrong with it
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
        """One stored image.

        Raises:
            BadImage: it cannot be read, although its shard is there and has the right size.
            DataError: its shard is gone or was cut, or cannot be fetched.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        try:
            return self._read(index)
        except FileNotFoundError as error:
            self._shard_in_words(index)
            raise DataError(f"image {index} of {self.path} cannot be read: {error}; start again") from error
        except OSError as error:
            raise DataError(
                f"image {index} of {self.path} cannot be read: {error}; make room on the disk or mend it, then start "
                "again"
            ) from error
        except _NOT_AS_WRITTEN as error:
            if self._fresh(index):
                return self[index]
            raise BadImage(
                f"image {index} of {self.path} cannot be read: {error}.{self._shard_in_words(index)}"
            ) from error

    def decode(self, index: int, reduction: Reduction | None = None) -> tuple[Sample, torch.Tensor]:
        """One stored image and its pixels, uint8 [3, H, W], see `decode_rgb`.

        Raises:
            BadImage: it cannot be decoded, although its shard is there and has the right size.
            DataError: as `__getitem__`.
        """
        stored = self[index]
        try:
            return stored, decode_rgb(stored.image, reduction)
        except DataError as error:
            if self._fresh(index):
                return self.decode(index, reduction)
            raise BadImage(
                f"image {stored.key!r} (sample {index} of {self.path}) cannot be decoded: {error}."
                f"{self._shard_in_words(index)}"
            ) from error

    def fault(self, index: int) -> tuple[str, str]:
        """Key and what is wrong with an image that somebody else, a worker perhaps, found to be bad."""
        key = f"image {index}"
        try:
            key = self[index].key
            self.decode(index)
        except BadImage as error:
            return key, str(error)
        return key, f"image {key!r} (sample {index} of {self.path}) could not be decoded, but now can"

    def _read(self, index: int) -> Sample:
        sample = self._shards[index]
        return Sample(sample["image"], int(sample.get("label", NO_LABEL)), str(sample.get("key", index)))

    def _fresh(self, index: int) -> bool:
        """Whether a damaged copy of the image's shard was removed, so that reading it again may help."""
        return self.on_demand and self._shards.drop_if_damaged(self._shards.spanner[index][0])

    def _shard_in_words(self, index: int) -> str:
        """What a bad image's shard has to do with it, behind a space.

        Raises:
            DataError: the shard is missing or was cut, which no other image can make good.
        """
        shard = self._shards.shards[self._shards.spanner[index][0]]
        raw = shard.file_pairs[0][0]
        path = Path(shard.dirname) / raw.basename
        if reason := damage(path, raw.bytes):
            raise DataError(f"the shard {path} {reason}; copy it again or convert the images again, then start again")
        version = (path, path.stat().st_mtime_ns)
        if version not in self._verdicts:
            self._verdicts[version] = damage(path, raw.bytes, raw.hashes)
        if reason := self._verdicts[version]:
            return f" The shard {path} {reason}: it was damaged; copy it again or convert the images again"
        return (
            " Conversion checks every image, so the shards were written by other means, or with another version of "
            "Pillow: convert them again with `dinocomp convert SRC DST`"
        )


def open_local(folder: Path, keeping: Keeping) -> Images:
    """Open a local folder of shards (one with an index.json). Compressed ones are unpacked into the cache.

    Raises:
        DataError: a shard is missing or has the wrong size, or the index is damaged or empty.
    """
    index = read_index(folder)
    check_files(folder, index)
    if not any(shard.get("zip_data") for shard in index["shards"]):
        from streaming import LocalDataset

        return Images(str(folder), LocalDataset(str(folder)), read_manifest(folder))
    # Not beside the source, where Streaming puts them: that may be somebody else's folder, or read by two runs.
    text = (folder / INDEX).read_bytes()
    space = keeping.folder / "unpacked"
    copies = space / hashlib.sha256(str(folder.resolve()).encode() + text).hexdigest()[:12]
    put_index(copies, text)
    shards = _cached(str(folder), copies, space, keeping)
    return Images(str(folder), shards, read_manifest(folder), block=None if keeping.limit is None else _block(shards))


def open_remote(remote: str, split: str, folder: Path, keeping: Keeping) -> Images:
    """Open shards in an object store, at `remote` or `remote/split`; what is read is kept in `folder`.

    Raises:
        DataError: there is no index at either place, or the store refuses or cannot be reached.
    """
    if cached_index(remote, split, folder, ask=True) is None:
        reason = fetch_json(f"{remote}/{INDEX}", folder / "root" / INDEX)
        raise DataError(
            f"neither {remote}/{INDEX} nor {remote}/{split}/{INDEX} can be fetched: {reason}. Shards are written by "
            "`dinocomp convert SRC DST` and then copied"
        )
    at_root = (folder / "root" / INDEX).is_file()
    where, local = (remote, folder / "root") if at_root else (f"{remote}/{split}", folder / split)
    if reason := fetch_json(f"{where}/{MANIFEST}", local / MANIFEST):  # shards written by other means have none
        log.info("the classes of %s have no names: %s", where, reason)
    shards = _cached(where, local, keeping.folder / "remote", keeping)
    return Images(where, shards, read_manifest(local), block=_block(shards))


def _cached(source: str, folder: Path, space: Path, keeping: Keeping) -> Any:
    from dinocomp.data.cache import CachedShards  # Streaming takes seconds to import

    patience = _PATIENCE * keeping.timeout_seconds
    return CachedShards(source, folder, space=space, limit=keeping.limit, patience=patience)


def _block(shards: Any) -> int:
    """Samples to shuffle together; says what a limit makes of them."""
    block = shards.block(_REMOTE_BLOCK)
    if block < min(_REMOTE_BLOCK, shards.num_samples):
        log.info(
            "note: data.cache_limit allows shuffling among about %d of the %d images of %s at a time, of randomly "
            "chosen shards",
            block,
            shards.num_samples,
            shards.source,
        )
    return block
