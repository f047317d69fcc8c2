"""A run's numbers over its iterations, on one sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dinocomp.pictures.canvas import INK, PALE, PALETTE, WIDTH, drawn, figure, page, points, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = ("-", "--", "-.", ":")
_BASELINE = "raw pixels"  # a level line that features have to beat
_MOST = 300  # points of a curve; of more, the means of as many stretches are drawn
_PANEL = 265  # pixels, height
_SMALL = 18  # pixels, letters

Curves = dict[str, tuple[list[float], list[float]]]  # name -> iterations, values


def read_lines(path: Path) -> list[dict]:
    """The objects of a file with one JSON object a line; lines that were cut short are left out. None is no line."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "iteration" in record:
            found.append(record)
    return found


def curves_picture(metrics: Sequence[Mapping], evaluation: Sequence[Mapping], *, width: int = WIDTH) -> Image.Image:
    """Losses, accuracies and measures without labels, schedules, and gauges of collapse, each if it is there.

    Args:
        metrics: the lines of metrics.jsonl.
        evaluation: the lines of evaluation.jsonl.
    """
    from matplotlib.ticker import MaxNLocator

    panels = [(title, curves, from_0) for title, curves, from_0 in _panels(metrics, evaluation) if curves]
    plot = figure(_PANEL * max(1, len(panels)) + 30, width)
    if not panels:
        return page("The run so far", "No numbers yet.", drawn(plot))
    last = max(x for _, curves, _ in panels for xs, _ in curves.values() for x in xs)
    grid = plot.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (title, curves, from_0) in zip(grid, panels, strict=True):
        _draw(axes, curves)
        tidy(axes, "")
        axes.set_xlim(0, max(last, 1))
        if from_0:
            axes.set_ylim(0, 1.08 * max((y for _, ys in curves.values() for y in ys if y > 0), default=1.0))
        rows = 0
        if len(curves) > 1:  # in lines between title and axes, where it covers nothing
            columns = min(len(curves), max(1, 56 // (4 + max(map(len, curves)))))
            rows = -(-len(curves) // columns)
            axes.legend(
                fontsize=points(_SMALL),
                frameon=False,
                labelcolor=INK,
                loc="lower left",
                bbox_to_anchor=(0, 1.0),
                ncols=columns,
                handlelength=1.4,
                handletextpad=0.4,
                columnspacing=1.2,
                borderaxespad=0,
                borderpad=0.2,
            )
        axes.set_title(
            title, loc="left", fontsize=points(22), color=INK, fontweight="bold", pad=points(8 + 27 * rows), y=1.0
        )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    grid[-1].set_xlabel("iteration")
    return page("The run so far", _summary(metrics, evaluation), drawn(plot))


def _summary(metrics: Sequence[Mapping], evaluation: Sequence[Mapping]) -> str:
    """The last numbers, in words."""
    words = []
    if metrics:
        total = metrics[-1].get("loss/total")
        words.append(f"Iteration {metrics[-1]['iteration']:,}" + (f", loss {total:.3f}" if total is not None else ""))
    scored = [(max(line["knn_top1"].values()), line["iteration"]) for line in evaluation if line.get("knn_top1")]
    if scored:
        best, where = max(scored)
        words.append(f"k-NN {scored[-1][0]:.1%}, at best {best:.1%} (iteration {where:,})")
    return "; ".join(words) + "." if words else ""


def _panels(metrics: Sequence[Mapping], evaluation: Sequence[Mapping]) -> Iterable[tuple[str, Curves, bool]]:
    """Title, curves, and whether 0 is to be seen."""
    losses = {"sum": "loss/total"} | {
        name.removeprefix("loss/").replace("_", " "): name
        for line in metrics[:1]
        for name in line
        if name.startswith("loss/")
    }
    losses.pop("total", None)
    yield "loss", _read(metrics, losses), False
    yield "k-NN accuracy (%)", _accuracies(evaluation), False
    free: Curves = {}
    for name in sorted({name for line in evaluation for name in line.get("label_free") or {}}):
        free[name.replace("_", " ")] = _pairs(
            evaluation, lambda line, name=name: (line.get("label_free") or {}).get(name)
        )
    shares = {name: curve for name, curve in free.items() if not any(y > 1 for y in curve[1])}
    ranks = {name: curve for name, curve in free.items() if name not in shares}  # from 1 up
    yield "without labels: dimensions in use", ranks, True
    yield "without labels: shares", shares, False
    yield "learning rate", _read(metrics, {"lr": "lr"}), True
    yield "teacher momentum", _read(metrics, {"momentum": "momentum"}), False
    for title, start in (
        ("spread of features (0 is collapse)", "feature_std"),
        ("entropy of targets (nats)", "entropy_"),
        ("prototypes in effect", "prototypes_"),
    ):
        key = f"teacher/{start}"
        gauges = {name.removeprefix(key): name for line in metrics[:1] for name in line if name.startswith(key)}
        yield title, _read(metrics, gauges), True


def _accuracies(evaluation: Sequence[Mapping]) -> Curves:
    ks = sorted({k for line in evaluation for k in line.get("knn_top1") or {}}, key=int)
    curves = {f"k={k}": _pairs(evaluation, lambda line, k=k: _percent((line.get("knn_top1") or {}).get(k))) for k in ks}
    for k, accuracy in [item for line in evaluation for item in (line.get("pixels_top1") or {}).items()][:1]:
        ends = [min(line["iteration"] for line in evaluation), max(line["iteration"] for line in evaluation)]
        curves[f"{_BASELINE} (k={k})"] = ends, [100 * accuracy] * 2
    return curves


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _read(lines: Sequence[Mapping], names: Mapping[str, str]) -> Curves:
    curves = {shown: _pairs(lines, lambda line, name=name: line.get(name)) for shown, name in names.items()}
    return {name: curve for name, curve in curves.items() if curve[0]}


def _pairs(lines: Sequence[Mapping], value_of) -> tuple[list[float], list[float]]:
    """Iterations and values; NaN, which JSON knows as null, breaks the line."""
    pairs = [(line["iteration"], value_of(line)) for line in lines]
    if all(value is None for _, value in pairs):
        return [], []
    return [x for x, _ in pairs], [math.nan if value is None else float(value) for _, value in pairs]


def _draw(axes: Axes, curves: Curves) -> None:
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        x, y = np.asarray(xs, float), np.asarray(ys, float)
        if name.startswith(_BASELINE):
            axes.plot(x, y, color=PALE, linestyle="--", linewidth=2.5, label=name)
            continue
        if len(x) > _MOST:
            parts = np.array_split(np.arange(len(x)), _MOST)
            x, y = (np.array([_mean(values[part]) for part in parts]) for values in (x, y))
        axes.plot(
            x,
            y,
            color=PALETTE[i % len(PALETTE)],
            linestyle=_DASHES[i // len(PALETTE) % len(_DASHES)],
            linewidth=2.5,
            marker="o" if len(x) < 40 else None,
            markersize=7,
            label=name,
        )


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
