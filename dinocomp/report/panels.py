"""Which numbers are drawn, together with which, and under what words; and curves thin enough for a page."""

import fnmatch
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dinocomp.report.record import Table

MAX_POINTS = 1000  # of a curve


@dataclass(frozen=True)
class Panel:
    """Curves that share a chart.

    Attributes:
        section: of the page.
        columns: names in `metrics.jsonl` or `evaluation.jsonl`, or patterns of them, in order.
        words: what is seen, in a sentence or two.
        log: draw the vertical axis in powers of ten at first.
        percent: shares of 1, shown in per cent.
        rare: one point an evaluation, not one a few steps.
        quiet: not drawn while all is 0.
        baseline: a pattern, whose first column's only number is what the curves have to beat.
        baseline_words: what a legend calls it.
    """

    section: str
    key: str
    title: str
    columns: tuple[str, ...]
    words: str = ""
    log: bool = False
    percent: bool = False
    rare: bool = False
    quiet: bool = False
    baseline: str = ""
    baseline_words: str = ""


PANELS = (
    Panel(
        "curves",
        "knn",
        "k-NN accuracy",
        ("knn_top1/*",),
        "Held-out images whose label the nearest reference images guess, by the number k of those that vote.",
        percent=True,
        rare=True,
        baseline="pixels_top1/*",
        baseline_words="raw pixels",
    ),
    Panel(
        "curves",
        "loss",
        "Losses",
        ("loss/total", "loss/dino_global", "loss/dino_local", "loss/ibot", "loss/koleo", "loss/*"),
        "What is optimised, and its sum. It need not fall: the teacher, who sets the task, gets better, too.",
    ),
    Panel(
        "curves",
        "rank",
        "Effective rank",
        ("label_free/rankme", "label_free/lidar"),
        "Directions that the features make use of, measured without labels: at most their width, or the images looked "
        "at where these are fewer. Where RankMe stays below a third of that, features tell little apart; LiDAR may be "
        "high all the same.",
        rare=True,
    ),
    Panel(
        "curves",
        "consistency",
        "Label-free consistency",
        ("label_free/*consistency*", "label_free/*"),
        "Whether views of an image have the same neighbours.",
        rare=True,
    ),
    Panel(
        "curves",
        "grad",
        "Gradient norms",
        ("grad_norm/*",),
        "By network, before clipping. Peaks that grow are a reason to lower the learning rate.",
        log=True,
    ),
    Panel("gauges", "feature_std", "Spread of features", ("teacher/feature_std",)),
    Panel("gauges", "prototypes", "Prototypes in use", ("teacher/prototypes_*",)),
    Panel("gauges", "entropy", "Entropy of the targets (nats)", ("teacher/entropy_*",)),
    Panel("gauges", "centre", "Norm of the centre", ("teacher/center_norm_*",), "Settles, where centring is used."),
    Panel("speed", "speed", "Images a second", ("images_per_second",), "All processes together."),
    Panel(
        "speed",
        "wait",
        "Data wait",
        ("data_wait",),
        "Share of the time in which training stood still for its next batch.",
        percent=True,
    ),
    Panel("speed", "pace", "Seconds an iteration", ("seconds_per_iteration",), log=True),
    Panel("speed", "memory", "Memory (GB)", ("memory_gb",), "Peak so far, of the first process."),
    Panel("speed", "bad", "Bad steps and images", ("bad_steps", "bad_images"), "So far in the run.", quiet=True),
    Panel("schedules", "lr", "Learning rate", ("lr", "last_layer_lr")),
    Panel("schedules", "weight_decay", "Weight decay", ("weight_decay",)),
    Panel("schedules", "momentum", "Momentum of the teacher", ("momentum",)),
    Panel("schedules", "teacher_temp", "Temperature of the teacher", ("teacher_temp",)),
)


@dataclass(frozen=True)
class Curve:
    """Points of one column. `low` and `high` are the extremes of what each point is the mean of; else None.

    `baseline`: drawn as a dashed line without points.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    colour: int = 0
    baseline: bool = False


@dataclass
class Chart:
    """What is drawn in one place of the page."""

    panel: Panel
    curves: list[Curve]
    title: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        self.title = self.title or self.panel.title
        self.key = self.key or self.panel.key


@dataclass
class Sheet:
    """All charts of a page as one piece of JSON for its script; what curves share is there once."""

    charts: list[Chart] = field(default_factory=list)

    def to_json(self) -> str:
        xs: list[list[float | None]] = []
        known: dict[bytes, int] = {}
        charts = {}
        for chart in self.charts:
            curves = []
            for curve in chart.curves:
                place = known.setdefault(curve.x.tobytes(), len(xs))
                if place == len(xs):
                    xs.append(_short(curve.x, 9))
                item: dict[str, Any] = {"name": curve.label, "x": place, "y": _short(curve.y), "colour": curve.colour}
                if curve.low is not None and curve.high is not None:
                    item |= {"low": _short(curve.low), "high": _short(curve.high)}
                if curve.baseline:
                    item["baseline"] = True
                curves.append(item)
            panel = chart.panel
            charts[chart.key] = {
                "log": panel.log,
                "percent": panel.percent,
                "rare": panel.rare,
                "curves": curves,
            }
        text = json.dumps({"x": xs, "charts": charts}, separators=(",", ":"), allow_nan=False)
        return text.replace("<", "\\u003c")  # so that no name ends the script that this stands in


def columns_of(panel: Panel, table: Table) -> list[str]:
    """Columns of the table that belong to the panel, in its order; numbers at their end in order of size."""
    found: list[str] = []
    for pattern in panel.columns:
        found += sorted(
            (name for name in fnmatch.filter(table, pattern) if name not in found),
            key=lambda name: (int(leaf) if (leaf := name.rpartition("/")[2]).isdecimal() else 0, name),
        )
    return [name for name in found if _worth_drawing(table[name], panel)]


def _worth_drawing(values: np.ndarray, panel: Panel) -> bool:
    known = values[np.isfinite(values)]
    return bool(known.any() if panel.quiet else len(known))


def label_of(column: str) -> str:
    """A column's name in a legend."""
    group, _, name = column.rpartition("/")
    if group in ("knn_top1", "pixels_top1"):
        return f"k = {name}"
    return name.removeprefix("entropy_").removeprefix("prototypes_").removeprefix("center_norm_")


def charts_of(metrics: Table, evaluations: Table) -> list[Chart]:
    """The charts of one run: those panels for which there are numbers."""
    charts, taken = [], set()
    for panel in PANELS:
        table = evaluations if panel.rare else metrics
        names = [name for name in columns_of(panel, table) if name not in taken]
        taken.update(names)
        if names:
            curves = [thin(table["iteration"], table[name], label_of(name), i) for i, name in enumerate(names)]
            charts.append(Chart(panel, [*curves, *_baseline(panel, table)]))
    return charts


def _baseline(panel: Panel, table: Table) -> list[Curve]:
    """A level line over all iterations, of the first column that has a number."""
    for name in fnmatch.filter(table, panel.baseline):
        known = table[name][np.isfinite(table[name])]
        if len(known):
            label = f"{panel.baseline_words} ({label_of(name)})"
            return [Curve(label, table["iteration"][[0, -1]], known[[0, 0]], baseline=True)]
    return []


def charts_together(tables: Sequence[tuple[str, Table, Table]]) -> list[Chart]:
    """Several runs, (name, metrics, evaluations) each: one chart a number, one curve a run."""
    charts, taken = [], set()
    for panel in PANELS:
        of_runs = [evaluations if panel.rare else metrics for _, metrics, evaluations in tables]
        names = {name: None for table in of_runs for name in columns_of(panel, table)}
        for column in columns_of(panel, {name: np.ones(1) for name in names if name not in taken}):
            taken.add(column)
            curves = [
                thin(table["iteration"], table[column], tables[i][0], i)
                for i, table in enumerate(of_runs)
                if column in table and np.isfinite(table[column]).any()
            ]
            title = panel.title if column in panel.columns and len(names) == 1 else f"{panel.title}: {label_of(column)}"
            if panel.baseline:
                leaf = column.rpartition("/")[2]
                curves += _baselines(panel, panel.baseline.replace("*", leaf), [(t[0], t[2]) for t in tables])
            charts.append(Chart(panel, curves, title, f"{panel.key}-{len(charts)}"))
    return charts


def _baselines(panel: Panel, column: str, tables: Sequence[tuple[str, Table]]) -> list[Curve]:
    """A level line for each number that runs, (name, table) each, have to beat; whose it is, where it is not all's."""
    levels: dict[float, list[str]] = {}
    for name, table in tables:
        values = table.get(column, np.empty(0))
        for level in values[np.isfinite(values)][:1].tolist():
            levels.setdefault(level, []).append(name)
    ends = [table["iteration"][[0, -1]] for _, table in tables if len(table.get("iteration", ()))]
    span = np.array([min(first for first, _ in ends), max(last for _, last in ends)]) if ends else np.empty(0)
    return [
        Curve(
            panel.baseline_words if len(names) == len(tables) else f"{panel.baseline_words} ({', '.join(names)})",
            span,
            np.full(2, level),
            baseline=True,
        )
        for level, names in levels.items()
    ]


def thin(x: np.ndarray, y: np.ndarray, label: str = "", colour: int = 0, points: int = MAX_POINTS) -> Curve:
    """A curve of at most `points` points: means over neighbouring lines, with their extremes, so that no peak is lost.

    Args:
        x, y: [lines]; y may hold NaN, which means leave out. A point has the x of its last line.
    """
    if len(x) <= points:
        return Curve(label, x, y, colour=colour)
    edges = np.linspace(0, len(x), points + 1).astype(int)[:-1]  # where each point's lines begin
    known = np.isfinite(y)
    count = np.add.reduceat(known.astype(np.float64), edges)  # [points]
    empty = count == 0
    mean = np.add.reduceat(np.where(known, y, 0.0), edges) / np.where(empty, 1, count)
    low = np.minimum.reduceat(np.where(known, y, np.inf), edges)
    high = np.maximum.reduceat(np.where(known, y, -np.inf), edges)
    mean, low, high = (np.where(empty, math.nan, values) for values in (mean, low, high))
    return Curve(label, x[np.append(edges[1:], len(x)) - 1], mean, low, high, colour)


def _short(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """Numbers with few digits; None for what JSON has no word for."""
    short = (float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist())
    return [int(value) if value is not None and value.is_integer() else value for value in short]
