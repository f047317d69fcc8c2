"""Counts the bytes of all tensors that live, at every operator: exact, whatever the device, also for fake tensors."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While entered, `now` and `peak` are bytes of storages that operators have made and nothing has freed yet.

    Scratch memory inside a kernel, the allocator's rounding and what a GPU's libraries take are not seen.

    Args:
        before: tensors that exist already and count.
    """

    def __init__(self, before: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}  # by id of the storage
        self._watches: dict[int, weakref.ref] = {}
        for tensor in before:
            self._see(tensor)

    def reset_peak(self) -> None:
        """From here on `peak` is the most since now."""
        self.peak = self.now

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._watches:
            self._watches[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))
        self.now += size - self._sizes.get(key, 0)  # a storage may have been resized
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        del self._watches[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return out
