"""Where a run goes on."""

import zipfile
from pathlib import Path

from composer.utils import dist

from dinocomp.callbacks.checkpoints import list_checkpoints
from dinocomp.errors import ConfigError


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, the same on every rank: rank 0 looks.

    Args:
        resume: `auto` for the newest if there is one, `must` to insist on it, `never` to insist that there is none.

    Raises:
        ConfigError: one is needed and there is none, a fresh start is asked for where there are some, or a rank does
            not see what rank 0 sees, or the newest is damaged.
    """
    shared = [list_checkpoints(folder) if dist.get_global_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    (found,) = shared
    if resume == "must" and not found:
        raise ConfigError(
            f"checkpoint.resume=must, but there is no checkpoint in {folder}. Check train.output_dir, "
            "or type checkpoint.resume=auto to start from scratch where there is none."
        )
    if resume == "never" and found:
        raise ConfigError(
            f"checkpoint.resume=never, but {folder} holds {len(found)} checkpoints (the newest: {found[-1].name}). "
            "Give another train.output_dir, or move that folder away."
        )
    if not found:
        return None
    if not found[-1].is_file():
        raise ConfigError(
            f"rank 0 goes on from {found[-1]}, which rank {dist.get_global_rank()} does not see. "
            "Put train.output_dir on storage that all machines share."
        )
    if not zipfile.is_zipfile(found[-1]):  # torch's files are; a cut one has lost the directory at its end
        raise ConfigError(
            f"{found[-1]} is no whole checkpoint ({found[-1].stat().st_size} bytes; a full disk or a broken copy?). "
            "Delete it, and the run goes on from the one before it."
        )
    return found[-1]
