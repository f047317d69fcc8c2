"""Reading torch's files without running what they hold."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    except (pickle.UnpicklingError, LookupError, ValueError, TypeError, AttributeError) as error:  # as for any text
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
