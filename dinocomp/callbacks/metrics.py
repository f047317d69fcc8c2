"""Every few steps: a line to read, a line to plot, and the same numbers to the loggers."""

import json
import logging
import math
import resource
import statistics
import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path

import torch
from composer import Callback, Logger, State
from composer.utils import dist

from dinocomp.callbacks.bad_images import BadImages
from dinocomp.callbacks.clip import ClipGradients
from dinocomp.method import DINOv2
from dinocomp.schedules import Schedules

log = logging.getLogger(__name__)


class Metrics(Callback):
    """Collects the numbers of every `period`-th iteration.

    They go to `folder`/metrics.jsonl (one JSON object a line), to the progress line on standard output, to the log, and
    to Composer's loggers. `loss/total` and the terms (`loss/...`) are what is optimised, of that iteration's batch and
    the mean over ranks. Speeds are those since the last line. Memory is the peak of this process, on its GPU if it has
    one.

    Args:
        model, clip, schedules, bad_images: where the numbers come from.
        period: iterations between lines; the first and the last iteration have one, too.
        total: iterations of the run.
    """

    def __init__(
        self,
        model: DINOv2,
        clip: ClipGradients,
        schedules: Schedules,
        bad_images: BadImages,
        *,
        folder: Path,
        period: int,
        total: int,
    ) -> None:
        self.model = model
        self.clip = clip
        self.schedules = schedules
        self.bad_images = bad_images
        self.path = folder / "metrics.jsonl"
        self.period = period
        self.total = total
        self.window_start = self.wait_start = self.waited = 0.0
        self.window_images = self.window_steps = 0
        self.window_open = False
        self.step_seconds: deque[float] = deque(maxlen=50)

    def fit_start(self, state: State, logger: Logger) -> None:
        self.window_open = False
        if dist.get_global_rank() == 0:
            _drop_lines_after(self.path, int(state.timestamp.batch))

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.wait_start = time.perf_counter()
        if not self.window_open:  # here, so that evaluations and checkpoints do not count as training
            self._open_window(state)

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.waited += time.perf_counter() - self.wait_start

    def batch_end(self, state: State, logger: Logger) -> None:
        finished = int(state.timestamp.batch)
        self.window_steps += 1
        if finished % self.period and finished not in (1, self.total):
            return
        record = self._record(state, finished)
        logger.log_metrics({name: value for name, value in record.items() if name != "iteration"})
        if dist.get_global_rank() == 0:
            # JSON has no NaN and no infinity.
            line = {name: value if math.isfinite(value) else None for name, value in record.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._show(record, finished)
        self.window_open = False

    def _open_window(self, state: State) -> None:
        self.window_open = True
        self.window_start, self.waited, self.window_steps = time.perf_counter(), 0.0, 0
        self.window_images = int(state.timestamp.sample)

    def _record(self, state: State, finished: int) -> dict[str, float]:
        on_device = {f"loss/{name}": term for name, term in self.model.terms.items()}
        on_device |= {f"grad_norm/{name}": norm for name, norm in self.clip.norms.items()}
        values = torch.stack([value.float().reshape(()) for value in on_device.values()])
        dist.all_reduce(values)
        # The one place that waits for the device.
        numbers = dict(zip(on_device, (values / dist.get_world_size()).tolist(), strict=True))

        seconds = time.perf_counter() - self.window_start
        used = self.schedules.at(finished - 1)
        record = {
            "iteration": finished,
            "loss/total": sum(value for name, value in numbers.items() if name.startswith("loss/")),
            **numbers,
            "lr": used.lr,
            "last_layer_lr": used.last_layer_lr,
            "weight_decay": used.weight_decay,
            "momentum": used.momentum,
            "teacher_temp": used.teacher_temp,
            "images_per_second": (int(state.timestamp.sample) - self.window_images) / seconds,
            "seconds_per_iteration": seconds / self.window_steps,
            "data_wait": self.waited / seconds,
            "bad_images": len(self.bad_images.met),
        }
        if state.device.name == "gpu":
            record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        else:
            record["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return record

    def _show(self, record: dict[str, float], finished: int) -> None:
        self.step_seconds.append(record["seconds_per_iteration"])
        left = (self.total - finished) * statistics.median(self.step_seconds)  # the first step of a process is slow
        losses = {n.removeprefix("loss/"): value for n, value in record.items() if n.startswith("loss/")}
        total = losses.pop("total")
        terms = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        line = (
            f"[{finished}/{self.total}] eta {timedelta(seconds=round(left))} lr {record['lr']:.2e} "
            f"loss {total:.4f} ({terms}) {record['images_per_second']:.0f} images/s "
            f"data wait {record['data_wait']:.0%} memory {record['memory_gb']:.1f} GB"
        )
        log.debug(line)  # the log file has every line; a terminal has one that moves
        if sys.stdout.isatty():
            end = "\n" if finished == self.total else ""
            print(f"\r\x1b[2K{line}", end=end, flush=True)
        else:
            print(line, flush=True)


def _drop_lines_after(path: Path, iteration: int) -> None:
    """A run that resumes writes some iterations again; what an earlier try wrote of them goes."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except ValueError:  # the line that was being written when the process was killed
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
