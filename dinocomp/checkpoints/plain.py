"""Reading torch's files without running what they hold."""

import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dinocomp.errors import WeightsError

# What Composer's checkpoints hold beside tensors: times, versions and the states of numpy's generator. All are plain.
_PLAIN = [
    timedelta,
    torch.torch_version.TorchVersion,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    np.empty(0).__reduce__()[0],  # how numpy rebuilds an array; its module differs between numpy 1 and 2
]
# What the list of a sharded state's tensors is made of.
_METADATA = "torch.distributed.checkpoint.metadata"
_METADATA_CLASSES = {
    *((_METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
    *(("pathlib", f"{kind}Path") for kind in ("Posix", "Windows")),
    *(("pathlib._local", f"{kind}Path") for kind in ("Posix", "Windows")),
}
_NOT_PLAIN = (pickle.UnpicklingError, LookupError, ValueError, TypeError, AttributeError)  # as for any text
_UNREADABLE = (*_NOT_PLAIN, RuntimeError, EOFError, OSError, CheckpointException)
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own variable, stronger than the argument


@contextmanager
def only_plain_types() -> Iterator[None]:
    """Inside, every `torch.load` refuses a file with more than tensors and plain values.

    Composer loads a run's checkpoint with ``weights_only=False``, which runs whatever code the file holds.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_PLAIN):
            yield
    finally:
        os.environ.pop(_FORCE)
        if before is not None:
            os.environ[_FORCE] = before


def load_plain(path: Path, *, mmap: bool = False) -> Any:
    """The content of a .pt or .pth file, on the CPU.

    Args:
        mmap: leave the tensors on the disk until they are used.

    Raises:
        WeightsError: the file holds other objects than tensors and plain values, or is damaged.
    """
    try:
        with only_plain_types():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except _NOT_PLAIN as error:
        raise WeightsError(
            f"{path} is no file of weights, or holds more than tensors and plain values, which could run code when it "
            "is loaded. Save its state_dict alone (torch.save(model.state_dict(), ...)), or give a .safetensors file."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged or cut short ({path.stat().st_size} bytes); copy it again ({str(error) or 'empty'})"
        ) from error


def check_state(path: Path) -> None:
    """That Composer may load the checkpoint at `path`: nothing in it would be executed.

    Raises:
        WeightsError: it holds code, or is damaged.
    """
    content = load_plain(path, mmap=True)
    # Composer evaluates the names of a checkpoint's algorithms as Python; dinocomp's runs have none.
    if not isinstance(content, dict) or "state" not in content or content["state"].get("algorithms"):
        raise WeightsError(f"{path} is no checkpoint that dinocomp wrote, and is not loaded")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a list of tensors")
        return super().find_class(module, name)


def check_shares(metadata: Path) -> None:
    """The same of a sharded state, whose list of tensors (`metadata`) torch unpickles with whatever it holds.

    What the shares themselves hold is refused where they are loaded, see `only_plain_types`.

    Raises:
        WeightsError: it holds code, or is damaged.
    """
    try:
        with metadata.open("rb") as file:
            content = _MetadataUnpickler(file).load()
        entries = content.state_dict_metadata
        algorithms = {"state.algorithms": None}
        # Lists of plain values are one entry; one with tensors would be an entry for each of its items.
        nested = {name.rpartition(".")[0] for name in entries}
        if nested & entries.keys() or "state.algorithms" in nested or "state.algorithms" not in entries:
            raise ValueError("it lists other things than a run of dinocomp")
        with only_plain_types(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is read by one process
            dcp.load(algorithms, checkpoint_id=str(metadata.parent), no_dist=True)
        if algorithms["state.algorithms"]:
            raise ValueError("it names algorithms, whose names Composer executes")
    except _UNREADABLE as error:
        raise WeightsError(
            f"{metadata.parent} is no checkpoint that dinocomp wrote, or is damaged, and is not loaded ({error})"
        ) from error
