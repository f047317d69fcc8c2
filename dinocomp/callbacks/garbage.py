"""Python's search for circular garbage, at iterations of our choice."""

import gc

from composer import Callback, Logger, State


class CollectGarbage(Callback):
    """Has Python look for circular garbage every `every` iterations, and not when it likes; 0 leaves that to Python.

    It stops a process for a moment. When each rank does so at another time, all ranks wait each time.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def fit_start(self, state: State, logger: Logger) -> None:
        if self.every:
            gc.disable()

    def batch_end(self, state: State, logger: Logger) -> None:
        searches, rest = divmod(int(state.timestamp.batch), self.every or 1)
        if self.every and rest == 0:
            # What has lived long is seldom garbage and takes longest to look through: that in every tenth search only.
            gc.collect(1 if searches % 10 else 2)

    def fit_end(self, state: State, logger: Logger) -> None:
        if self.every:
            gc.enable()

    def close(self, state: State, logger: Logger) -> None:
        self.fit_end(state, logger)  # also where training ends by an error
