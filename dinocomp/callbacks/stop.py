"""When a signal asks for it: the run ends after the step, in order."""

import os
import signal
import threading
import time
from types import FrameType

from composer import Callback, Logger, State
from composer.utils import dist

from dinocomp.distributed import any_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # schedulers' warning, Ctrl-C, Slurm's --signal=USR1
_ONE_REQUEST = 2.0  # seconds: a scheduler and the launcher may each tell a process of the same request


class StopOnSignal(Callback):
    """Ends training after the step in which any rank is told to stop, so that the ranks stay together.

    Composer leaves at once, without a checkpoint. A second signal does so here, too.

    Attributes:
        requested: whether to stop; the same on all ranks, from the end of the step on.
        received: the signal that this rank got, or None.
    """

    def __init__(self) -> None:
        self.requested = False
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[int, object] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        if threading.current_thread() is threading.main_thread():  # Python handles signals nowhere else
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def batch_end(self, state: State, logger: Logger) -> None:
        self.requested = any_rank(self.received is not None)
        if self.requested:
            state.stop_training()

    def is_over(self, grace: float) -> bool:
        """Whether this rank was told to stop more than `grace` seconds ago."""
        return self.received is not None and time.monotonic() - self._since > grace

    def restore(self) -> None:
        """Gives the signals back to whom they were with."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
            if dist.get_global_rank() == 0:
                # Not print, which may be what the signal interrupts.
                text = "stopping in order, with a checkpoint; a second signal leaves at once"
                os.write(2, f"{self.received.name}: {text}\n".encode())
        elif now - self._since > _ONE_REQUEST:
            os._exit(128 + number)
