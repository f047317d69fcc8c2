"""Every few steps: a line to read, a line to plot, and the same numbers to the loggers."""

import json
import logging
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from composer import Callback, Logger, State
from composer.utils import dist

from dinocomp.callbacks.bad_images import BadImages
from dinocomp.callbacks.bad_steps import SkipBadSteps
from dinocomp.callbacks.clip import ClipGradients
from dinocomp.errors import TrainingError
from dinocomp.method import DINOv2
from dinocomp.schedules import Schedules
from dinocomp.signs import signs_of_collapse

log = logging.getLogger(__name__)


class Metrics(Callback):
    """Collects the numbers of every `period`-th iteration.

    They go to `folder`/metrics.jsonl (one JSON object a line), to the progress line on standard output, to the log, and
    to Composer's loggers. `loss/total` and the terms (`loss/...`) are what is optimised, of that iteration's batch and
    the mean over ranks. `teacher/...` are the gauges that show collapse; where they show it in several lines on end, a
    warning says so. Speeds are those since the last line. Memory is the peak of this process, on its GPU if it has one.

    Args:
        model, clip, schedules, bad_steps, bad_images: where the numbers come from.
        prototypes: of each loss's head, by loss ("dino", "ibot").
        period: iterations between lines; the first and the last iteration have one, too.
        total: iterations of the run.
    """

    def __init__(
        self,
        model: DINOv2,
        clip: ClipGradients,
        schedules: Schedules,
        bad_steps: SkipBadSteps,
        bad_images: BadImages,
        *,
        prototypes: Mapping[str, int],
        folder: Path,
        period: int,
        total: int,
    ) -> None:
        self.model = model
        self.clip = clip
        self.bad_steps = bad_steps
        self.schedules = schedules
        self.bad_images = bad_images
        self.prototypes = prototypes
        self.path = folder / "metrics.jsonl"
        self.period = period
        self.total = total
        self.window_start = self.wait_start = self.waited = 0.0
        self.window_images = self.window_steps = 0
        self.window_open = False
        self.step_seconds: deque[float] = deque(maxlen=50)
        self.collapsed_lines = 0  # on end
        self.can_write = True

    def fit_start(self, state: State, logger: Logger) -> None:
        self.window_open = False
        if dist.get_global_rank() == 0:
            try:
                _drop_lines_after(self.path, int(state.timestamp.batch))
            except OSError as error:
                raise TrainingError(f"{self.path} cannot be written ({error}); make room, and start again") from error

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.wait_start = time.perf_counter()
        if not self.window_open:  # here, so that evaluations and checkpoints do not count as training
            self._open_window(state)

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.waited += time.perf_counter() - self.wait_start

    def batch_start(self, state: State, logger: Logger) -> None:
        self.model.measuring = self._is_due(int(state.timestamp.batch) + 1)

    def batch_end(self, state: State, logger: Logger) -> None:
        finished = int(state.timestamp.batch)
        self.window_steps += 1
        if not self._is_due(finished):
            return
        record = self._record(state, finished)
        logger.log_metrics({name: value for name, value in record.items() if name != "iteration"})
        if dist.get_global_rank() == 0:
            self._write(record)
            self._show(record, finished)
            self._warn_of_collapse(record, finished)
        self.window_open = False

    def _is_due(self, finished: int) -> bool:
        return finished % self.period == 0 or finished in (1, self.total)

    def _write(self, record: dict[str, float]) -> None:
        # JSON has no NaN and no infinity.
        line = {name: value if math.isfinite(value) else None for name, value in record.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.can_write = True
        except OSError as error:  # a line is not worth the run; whether checkpoints can be written is seen there
            if self.can_write:
                log.warning("%s cannot be written to (%s); its lines are lost until it can", self.path, error)
            self.can_write = False

    def _warn_of_collapse(self, record: dict[str, float], finished: int) -> None:
        gauges = {name.removeprefix("teacher/"): value for name, value in record.items() if name.startswith("teacher/")}
        # Before the learning rate is up, centred targets are nearly uniform in healthy runs, too.
        signs = signs_of_collapse(gauges, self.prototypes) if finished > self.schedules.warmup else []
        self.collapsed_lines = self.collapsed_lines + 1 if signs else 0
        # Then again ever more rarely: at 5, 50, 500 lines.
        if self.collapsed_lines in (5 * 10**n for n in range(9)):
            log.warning(
                "iteration %d: this looks like collapse: %s -> check that teacher.teacher_temp lies below "
                "dino.student_temp, lower optim.base_lr, lengthen optim.warmup_epochs, give larger batches, or type "
                "recipes=[sinkhorn]; go on from a checkpoint before it began (see teacher/ in metrics.jsonl)",
                finished,
                "; ".join(signs),
            )

    def _open_window(self, state: State) -> None:
        self.window_open = True
        self.window_start, self.waited, self.window_steps = time.perf_counter(), 0.0, 0
        self.window_images = int(state.timestamp.sample)

    def _record(self, state: State, finished: int) -> dict[str, float]:
        on_device = {f"loss/{name}": term for name, term in self.model.terms.items()}
        on_device |= {f"grad_norm/{name}": norm for name, norm in self.clip.norms.items()}
        on_device |= {f"teacher/{name}": value for name, value in self.model.gauges().items()}
        values = torch.stack([value.float().reshape(()) for value in on_device.values()])
        dist.all_reduce(values)
        numbers = dict(zip(on_device, (values / dist.get_world_size()).tolist(), strict=True))

        seconds = time.perf_counter() - self.window_start
        used = self.schedules.at(finished - 1)
        record = {
            "iteration": finished,
            "loss/total": sum(value for name, value in numbers.items() if name.startswith("loss/")),
            **numbers,
            "lr": used.lr,
            "last_layer_lr": used.last_layer_lr,
            **({"backbone_lr": used.backbone_lr} if self.schedules.freeze_backbone else {}),
            "weight_decay": used.weight_decay,
            "momentum": used.momentum,
            "teacher_temp": used.teacher_temp,
            "bad_steps": self.bad_steps.count,
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
