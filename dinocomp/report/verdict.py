"""What the numbers of a run mean, in plain words."""

import math
from dataclasses import dataclass

import numpy as np

from dinocomp.config.advice import when_features_do_not_improve
from dinocomp.report.record import RunRecord, Table
from dinocomp.report.words import number, percent
from dinocomp.signs import LEAST_PROTOTYPES, LEAST_SPREAD, MOST_ENTROPY, fell, signs_of_collapse, signs_of_decline

LEVELS = ("good", "note", "watch", "bad")  # from no cause for concern on
_NOTHING_TO_GAIN = 0.02  # of data wait, below which data are no bottleneck (docs/performance-data.md)
_WAITING = 0.1  # above which they are one
_SHORT = 160  # characters of a warning


@dataclass(frozen=True)
class Verdict:
    """A finding and what to do about it; `level` is one of `LEVELS`."""

    level: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Gauge:
    """A gauge of collapse: what is healthy, what is seen, and whether it is."""

    key: str
    title: str
    healthy: str
    now: str
    level: str


@dataclass(frozen=True)
class Knn:
    """k-NN accuracy over a run, of the first k that was measured; the best teacher is chosen by it, too.

    Attributes:
        scores: (iteration, accuracy), in order.
        pixels: accuracy of raw pixels; None where it was not measured.
    """

    k: int
    scores: list[tuple[int, float]]
    pixels: float | None
    first: float
    first_iteration: int
    last: float
    last_iteration: int
    best: float
    best_iteration: int


def knn_of(evaluations: Table) -> Knn | None:
    """None where nothing was evaluated."""
    for k in (int(name.rpartition("/")[2]) for name in evaluations if name.startswith("knn_top1/")):
        values = evaluations[f"knn_top1/{k}"]
        known = np.isfinite(values)
        if known.any():
            values, at = values[known], evaluations["iteration"][known]
            best = int(np.argmax(values))
            scores = [(int(iteration), float(value)) for iteration, value in zip(at, values, strict=True)]
            pixels = evaluations.get(f"pixels_top1/{k}", np.empty(0))
            pixels = pixels[np.isfinite(pixels)]
            return Knn(
                k,
                scores,
                float(pixels[0]) if len(pixels) else None,
                values[0],
                int(at[0]),
                values[-1],
                int(at[-1]),
                values[best],
                int(at[best]),
            )
    return None


def gauges_of(record: RunRecord) -> list[Gauge]:
    """The gauges of collapse that the run has, by their last values."""
    found = []
    gauges = {
        name.removeprefix("teacher/"): _last(values)
        for name, values in record.metrics.items()
        if name.startswith("teacher/")
    }
    early = record.iteration <= record.warmup
    for name, value in gauges.items():
        kind, _, loss = name.partition("_")
        count = record.prototypes.get(loss, 0)
        if not math.isfinite(value):
            continue
        if name == "feature_std":
            title, now = "Spread of features", f"{value:.3g}"
            healthy = (
                f"well above {LEAST_SPREAD:g}; 1 where features point in all directions alike, 0 where all images look "
                "the same to the teacher"
            )
            signs = signs_of_collapse({"feature_std": value}, {})
            near = value < 2 * LEAST_SPREAD
        elif kind == "prototypes" and count:
            title, now = f"Prototypes in use ({loss})", f"{number(value)} of {count:,}"
            healthy = f"a good part of {count:,}, and not falling towards 1"
            signs = signs_of_collapse({"feature_std": 1.0, name: value}, {loss: count})
            near = value < 2 * LEAST_PROTOTYPES
        elif kind == "entropy" and count:
            top = math.log(count)
            title, now = f"Entropy of the targets ({loss})", f"{value:.3g} of {top:.3g} nats"
            healthy = f"below log {count:,} = {top:.3g}, at which targets are uniform and teach nothing"
            signs = signs_of_collapse({"feature_std": 1.0, name: value}, {loss: count})
            near = value > (1 - 2 * (1 - MOST_ENTROPY)) * top
        else:
            continue
        level = "bad" if signs else "watch" if near else "good"
        if early and level != "good":
            level = "note"
            now += f" (the learning rate rises until iteration {record.warmup:,}; judged from there on)"
        found.append(Gauge(name, title, healthy, now, level))
    order = ("feature", "prototypes", "entropy")
    return sorted(found, key=lambda gauge: (order.index(gauge.key.partition("_")[0]), gauge.key))


def verdicts(record: RunRecord) -> list[Verdict]:
    """What is worth knowing at a glance, the worst first."""
    found = [*_ending(record), *_features(record), *_collapse(record), *_numbers(record), *_data(record)]
    if record.warnings:
        count, newest = sum(warned.count for warned in record.warnings), record.warnings[-1].text
        newest = newest if len(newest) <= _SHORT else f"{newest[:_SHORT]}…"
        text = f"{count} warning{'s' * (count > 1)} in the log, the newest: {newest}"
        found.append(Verdict("note", text, "All are at the end of this page."))
    found += [Verdict("note", note) for note in record.notes]
    return sorted(found, key=lambda verdict: -LEVELS.index(verdict.level))


def _ending(record: RunRecord) -> list[Verdict]:
    if record.status == "failed":
        why = str(record.facts.get("error") or "an error, which its log tells")
        return [Verdict("bad", f"The run failed: {why}", "The same command goes on, once the cause is mended.")]
    if record.status == "stopped":
        text = f"Stopped at iteration {record.iteration:,} of {record.iterations:,}, with a checkpoint."
        return [Verdict("note", text, "The same command goes on.")]
    return []


def _features(record: RunRecord) -> list[Verdict]:
    knn = knn_of(record.evaluations)
    if knn is None:
        if not record.config or (record.facts and record.facts.get("evaluation")):
            return []
        return [
            Verdict(
                "note",
                "No k-NN accuracy is measured: there is no labelled pair of images.",
                "Give one as evaluation.train_dataset_path and evaluation.val_dataset_path, if you have labels.",
            )
        ]
    found = []
    weights = bool(record.config and (record.config.MODEL.WEIGHTS or record.config.student.pretrained_weights))
    if signs := signs_of_decline(knn.scores, record.iterations, knn.pixels, from_weights=weights):
        remedy = []
        if fell(knn.scores) and (knn.best_iteration > 0 or weights):
            kept = "best_teacher.safetensors" in record.weights
            where = "best_teacher.safetensors" if kept else f"evaluation/iteration-{knn.best_iteration:08d}"
            remedy.append(f"The better teacher is kept in {where}.")
        if record.config:
            images, processes = record.facts.get("data", {}).get("images"), record.facts.get("world_size", 1)
            advice = when_features_do_not_improve(record.config, images, processes)
            remedy.append(f"{advice[0].upper()}{advice[1:]}.")
        found.append(Verdict("watch", f"{'; '.join(signs)}.", " ".join(remedy)))
    if knn.last_iteration == knn.first_iteration:
        return found
    level = "note" if signs else "good" if knn.last > knn.first else "watch"
    since = "before training" if knn.first_iteration == 0 else f"at iteration {knn.first_iteration:,}"
    raw = "" if knn.pixels is None else f"; raw pixels {percent(knn.pixels)}"
    return [*found, Verdict(level, f"k-NN accuracy: {percent(knn.first)} {since}, {percent(knn.last)} now{raw}.")]


def _collapse(record: RunRecord) -> list[Verdict]:
    gauges = gauges_of(record)
    found = [
        Verdict(
            gauge.level,
            f"{gauge.title}: {gauge.now}. "
            + ("This looks like collapse." if gauge.level == "bad" else "This is near collapse."),
            "Check that teacher.teacher_temp lies below dino.student_temp, lower optim.base_lr, lengthen "
            "optim.warmup_epochs, give larger batches, or type recipes=[sinkhorn].",
        )
        for gauge in gauges
        if gauge.level in ("bad", "watch")
    ]
    if not found and gauges and record.iteration > record.warmup:
        found.append(Verdict("good", "No sign of collapse: the teacher tells images apart."))
    return found


def _numbers(record: RunRecord) -> list[Verdict]:
    found = []
    steps, images = (_last(record.metrics.get(name, np.empty(0))) for name in ("bad_steps", "bad_images"))
    loss = record.metrics.get("loss/total", np.empty(0))
    if steps > 0:
        found.append(
            Verdict(
                "watch",
                f"{number(steps)} step(s) were skipped: loss or gradients were not finite.",
                "A few do no harm, with fp16 above all; if they go on, lower optim.base_lr or type recipes=[bf16].",
            )
        )
    elif len(loss) and not math.isfinite(loss[-1]):
        found.append(Verdict("watch", "The last loss is not a finite number."))
    if images > 0:
        found.append(
            Verdict(
                "watch", f"{number(images)} image(s) could not be read; others took their places.", "See train.log."
            )
        )
    return found


def _data(record: RunRecord) -> list[Verdict]:
    waits = record.metrics.get("data_wait", np.empty(0))[1:]  # a run's first line counts the start of the workers
    waits = waits[np.isfinite(waits)]
    if not len(waits):
        return []
    usual = float(np.median(waits))
    if usual < _NOTHING_TO_GAIN:
        return [Verdict("good", f"Data wait {percent(usual)}: the data are no bottleneck.")]
    remedy = (
        "More train.num_workers where there are cores for them, or recipes=[device_augment]; docs/performance-data.md."
    )
    level = "watch" if usual > _WAITING else "note"
    return [Verdict(level, f"Data wait {percent(usual)}: training stands still for its images.", remedy)]


def _last(values: np.ndarray) -> float:
    """The last that is a number; NaN where none is."""
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else math.nan
