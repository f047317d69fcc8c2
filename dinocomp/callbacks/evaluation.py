"""Every few thousand steps, and at the end: what the teacher's features are worth."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from safetensors import SafetensorError

from dinocomp.callbacks.stop import StopOnSignal
from dinocomp.data import Images
from dinocomp.distributed import on_rank_0
from dinocomp.evaluate import extract_features, gather_features, knn_accuracy
from dinocomp.method import DINOv2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledPair:
    """Images whose labels are known, and images to guess them for."""

    train: Images
    val: Images


class OnlineEvaluation(Callback):
    """k-NN accuracy of the teacher on a labelled pair, and a copy of the teacher at each evaluation.

    Args:
        pair: what to classify; None evaluates nothing and only keeps the copies.
        folder: gets `evaluation.jsonl` and, at each period, `evaluation/iteration-N/teacher.safetensors`.
        period: iterations between evaluations; 0 for none but the last.
        at_start: evaluate the weights that the run starts from.
        resize, crop: of the evaluation view, in pixels.
        ks, temperature: see `knn_accuracy`.
        skip_bad: whether images that cannot be decoded are left out; else they are an error.
        export_teacher: gives what writes the teacher, of an iteration, to a path; all ranks call it.
        stop: once it asks for the end, nothing is evaluated any more; the run that goes on makes up for it.

    Attributes:
        accuracy: iteration -> {k: top-1 accuracy}, of this process and, from the file, of those before it.
    """

    def __init__(
        self,
        model: DINOv2,
        pair: LabelledPair | None,
        *,
        folder: Path,
        period: int,
        at_start: bool,
        resize: int,
        crop: int,
        ks: Sequence[int],
        temperature: float,
        batch_size: int,
        num_workers: int,
        timeout_seconds: float,
        autocast: torch.dtype | None,
        skip_bad: bool,
        export_teacher: Callable[[], Callable[[Path, int], None]],
        stop: StopOnSignal,
    ) -> None:
        self.model = model
        self.pair = pair
        self.folder = folder
        self.path = folder / "evaluation.jsonl"
        self.period = period
        self.at_start = at_start
        self.view = {"resize": resize, "crop": crop}
        self.ks, self.temperature = ks, temperature
        self.loading = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "timeout_seconds": timeout_seconds,
            "autocast": autocast,
            "skip_bad": skip_bad,
        }
        self.export_teacher = export_teacher
        self.stop = stop
        self.accuracy = on_rank_0(lambda: _read(self.path))

    def fit_start(self, state: State, logger: Logger) -> None:
        finished = int(state.timestamp.batch)
        self.accuracy = {i: a for i, a in self.accuracy.items() if i <= finished}
        if self.at_start and finished == 0:
            self._evaluate(0, logger)
        copied = on_rank_0(self._copy_of(finished).exists)
        if self._is_due(finished) and not (copied and (self.pair is None or finished in self.accuracy)):
            self._keep_and_evaluate(finished, logger)  # the process before this one did not come to it

    def batch_end(self, state: State, logger: Logger) -> None:
        finished = int(state.timestamp.batch)
        if self._is_due(finished) and not self.stop.requested:
            self._keep_and_evaluate(finished, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Also for a run whose training had ended when it was killed before this."""
        finished = int(state.timestamp.batch)
        if finished not in self.accuracy and not self.stop.requested:
            self._evaluate(finished, logger)

    def _is_due(self, finished: int) -> bool:
        return bool(self.period) and finished > 0 and finished % self.period == 0

    def _copy_of(self, iteration: int) -> Path:
        return self.folder / "evaluation" / f"iteration-{iteration:08d}" / "teacher.safetensors"

    def _keep_and_evaluate(self, iteration: int, logger: Logger) -> None:
        write = self.export_teacher()
        if dist.get_global_rank() == 0:
            with _no_reason_to_stop(self._copy_of(iteration)):
                write(self._copy_of(iteration), iteration)
        self._evaluate(iteration, logger)

    def _evaluate(self, iteration: int, logger: Logger) -> None:
        if self.pair is None:
            return
        backbone = self.model.shells("teacher")["backbone"]
        # Its shapes are others than those that training has compiled blocks for.
        with torch.compiler.set_stance("force_eager"):
            train, val = (
                extract_features(backbone, images, normalize=self.model.normalize, **self.view, **self.loading)
                for images in (self.pair.train, self.pair.val)
            )
        accuracy = knn_accuracy(
            gather_features(train, len(self.pair.train)),
            val,
            ks=self.ks,
            temperature=self.temperature,
            device=next(backbone.parameters()).device,
        )
        self.accuracy[iteration] = accuracy
        logger.log_metrics({f"knn/top1_k{k}": value for k, value in accuracy.items()})
        if dist.get_global_rank() == 0:
            shown = "  ".join(f"k={k} {value:.1%}" for k, value in accuracy.items())
            log.info("k-NN accuracy of the teacher at iteration %d: %s", iteration, shown)
            lines = [json.dumps({"iteration": i, "knn_top1": a}) + "\n" for i, a in sorted(self.accuracy.items())]
            with _no_reason_to_stop(self.path):
                partial = self.path.with_suffix(".partial")
                partial.write_text("".join(lines))
                partial.replace(self.path)


@contextmanager
def _no_reason_to_stop(path: Path) -> Iterator[None]:
    """A full disk costs this file, not the run: whether checkpoints can be written is seen there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be written: %s", path, error)


def _read(path: Path) -> dict[int, dict[int, float]]:
    """What earlier processes of the run measured."""
    if not path.exists():
        return {}
    accuracy = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line that somebody or a full disk cut short: it is measured again
            continue
        accuracy[record["iteration"]] = {int(k): value for k, value in record["knn_top1"].items()}
    return accuracy
