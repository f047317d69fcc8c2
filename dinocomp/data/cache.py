"""Shards that lie elsewhere, and the part of the disk where copies of them are kept.

Streaming's StreamingDataset does this, too, and is not used, because of what it was seen to do: when a shard cannot be
fetched it ends the epoch early or hangs its workers; a damaged download stays in the cache and is taken for good the
next time, and so is a cached file that was cut later; with a limit on the cache it deletes shards that have no other
copy; processes that are killed leave shared memory behind, which may keep others from starting; two runs on one cache
are not noticed. Here processes meet in file locks, which the kernel frees with their holder, and nowhere else: any
number of ranks, workers and runs may share a cache, and may be killed.
"""

import contextlib
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from streaming import LocalDataset
from streaming.base.compression import decompress

from dinocomp.data.damage import damage
from dinocomp.data.lanes import MOST_LANES
from dinocomp.data.store import Downloads, patiently
from dinocomp.errors import DataError

log = logging.getLogger(__name__)

_COPIES = 3  # tries before a shard whose hash does not match is given up
_SHARDS_OF_A_LANE = 4  # that it shuffles at a time, where there is room
_TURNS = 10  # times a shard is fetched for one image before saying that the cache is too small
_LOCKS = 64  # files that the locks of all shards share
_TOUCH_SECONDS = 5.0  # how precisely the cache knows when a shard was used last
_BLOCK_SHARE = 0.4  # of the cache, for the shards of one block: ranks and workers may be in two blocks at a time


class CachedShards(LocalDataset):
    """Streaming's reader of local shards over a folder that is filled on demand.

    A shard is fetched (and unpacked) when one of its images is asked for first, and checked against its size and hash
    then and whenever this process meets a file that it has not seen.

    Args:
        source: where the shards are: an address in an object store, or a local folder of compressed shards.
        folder: for the copies; holds the source's index.json.
        space: folder around it that `limit` is for.
        limit: bytes that shards below `space` may take; the least recently used make room. None: no limit.
        patience: how long an outage of the store is waited for, in seconds; 0: for ever.

    Raises:
        DataError: the limit is too small for these shards.
    """

    def __init__(self, source: str, folder: Path, *, space: Path, limit: int | None, patience: float) -> None:
        super().__init__(str(folder))
        self.source, self.folder, self.space, self.limit, self.patience = source, folder, space, limit, patience
        self._downloads = Downloads(source)
        self._checked: dict[int, tuple[int, int, int]] = {}  # shard -> the file that was found whole
        self._touched: dict[int, float] = {}  # shard -> when its time of use was written last
        self.largest = max(shard.get_max_size() for shard in self.shards)
        if limit is not None and limit <= 4 * self.largest:
            raise DataError(
                f"data.cache_limit is {limit} bytes, but the largest shard of {source} takes {self.largest}; give more "
                f"than 4 times that, e.g. data.cache_limit={-(-5 * self.largest // 2**20)}mb or much more"
            )
        self._clear_leftovers()
        self._make_room(0)

    def get_item(self, sample_id: int) -> dict[str, Any]:
        """The columns of one sample."""
        number, place = self.spanner[sample_id]
        for _ in range(_TURNS):
            self._provide(number)
            with contextlib.suppress(FileNotFoundError):  # another process made room in between
                return self.shards[number][place]
        raise DataError(
            f"{self._path(number)} goes as fast as it is fetched; raise data.cache_limit, or give each of the runs on "
            "this machine a data.cache_dir of its own"
        )

    def block(self, most: int) -> int:
        """How many samples to shuffle together, at most `most`, so that their shards fit well within the limit.

        Where shards hold many, `most` is more, for as many lanes as there may be.
        """
        most = max(most, _SHARDS_OF_A_LANE * MOST_LANES * max(shard.samples for shard in self.shards))
        if self.limit is None:
            return most
        bytes_each = sum(shard.get_raw_size() for shard in self.shards) / self.num_samples
        room = _BLOCK_SHARE * self.limit - 2 * self.largest  # a block begins and ends inside a shard
        least = max(2, max(shard.samples for shard in self.shards) // 2)
        return min(most, max(least, int(room / bytes_each)))

    def drop_if_damaged(self, number: int) -> bool:
        """Remove a copy that is not what the index says, so that a fresh one is fetched; tells whether it did."""
        with self._lock(number):
            return self._drop_if_damaged(number)

    def _provide(self, number: int) -> None:
        path = self._path(number)
        found = _identity(path)
        if found is None or self._checked.get(number) != found:
            with self._lock(number):
                self._drop_if_damaged(number)
                if not path.is_file():
                    self._fetch(number)
                found = _identity(path)
                if found is None:  # a run with a smaller limit made room at once
                    return
                self._checked[number] = found
        now = time.time()
        if now - self._touched.get(number, 0.0) > _TOUCH_SECONDS:
            self._touched[number] = now
            with contextlib.suppress(FileNotFoundError, PermissionError):  # gone, or another user's copy
                os.utime(path, ns=(time.time_ns(), found[1]))  # access alone: disks are often mounted without it

    def _drop_if_damaged(self, number: int) -> bool:
        path, (raw, _) = self._path(number), self.shards[number].file_pairs[0]
        reason = damage(path, raw.bytes, raw.hashes) if path.is_file() else ""
        if reason:
            log.warning("the copy %s %s; it is fetched again", path, reason)
            path.unlink(missing_ok=True)
        return bool(reason)

    def _fetch(self, number: int) -> None:
        """Fetch a shard and give it its name when it is whole; the caller holds its lock."""
        shard, path = self.shards[number], self._path(number)
        raw, packed = shard.file_pairs[0]
        remote, source = "://" in self.source, Path(self.source)
        if packed and not remote and not (source / packed.basename).is_file() and (source / raw.basename).is_file():
            packed = None  # a local folder that keeps some shards unpacked
        info = packed or raw
        fetching, reserved = (path.with_name(path.name + ending) for ending in (".fetching", ".reserved"))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._make_room(shard.get_max_size(), reserved)
        try:
            for _ in range(_COPIES if remote else 1):
                where = self._copy(info.basename, fetching)
                reason = damage(where, info.bytes, info.hashes)
                if not reason:
                    break
                log.warning("%s as it came from %s %s", info.basename, self.source, reason)
            else:
                raise DataError(
                    f"the shard {info.basename} of {self.source} {reason}: it is damaged there; copy it there again or "
                    f"convert the images again. If {self.source} was written anew on purpose, delete {self.folder}"
                )
            if packed:
                fetching.write_bytes(self._unpacked(where, shard.compression))
                if reason := damage(fetching, raw.bytes, raw.hashes):
                    raise DataError(f"{info.basename} of {self.source}, unpacked, {reason}; convert the images again")
            elif where != fetching:
                shutil.copyfile(where, fetching)
            fetching.replace(path)
        finally:
            fetching.unlink(missing_ok=True)
            reserved.unlink(missing_ok=True)

    def _copy(self, name: str, target: Path) -> Path:
        """The file that holds the bytes of one of the source's files: `target`, or a local source's own."""
        if "://" not in self.source:
            if not (local := Path(self.source) / name).is_file():
                raise DataError(f"the shard {local} is missing; copy it again or convert the images again")
            return local
        address = f"{self.source}/{name}"
        patiently(lambda: self._downloads.fetch(address, target), f"the shard {address}", self.patience)
        return target

    def _unpacked(self, path: Path, compression: str) -> bytes:
        try:
            return decompress(compression, path.read_bytes())
        except Exception as error:  # each algorithm has errors of its own
            raise DataError(
                f"a shard of {self.source} cannot be unpacked: {error}; convert the images again"
            ) from error

    def _make_room(self, needed: int, reserved: Path | None = None) -> None:
        """Remove the least recently used shards until `needed` bytes more keep to the limit, and reserve these."""
        if self.limit is None:
            return
        with FileLock(self.space / ".space.lock"):
            shards, used = [], 0
            for path in self.space.rglob("*"):
                with contextlib.suppress(FileNotFoundError):
                    if path.suffix in (".mds", ".reserved"):
                        status = path.stat()
                        used += status.st_size
                        shards += [(status.st_atime_ns, status.st_size, path)] if path.suffix == ".mds" else []
            for _, size, path in sorted(shards):
                if used + needed <= self.limit:
                    break
                path.unlink(missing_ok=True)  # who reads it still can; who wants it later fetches it again
                used -= size
            if reserved is not None:  # a file without content of that size, for others to count
                with open(reserved, "wb") as file:
                    file.truncate(needed)

    def _clear_leftovers(self) -> None:
        """What a killed process was fetching."""
        names = {self._path(number).relative_to(self.folder).as_posix(): number for number in range(len(self.shards))}
        for ending in (".fetching", ".reserved"):
            for path in self.folder.rglob(f"*{ending}*"):
                number = names.get(path.relative_to(self.folder).as_posix().partition(ending)[0])
                with contextlib.suppress(Timeout):  # a live process is fetching it
                    if number is not None:
                        with self._lock(number, timeout=0):
                            path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / self.shards[number].file_pairs[0][0].basename

    def _lock(self, number: int, timeout: float = -1) -> FileLock:
        return FileLock(self.folder / f".lock-{number % _LOCKS:02d}", timeout=timeout)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Tells one file from another of the same name; None where there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
