"""Data workers: what they raise, and what they make of signals."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

from dinocomp.errors import DataError

_LOOK_SECONDS = 5
_JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what a whole job is told to stop with


class PlainLoader(DataLoader):
    """A DataLoader whose errors are for the person at the keyboard.

    torch wraps what a worker raises in that worker's traceback, and has its own words for workers that hang or die. And
    its workers are not ended by the signals of a job that is told to stop.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, worker_init_fn=leave_signals_to_parent, **settings)

    def __iter__(self) -> Iterator[Any]:
        # Begun here: a resumed run counts on when seeds are drawn.
        if not self.num_workers:
            return _Plainly(super().__iter__(), self.timeout)
        there = set(multiprocessing.active_children())
        with _born_deaf(self.multiprocessing_context):
            batches = super().__iter__()
        started = WeakSet(set(multiprocessing.active_children()) - there)
        Finalize(None, _end_at_exit, (started,), exitpriority=0)
        return _Plainly(batches, self.timeout)


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


@contextlib.contextmanager
def _born_deaf(context: Any) -> Iterator[None]:
    """Processes that are started meanwhile begin with a job's signals blocked: they come to their handlers late.

    Between its start and `leave_signals_to_parent` a worker imports and unpickles for seconds, and a signal would kill
    it. What arrives here meanwhile is handled at the end. A fork server that this starts stays deaf, which keeps it
    alive, too, but whatever else is forked from it has to unblock these signals; one that ran before keeps its mask,
    and gives it to the workers.

    Args:
        context: of multiprocessing, for the workers; None for the default one.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # asked first: blocking may already run a handler that raises
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
        if (context or multiprocessing).get_start_method() != "fork":
            resource_tracker.ensure_running()  # deaf, too; it unblocks two of them here when it has to start
            signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_at_exit(workers: WeakSet[BaseProcess]) -> None:
    """A worker that was told to leave before it could listen does not: another's SIGTERM hid that of its parent.

    Python would wait for it for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker was killed
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(1)
        if worker.is_alive():
            worker.kill()


def leave_signals_to_parent(worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`: the worker works on when a whole job is told to stop.

    A terminal and a scheduler send their signals to every process. The training process finishes its step then, for
    which it needs the workers; one that had left would be an error. Those that came since `_born_deaf` are dropped
    here, or left to `_leave_with_parent`.
    """
    ignored = {signal.SIGINT, signal.SIGUSR1}
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # now, and in the threads to come
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """SIGTERM from the training process is how torch ends its workers; from anybody else it is no news.

    A training process that was killed tells nobody. torch sees that it is gone where it was the worker's parent in the
    system's eyes; a worker that a fork server made has to look for itself.
    """
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, _LOOK_SECONDS)
        if received and received.si_pid == parent.pid:
            break
    os._exit(0)
