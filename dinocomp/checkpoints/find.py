"""Where a run goes on: the newest checkpoint that is whole, here or in the object store."""

from dataclasses import dataclass
from pathlib import Path

from composer.utils import dist

from dinocomp.checkpoints.folder import SHARES, STATE, TEACHER, find_fault, list_checkpoints, set_aside
from dinocomp.checkpoints.manifest import DamagedError, iteration_of
from dinocomp.checkpoints.plain import check_shares, check_state
from dinocomp.checkpoints.remote import RemoteFolder
from dinocomp.checkpoints.store import RemoteError
from dinocomp.distributed import on_rank_0
from dinocomp.errors import ConfigError
from dinocomp.output import RUN_FILES


@dataclass(frozen=True)
class Found:
    """What a run goes on from.

    Attributes:
        checkpoint: None for a fresh start.
        passed_over: a line for each newer checkpoint that is damaged.
        damaged: those of them that are here.
        seen: all that were here.
    """

    checkpoint: Path | None
    passed_over: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()
    seen: tuple[Path, ...] = ()


def find_checkpoint(folder: Path, resume: str, remote: RemoteFolder | None = None) -> Found:
    """The checkpoint to go on from, the same on every rank: rank 0 looks, and fetches it where it is only remote.

    Args:
        folder: of the run's checkpoints; need not exist.
        resume: `auto` for the newest whole one, if there is any checkpoint; `must` to insist on one; `never` to insist
            that there is none.
        remote: where there may be more of them, on rank 0.

    Raises:
        ConfigError: one is needed and there is none, a fresh start is asked for where there are some, all are damaged,
            or a rank does not see what rank 0 sees.
        WeightsError: the newest whole one holds code.
    """

    def look() -> Found:
        try:
            return _look(folder, resume, remote)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be read or written: {error}; see to the disk") from error

    found = on_rank_0(look)
    if found.checkpoint and not found.checkpoint.is_dir():
        raise ConfigError(
            f"rank 0 goes on from {found.checkpoint}, which rank {dist.get_global_rank()} does not see. "
            "Put train.output_dir on storage that all machines share."
        )
    return found


def _look(folder: Path, resume: str, remote: RemoteFolder | None) -> Found:
    if old := sorted(folder.glob("iteration-*.pt")):
        raise ConfigError(
            f"{folder} holds checkpoints of an earlier dinocomp ({old[-1].name}), written otherwise. Start from "
            f"their weights, with MODEL.WEIGHTS={old[-1]} and another train.output_dir, or move them away."
        )
    here = {iteration_of(path): path for path in list_checkpoints(folder)}
    there = set(remote.list_whole()) if remote else set()
    places = str(folder) + (f" or {remote.address}" if remote else "")
    if resume == "must" and not (here or there):
        raise ConfigError(
            f"checkpoint.resume=must, but there is no checkpoint in {places}. Check train.output_dir, "
            "or type checkpoint.resume=auto to start from scratch where there is none."
        )
    if resume == "never" and (here or there):
        raise ConfigError(
            f"checkpoint.resume=never, but there are checkpoints in {places} (the newest: iteration "
            f"{max([*here, *there])}). Give another train.output_dir{' and checkpoint.remote' if there else ''}, or "
            "move them away."
        )
    passed_over, damaged = [], []
    for iteration in sorted({*here, *there}, reverse=True):
        path = here.get(iteration)
        fault = find_fault(path) if path else ""
        if fault:
            passed_over.append(f"{path.name} is passed over: {fault}")
        if (fault or not path) and iteration in there:
            if path:
                set_aside(path)  # its place is needed
            path, reason = _fetch(remote, iteration, folder, with_files=iteration not in here)
            fault = ""
            if reason:
                passed_over.append(reason)
        elif fault:
            damaged.append(path)
        if path and not fault:
            check_shares(path / SHARES) if (path / SHARES).exists() else check_state(path / STATE)
            return Found(path, tuple(passed_over), tuple(damaged), tuple(list_checkpoints(folder)))
    if passed_over:
        # Starting anew would be a silent loss of all that they stand for.
        raise ConfigError(
            "no checkpoint is whole:\n  " + "\n  ".join(passed_over) + f"\nPut a whole one into {folder}, or give "
            "another train.output_dir to start from scratch, or from the weights here "
            f"(MODEL.WEIGHTS={folder.parent / TEACHER})."
        )
    return Found(None)


def _fetch(remote: RemoteFolder, iteration: int, folder: Path, with_files: bool) -> tuple[Path | None, str]:
    """A checkpoint from the object store; or why it is none.

    Args:
        with_files: whether the run has got further there than here, so that its small files come from there, too.

    Raises:
        RemoteError: the store does not answer or refuses: what is there is not known to be lost.
    """
    try:
        path = remote.download(iteration, folder)
    except (RemoteError, DamagedError) as error:
        if isinstance(error, DamagedError) or isinstance(error.__cause__, DamagedError):
            return None, f"iteration {iteration} in {remote.address} is passed over: {error}"
        raise
    for name in RUN_FILES if with_files else ():
        remote.download_file(name, folder.parent / name)
    return path, ""
