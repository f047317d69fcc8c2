"""Where the time of a training step goes, told at Composer's events without waiting for the device."""

import time
from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch
from composer import Callback, Logger, State
from composer.core import Event

from dinocomp.build import Run

T = TypeVar("T")

PHASES = {  # in the order of a step, which begins with the first and ends with the last
    "data": "waiting for the loader",
    "prepare": "schedules; with micro-batches, what each needs of the others",
    "to_device": "last gradients dropped, batch to the device",
    "forward": "student and teacher",
    "loss": "the loss of their outputs",
    "backward": "gradients",
    "clip": "gradient norms, and whether they are finite",
    "optimizer": "the update; Composer's own accounts",
    "teacher": "moving averages of the student, centres",
    "rest": "metrics where they are due, the loop",
}

# What of these an event ends: before all other callbacks of the event, after `UpdateTeacher`, after all others.
_FIRST = {
    Event.BEFORE_DATALOADER: "data",  # the very first one starts the clock
    Event.AFTER_DATALOADER: "data",
    Event.AFTER_FORWARD: "forward",
    Event.AFTER_LOSS: "loss",
    Event.AFTER_BACKWARD: "backward",
    Event.BATCH_END: "optimizer",
}
_AFTER_TEACHER = {Event.BATCH_END: "teacher"}
_LAST = {
    Event.BEFORE_TRAIN_BATCH: "prepare",
    Event.BEFORE_FORWARD: "to_device",
    Event.AFTER_TRAIN_BATCH: "clip",
    Event.BATCH_CHECKPOINT: "rest",
}


class Clock(Protocol[T]):
    """Something that can be read now and understood later."""

    def now(self) -> T: ...

    def seconds(self, start: T, end: T) -> float: ...


class HostClock:
    """This process's time; on a CPU that is when work is done."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class StreamClock:
    """When the GPU's current stream comes to where the host stands: nothing is waited for until times are read.

    Time in which the stream has nothing to do, because the host waits for data or is slow to launch kernels, is of the
    phase that the host is in.
    """

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Laps:
    """Time since the last lap, by phase and step; a phase may come several times in a step. Phases add up to steps."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._start = None
        self._laps: list[tuple[str, object]] = []  # (phase, when it ended)

    def lap(self, phase: str) -> None:
        """Ends a phase, which began where the one before it ended; the first call starts the clock."""
        if self._start is None:
            self._start = self.clock.now()
        else:
            self._laps.append((phase, self.clock.now()))

    def steps(self) -> list[dict[str, float]]:
        """Seconds of each phase in each step that has come to its end; on a GPU that waits for the device."""
        found, step, before = [], dict.fromkeys(PHASES, 0.0), self._start
        for phase, end in self._laps:
            step[phase] += self.clock.seconds(before, end)
            before = end
            if phase == list(PHASES)[-1]:
                found.append(step)
                step = dict.fromkeys(PHASES, 0.0)
        return found


class Marks(Callback):
    """Ends phases at events.

    Args:
        ends: the phase that each event ends.
    """

    def __init__(self, laps: Laps, ends: Mapping[Event, str]) -> None:
        self.laps = laps
        self.ends = ends

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in self.ends:
            self.laps.lap(self.ends[event])


def time_phases(run: Run) -> Laps:
    """Has the phases of a run's steps timed, in its own order of callbacks."""
    laps = Laps(StreamClock() if run.start.gpu else HostClock())
    order = run.trainer.state.callbacks
    order.insert(order.index(run.callbacks.teacher) + 1, Marks(laps, _AFTER_TEACHER))
    order.insert(0, Marks(laps, _FIRST))
    order.append(Marks(laps, _LAST))
    return laps
