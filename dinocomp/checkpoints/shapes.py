"""A checkpoint's state in one file, or in a share of each rank: either is read by any run."""

import logging
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from composer.utils import dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from dinocomp.checkpoints.folder import SHARES, STATE
from dinocomp.checkpoints.plain import check_shares, check_state, load_plain, only_plain_types
from dinocomp.distributed import on_rank_0
from dinocomp.errors import ConfigError, DinocompError, WeightsError

log = logging.getLogger(__name__)

_MODEL = "state.model."  # where Composer has the model's tensors


@contextmanager
def state_to_load(checkpoint: Path | None, *, shares: bool) -> Iterator[str | None]:
    """What Composer's Trainer is to load: the state in the shape that it takes, None for a fresh start.

    Composer loads a file where networks are whole, and shares where they are sharded. The other shape is made beside
    the checkpoint, by rank 0, and deleted in the end: that needs the room of one more state, on the disk and in the
    memory of its machine.

    Args:
        shares: whether this run shards its networks.

    Raises:
        ConfigError: there is no room on the disk.
        WeightsError: a share is damaged or holds code; also where that is seen by whoever loads what is given.
    """
    if checkpoint is None:
        yield None
        return
    saved_in_shares = on_rank_0(lambda: (checkpoint / SHARES).is_file())  # shared storage may tell ranks at other times
    try:
        if shares == saved_in_shares:
            yield str(checkpoint if shares else checkpoint / STATE)
        else:
            with _rewritten(checkpoint, shares) as path:
                yield path
    except CheckpointException as error:
        raise _refused(checkpoint, error) from error


def what_failed(error: CheckpointException) -> str:
    """What the ranks have met, without their tracebacks."""
    failures = [failure for failure, _ in error.failures.values()]
    return "; ".join(sorted({(str(failure) or type(failure).__name__).splitlines()[0] for failure in failures}))


def _refused(checkpoint: Path, error: CheckpointException) -> WeightsError:
    reason = what_failed(error)
    if "Missing key" in reason:
        return WeightsError(
            f"{checkpoint} was saved by another kind of run, and lacks what this one saves ({reason}). Go on with the "
            "device and precision that it was saved with, or start from its weights (MODEL.WEIGHTS)."
        )
    return WeightsError(f"{checkpoint} is damaged or holds code, and is not loaded ({reason})")


@contextmanager
def _rewritten(checkpoint: Path, shares: bool) -> Iterator[str]:
    made = checkpoint.with_name(f".partial-loading-{checkpoint.name}")  # swept, should this process be killed

    def make() -> str:
        log.info(
            "rewriting the state of %s: it was saved with %s networks", checkpoint, "whole" if shares else "sharded"
        )
        try:
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            with only_plain_types():
                if shares:
                    torch_save_to_dcp(checkpoint / STATE, made)
                    return str(made)
                dcp_to_torch_save(checkpoint, made / STATE)
            check_state(made / STATE)  # what lay in shares was not seen as a whole before
            return str(made / STATE)
        except (OSError, RuntimeError, CheckpointException, DinocompError) as error:
            shutil.rmtree(made, ignore_errors=True)
            if isinstance(error, DinocompError):
                raise
            if isinstance(error, CheckpointException) and not shares:  # met in reading
                raise _refused(checkpoint, error) from error
            kind = "whole" if shares else "sharded"
            reason = what_failed(error) if isinstance(error, CheckpointException) else error
            raise ConfigError(
                f"{checkpoint} was saved with {kind} networks, and cannot be rewritten for this run: {reason}. Make "
                "room beside it (as much as it takes itself), or start with the strategy that it was saved with "
                "(parallelism.strategy)."
            ) from error

    path = on_rank_0(make)
    try:
        yield path
    finally:
        if dist.get_global_rank() == 0:  # Composer ends loading by comparing notes of all ranks: none still reads
            shutil.rmtree(made, ignore_errors=True)


def read_shares(checkpoint: Path) -> dict[str, Tensor]:
    """The model's tensors of a checkpoint in shares, whole, by name, on the CPU. Nothing in it is executed.

    Raises:
        WeightsError: it holds more than tensors and plain values.
    """
    check_shares(checkpoint / SHARES)
    reader = dcp.FileSystemReader(str(checkpoint))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(_MODEL) and hasattr(entry, "size")
    }
    try:
        with only_plain_types():
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise _refused(checkpoint, error) from error
    return {name.removeprefix(_MODEL): tensor for name, tensor in tensors.items()}


def check_names(state: str, names: Collection[str]) -> None:
    """That the model's tensors in a state that Composer is to load, a file or a folder of shares, are `names`: Composer
    takes what fits and drops the rest.

    Raises:
        WeightsError: naming the first that are missing or unknown.
    """
    path = Path(state)
    if path.is_dir():
        listed = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
        saved = {name.removeprefix(_MODEL) for name in listed if name.startswith(_MODEL)}
    else:
        saved = load_plain(path, mmap=True)["state"]["model"].keys()
    odd = [f"missing: {name}" for name in sorted({*names} - saved)]
    odd += [f"not in the networks: {name}" for name in sorted(saved - {*names})]
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise WeightsError(f"{state} does not fit the configured networks: {', '.join(odd[:5])}{more}")
