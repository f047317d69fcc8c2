"""One part of a conversion: some images -> a few shards. Runs in a worker process."""

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dinocomp.data.images import checked_bytes, encode
from dinocomp.data.listing import DIGITS, Item
from dinocomp.errors import DataError

COLUMNS = {"image": "bytes", "label": "int", "key": "str"}
SHARD_BYTES = 1 << 26  # 64 MiB: large enough for object stores, small enough to wait for


class Job(NamedTuple):
    """What a worker needs to write one part below `partial`/shards."""

    number: int
    items: list[Item]
    partial: str
    max_size: int | None
    compression: str | None


def write_part(job: Job, advance: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Write one part under a temporary name, rename it when it is complete, and tell what it holds.

    Returns:
        {"shards": entries for index.json, "unreadable": [[key, reason], …]}.
    """
    from streaming import MDSWriter

    name = f"part-{job.number:05d}"
    shards = Path(job.partial) / "shards"
    writing = Path(tempfile.mkdtemp(prefix=f"{name}.writing-", dir=shards))
    unreadable = []
    try:
        with MDSWriter(
            columns=COLUMNS, out=str(writing), compression=job.compression, hashes=["xxh64"], size_limit=SHARD_BYTES
        ) as writer:
            for item in job.items:
                try:
                    image = checked_bytes(read_item(item), job.max_size)
                except DataError as error:
                    unreadable.append([item.key, str(error)])
                else:
                    writer.write({"image": image, "label": item.label, "key": item.key})
                if advance:
                    advance(1)
        # The writer leaves an index even when it is interrupted; one in a part would look like a dataset of its own.
        index = json.loads((writing / "index.json").read_text(encoding="utf-8"))
        (writing / "index.json").unlink()
        final = shards / name
        shutil.rmtree(final, ignore_errors=True)  # finished, but its entry was not written before an interruption
        writing.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner may read
        writing.rename(final)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    for shard in index["shards"]:
        for kind in ("raw_data", "zip_data"):
            if shard[kind]:
                shard[kind]["basename"] = f"{name}/{shard[kind]['basename']}"
    return {"shards": index["shards"], "unreadable": unreadable}


def read_item(item: Item) -> bytes:
    """The bytes of one image file.

    Raises:
        DataError: it cannot be read, with the system's reason.
    """
    if item.path == DIGITS:
        return digit_png(item.offset)
    try:
        with open(item.path, "rb") as file:
            if item.offset < 0:
                return file.read()
            file.seek(item.offset)
            data = file.read(item.size)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    if len(data) < item.size:
        raise DataError(f"the tar file ends after {len(data)} of its {item.size} bytes")
    return data


def digit_png(number: int) -> bytes:
    """One of scikit-learn's digits as a PNG of 8 x 8 pixels; its values 0..16 become 0..255."""
    grey = np.rint(_digits()[number] * (255 / 16)).astype(np.uint8)  # [8, 8]
    return encode(torch.from_numpy(grey)[None].expand(3, -1, -1), "PNG")  # [3, 8, 8]


@lru_cache(maxsize=1)
def _digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return load_digits().images  # float64 [1797, 8, 8]


def gunzip(path: str, target: Path) -> str:
    """Unpack a compressed tar to `target`, unless that is there; gives its path."""
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        writing = target.with_suffix(".writing")
        with gzip.open(path, "rb") as packed, open(writing, "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
        writing.replace(target)
    return str(target)


def initialise_worker() -> None:
    """Let ctrl-C be the parent's business, use one thread, and end with the parent even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A fork server that data workers started blocks these; this one may be ended, and so the pool on an error.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
