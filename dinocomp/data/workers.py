"""Data workers and signals."""

import os
import signal
import threading


def leave_signals_to_parent(worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`: the worker works on when a whole job is told to stop.

    A terminal and a scheduler send their signals to every process. The training process finishes its step then, for
    which it needs the workers; one that had left would be an error.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # now, and in the threads to come
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """SIGTERM from the training process is how torch ends its workers; from anybody else it is no news."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
