"""Every few thousand steps, and at the end: what the teacher's features are worth."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from safetensors import SafetensorError

from dinocomp.callbacks.stop import StopOnSignal
from dinocomp.checkpoints.folder import BEST_TEACHER
from dinocomp.distributed import on_rank_0
from dinocomp.errors import WeightsError
from dinocomp.evaluate.label_free import label_free_words
from dinocomp.evaluate.online import (
    Evaluated,
    LabelledPair,
    pixels_of,
    read_evaluations,
    scores_of,
    write_evaluations,
)
from dinocomp.evaluate.pixels import SIDE
from dinocomp.interop import read_about
from dinocomp.method import DINOv2
from dinocomp.signs import fell, news_of_decline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measures:
    """What an evaluation consists of; None for what is left out. All ranks call each of them together.

    Attributes:
        pair: what `knn` is measured on.
        knn: of the teacher's backbone, k -> accuracy.
        pixels: the same of raw pixels, on that backbone's device; measured at iteration 0 alone.
        label_free: of the teacher's backbone, name -> value.
        directions: how many an effective rank among them can be, so that it can be told from a low one.
        pictures: draws the teacher of an iteration.
    """

    pair: LabelledPair | None = None
    knn: Callable[[torch.nn.Module], Mapping[int, float]] | None = None
    pixels: Callable[[torch.nn.Module], Mapping[int, float]] | None = None
    label_free: Callable[[torch.nn.Module], Mapping[str, float]] | None = None
    directions: int = 0
    pictures: Callable[[DINOv2, int, Logger], None] | None = None


class OnlineEvaluation(Callback):
    """Measures the teacher, and keeps a copy of it at each period and of the best one.

    Where the teacher is worse than raw pixels, no better than its start, or has fallen, it says so when that is new.
    Training is as it would be without: no global random generator, no position in the data, no weight is touched.

    Args:
        folder: gets `evaluation.jsonl`, at each period `evaluation/iteration-N/teacher.safetensors`, and
            `best_teacher.safetensors`, the one with the highest k-NN accuracy at the first k.
        period: iterations between evaluations; 0 for none but the last.
        iterations: of the whole run.
        at_start: evaluate the weights that the run starts from, and raw pixels.
        budget: largest share of the time that evaluations take: one that follows too soon is left out.
        export_teacher: gives what writes the teacher, of an iteration, to a path; all ranks call it.
        stop: once it asks for the end, nothing is evaluated any more; the run that goes on makes up for it.
        remedy: what to change where features do not improve.
        from_weights: whether the run started from trained weights.

    Attributes:
        found: iteration -> what was found, by this process and, from the file, by those before it.
    """

    def __init__(
        self,
        model: DINOv2,
        measures: Measures,
        *,
        folder: Path,
        period: int,
        iterations: int,
        at_start: bool,
        budget: float,
        export_teacher: Callable[[], Callable[[Path, int], None]],
        stop: StopOnSignal,
        remedy: str = "",
        from_weights: bool = False,
    ) -> None:
        self.model = model
        self.measures = measures
        self.folder = folder
        self.path = folder / "evaluation.jsonl"
        self.period = period
        self.iterations = iterations
        self.at_start = at_start
        self.budget = budget
        self.export_teacher = export_teacher
        self.stop = stop
        self.remedy = remedy
        self.from_weights = from_weights
        self.found = on_rank_0(lambda: read_evaluations(self.path))
        self.ended = time.monotonic()
        self.took = self.found[max(self.found)].seconds if self.found else 0.0  # the last evaluation
        self.left_out = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        finished = int(state.timestamp.batch)
        self.found = {i: evaluated for i, evaluated in self.found.items() if i <= finished}
        on_rank_0(lambda: self._forget_best_after(finished))
        if self.at_start and finished == 0:
            self._evaluate(0, logger)
        copied = on_rank_0(self._copy_of(finished).exists)
        if self._is_due(finished) and not (copied and self._is_measured(finished)):
            self._keep_and_evaluate(finished, logger)  # the process before this one did not come to it

    def batch_end(self, state: State, logger: Logger) -> None:
        finished = int(state.timestamp.batch)
        if self._is_due(finished) and not self.stop.requested:
            self._keep_and_evaluate(finished, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Also for a run whose training had ended when it was killed before this."""
        finished = int(state.timestamp.batch)
        if not self._is_measured(finished) and not self.stop.requested:
            self._evaluate(finished, logger)

    def _is_due(self, finished: int) -> bool:
        return bool(self.period) and finished > 0 and finished % self.period == 0

    def _is_measured(self, finished: int) -> bool:
        return finished in self.found or self.measures == Measures()

    def _copy_of(self, iteration: int) -> Path:
        return self.folder / "evaluation" / f"iteration-{iteration:08d}" / "teacher.safetensors"

    def _keep_and_evaluate(self, iteration: int, logger: Logger) -> None:
        self._write_teacher(self._copy_of(iteration), iteration)
        if on_rank_0(lambda: self._is_affordable(iteration)):
            self._evaluate(iteration, logger)

    def _write_teacher(self, path: Path, iteration: int) -> None:
        write = self.export_teacher()
        if dist.get_global_rank() == 0:
            with no_reason_to_stop(path):
                write(path, iteration)

    def _is_affordable(self, iteration: int) -> bool:
        """Whether enough has been trained since the last evaluation for one more of its length."""
        wanted = self.took * (1 / self.budget - 1)
        if time.monotonic() - self.ended >= wanted:
            return True
        self.left_out += 1
        log.log(
            logging.INFO if self.left_out == 1 else logging.DEBUG,
            "the evaluation at iteration %d is left out: the last one took %.0f s, and evaluation.budget=%g wants "
            "%.0f s of training before the next (further ones like it are told in train.log alone)",
            iteration,
            self.took,
            self.budget,
            wanted,
        )
        return False

    def _evaluate(self, iteration: int, logger: Logger) -> None:
        backbone = self.model.shells("teacher")["backbone"]
        # Measured once, so no part of the time that the next evaluation is expected to take.
        pixels = self.measures.pixels(backbone) if self.measures.pixels and iteration == 0 else {}
        start = time.monotonic()
        knn, label_free = {}, {}
        # Its shapes are others than those that training has compiled blocks for.
        with torch.compiler.set_stance("force_eager"):
            if self.measures.knn:
                knn = self.measures.knn(backbone)
            if self.measures.label_free:
                label_free = self.measures.label_free(backbone)
        evaluated = Evaluated(iteration, knn, label_free, pixels=pixels)
        if knn:
            k, score = next(iter(knn.items()))  # an earlier process may have asked for others
            if score > max((found.knn[k] for found in self.found.values() if k in found.knn), default=-1.0):
                self._write_teacher(self.folder / BEST_TEACHER, iteration)
        self._keep(evaluated)
        if self.measures.pictures:
            self.measures.pictures(self.model, iteration, logger)  # among them the curves of what was just kept
        self.ended = time.monotonic()
        self.took = self.ended - start
        self._keep(replace(evaluated, seconds=self.took))
        self._tell(self.found[iteration], logger)
        if knn and dist.get_global_rank() == 0:
            self._warn(iteration, next(iter(knn)))

    def _keep(self, evaluated: Evaluated) -> None:
        self.found[evaluated.iteration] = evaluated
        if dist.get_global_rank() == 0:
            with no_reason_to_stop(self.path):
                write_evaluations(self.path, self.found)

    def _tell(self, evaluated: Evaluated, logger: Logger) -> None:
        logger.log_metrics(
            {f"knn/top1_k{k}": value for k, value in evaluated.knn.items()}
            | {f"knn/pixels_k{k}": value for k, value in evaluated.pixels.items()}
            | {f"label_free/{name}": value for name, value in evaluated.label_free.items()}
            | {"evaluation/seconds": evaluated.seconds}
        )
        if dist.get_global_rank() != 0:
            return
        said = []
        if evaluated.knn:
            said.append(f"k-NN accuracy of the teacher at iteration {evaluated.iteration}: {_by_k(evaluated.knn)}")
        if evaluated.pixels:
            said.append(f"of raw pixels ({SIDE} x {SIDE}): {_by_k(evaluated.pixels)}")
        if evaluated.label_free:
            shown = label_free_words(evaluated.label_free, self.measures.directions)
            said.append(f"without labels, the teacher at iteration {evaluated.iteration}: {shown}")
        if said:
            log.info("%s (%.1f s)", "; ".join(said), evaluated.seconds)

    def _warn(self, iteration: int, k: int) -> None:
        """Of what this evaluation is the first to show; what earlier processes of this run have told counts."""
        scores = scores_of(self.found, k)
        pixels = pixels_of(self.found, k)
        signs = news_of_decline(scores, self.iterations, pixels, from_weights=self.from_weights)
        if not signs:
            return
        remedy = self.remedy
        trained = self.from_weights or max(scores, key=lambda score: score[1])[0] > 0
        if fell(scores) and trained and (self.folder / BEST_TEACHER).exists():
            remedy = f"the better teacher is in {BEST_TEACHER}; {remedy}"
        log.warning("iteration %d: %s -> %s", iteration, "; ".join(signs), remedy)

    def _forget_best_after(self, finished: int) -> None:
        """The best teacher may be of an iteration that a resumed run has yet to come to again, perhaps otherwise."""
        path = self.folder / BEST_TEACHER
        try:
            if not path.exists() or int(read_about(path)["iteration"]) <= finished:
                return
        except WeightsError:  # whatever it is, it is in the way of the next
            pass
        with no_reason_to_stop(path):
            path.unlink()
            kept = [i for i, evaluated in self.found.items() if evaluated.knn and self._copy_of(i).exists()]
            if kept:
                best = max(kept, key=lambda i: self.found[i].score)
                partial = path.with_suffix(".partial")
                shutil.copyfile(self._copy_of(best), partial)
                partial.replace(path)


def _by_k(accuracies: Mapping[int, float]) -> str:
    return "  ".join(f"k={k} {value:.1%}" for k, value in accuracies.items())


@contextmanager
def no_reason_to_stop(path: Path) -> Iterator[None]:
    """A full disk costs this file, not the run: whether checkpoints can be written is seen there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be written: %s", path, error)
