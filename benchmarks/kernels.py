"""What a device computes in one training step: torch's profiler from one step's end to the next one's."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from composer import Callback, Logger, State
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

_LINES = 60  # of the table
_COPIES = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Profile:
    """Of one step; `kernels` and `busy_seconds` are None on a CPU."""

    operators: int  # torch's operators, those that call others and those that are called
    kernels: int | None
    busy_seconds: float | None  # in which the GPU ran at least one kernel or copy


class ProfileStep(Callback):
    """Profiles one step, and writes its table of kernels (GPU) or operators (CPU), the longest first.

    Args:
        step: number of the step, from 1; in it, times are longer than without the profiler.

    Attributes:
        found: None until the step is over.
    """

    def __init__(self, step: int, path: Path, *, gpu: bool) -> None:
        self.step = step
        self.path = path
        self.gpu = gpu
        self.found: Profile | None = None
        self._profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])])

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        finished = int(state.timestamp.batch)
        if finished not in (self.step - 1, self.step):
            return
        if self.gpu:
            torch.cuda.synchronize()  # else kernels of the step before would be in it, and its own last ones not
        if finished == self.step - 1:
            self._profile.start()
        else:
            self._profile.stop()
            self._write()

    def _write(self) -> None:
        sort_by = "self_device_time_total" if self.gpu else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=sort_by, row_limit=_LINES, max_name_column_width=100)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(table + "\n", encoding="utf-8")
        self.found = summary(self._profile.events(), gpu=self.gpu)


def summary(events: Iterable[FunctionEvent], *, gpu: bool) -> Profile:
    """Numbers of what the profiler has seen."""
    events = list(events)
    operators = sum(e.device_type == DeviceType.CPU and e.name.startswith("aten::") for e in events)
    if not gpu:
        return Profile(operators, None, None)
    # Ranges that code has named appear on the device as well, as long as what is in them.
    device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    kernels = sum(not e.name.startswith(_COPIES) for e in device)
    return Profile(operators, kernels, _covered([(e.time_range.start, e.time_range.end) for e in device]) / 1e6)


def _covered(ranges: list[tuple[float, float]]) -> float:
    """The length of the union of ranges: kernels on several streams run at once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
