"""Errors of a loader's workers, as they were meant."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from dinocomp.errors import DataError


class PlainLoader(DataLoader):
    """A DataLoader whose errors are for the person at the keyboard.

    torch wraps what a worker raises in that worker's traceback, and has its own words for workers that hang or die.
    """

    def __iter__(self) -> Iterator[Any]:
        return _Plainly(super().__iter__(), self.timeout)  # begun here: a resumed run counts on when seeds are drawn


class _Plainly:
    def __init__(self, batches: Iterator[Any], timeout: float) -> None:
        self.batches = batches
        self.timeout = timeout

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.batches)
        except DataError as error:
            # "Caught DataError in ... Original Traceback ... dinocomp.errors.DataError: MESSAGE", and what it came of.
            _, wrapped, traceback = str(error).partition("Original Traceback")
            if not wrapped:
                raise
            name = f"{type(error).__module__}.{type(error).__qualname__}: "
            raise type(error)(traceback.rpartition(name)[2].strip()) from error
        except RuntimeError as error:
            if "timed out" in str(error):
                raise DataError(
                    f"the data workers gave no batch for data.timeout_seconds={self.timeout:g}: see whether the disk "
                    "or store with the images answers, then start again (the run resumes), or raise "
                    "data.timeout_seconds"
                ) from error
            if "DataLoader worker" in str(error):
                raise DataError(
                    f"a data worker died ({error}), perhaps for want of memory: start again (the run resumes), with a "
                    "smaller train.num_workers or data.prefetch_factor"
                ) from error
            raise
