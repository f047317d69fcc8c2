"""One folder holds a run's checkpoints; each is a folder in it, ``iteration-00003750``.

It is written under a hidden name and renamed once its files and the list of their hashes are on the disk, so a process
may be killed at any moment and leaves either a whole checkpoint or none. What a disk or a copy does to it later, the
hashes tell.
"""

import errno
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from dinocomp.checkpoints.manifest import (
    MANIFEST,
    DamagedError,
    folder_name,
    is_of,
    iteration_of,
    read_manifest,
    write_manifest,
    xxh64,
)

STATE = "checkpoint.pt"  # Composer's checkpoint, in one file
SHARES = ".metadata"  # or in a file of each rank: this one says what lies where
TEACHER = "teacher.safetensors"
BEST_TEACHER = "best_teacher.safetensors"  # of a run, by k-NN

_NAME = re.compile(r"iteration-\d{8,}")
_HIDDEN = (".partial-", ".gone-")  # being written, being deleted


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("iteration-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=iteration_of)


def expired(iterations: Sequence[int], max_to_keep: int, milestone: int) -> list[int]:
    """Which checkpoints need not be kept: all but the newest `max_to_keep` and the multiples of `milestone`.

    Args:
        iterations: of the checkpoints there are.
        max_to_keep: 0 keeps all.
        milestone: iterations between those that are kept for ever; 0 for none.
    """
    old = sorted(iterations)[:-max_to_keep] if max_to_keep else []
    return [iteration for iteration in old if not milestone or iteration % milestone]


def partial_of(folder: Path, iteration: int) -> Path:
    """The hidden folder in which a checkpoint is written."""
    return folder / f".partial-{folder_name(iteration)}"


def begin(folder: Path, iteration: int) -> Path:
    """Makes that folder, empty, for `publish`."""
    partial = partial_of(folder, iteration)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)  # Composer makes it, too, on other ranks
    return partial


def has_state(folder: Path) -> bool:
    """Whether a checkpoint's folder holds something to go on from, in one file or in shares."""
    return (folder / STATE).is_file() or (folder / SHARES).is_file()


def gather_shares(partial: Path) -> None:
    """Moves the shares of a state, for which Composer makes a folder of its own, to the other files."""
    for inner in [path for path in partial.iterdir() if path.is_dir()]:
        for path in inner.iterdir():
            path.rename(partial / path.name)
        inner.rmdir()


def publish(partial: Path, world_size: int = 1) -> Path:
    """Makes a folder of `begin`, once its files are written, the checkpoint that it is to be; gives its path.

    Args:
        world_size: of the processes that trained it.
    """
    final = partial.with_name(partial.name.removeprefix(".partial-"))
    files = sorted(partial.iterdir())
    write_manifest(partial, files, iteration=iteration_of(final), world_size=world_size)
    for path in (*files, partial / MANIFEST, partial):
        _to_disk(path)
    partial.rename(final)
    _to_disk(final.parent)
    return final


def find_fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, in words; "" if they are as they were written. Reads all of them."""
    try:
        files = read_manifest(checkpoint)
        for name, entry in files.items():
            if xxh64(checkpoint / name) != entry.xxh64:
                return f"{checkpoint / name} is not what was written (its hash differs)"
        if not is_of(checkpoint, iteration_of(checkpoint)):
            return f"{checkpoint} is of another iteration than its name says"
    except (DamagedError, OSError) as error:
        return str(error)
    return "" if STATE in files or SHARES in files else f"{checkpoint / STATE} is missing"


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint that is not gone on from, so that it is no longer counted; gives its new path."""
    for number in range(1, 10_000):
        aside = checkpoint.with_name(f"set-aside-{number}-{checkpoint.name}")
        if not aside.exists():
            return checkpoint.rename(aside)
    raise FileExistsError(f"{checkpoint.parent} holds thousands of checkpoints set aside; delete them")


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint, gone from sight at once."""
    hidden = checkpoint.with_name(f".gone-{checkpoint.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Deletes what processes that were killed left half written or half deleted. None may be at work in `folder`."""
    for prefix in _HIDDEN:
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Waits until a file or a folder's entries would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems do not have this for folders.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)
