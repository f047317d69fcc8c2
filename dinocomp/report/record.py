"""What the files in a run's folder say, whatever state they are in: `read_run`."""

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dinocomp.config import Config, derive, load_config
from dinocomp.config.keys import walk
from dinocomp.errors import ConfigError, DataError
from dinocomp.hints import missing
from dinocomp.output import CONFIG, LOG
from dinocomp.report.words import flat

FACTS = "run.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluation.jsonl"
RESULTS = Path("evaluate", "results.json")
STATUSES = ("running", "finished", "stopped", "failed")
_WARNING = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ warning: (.*)")
_ITERATION = re.compile(r"iteration-(\d+)")
_NUMBERS = {int, float, type(None)}
_DIGITS = re.compile(r"\d[\d,.]*")

Table = dict[str, np.ndarray]
"""Columns by name, float64 [lines] each, NaN where a line has no such number; `iteration` grows from line to line."""


@dataclass(frozen=True)
class Warned:
    """A warning of the log: its newest wording and time, and how often it came with whatever numbers in it."""

    time: str
    text: str
    count: int


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell it.

    Attributes:
        folder: where they lie; absolute.
        facts: `run.json`; empty for a run of before there was one.
        settings: dotted key -> value, of `config.yaml`.
        config: the same, checked; None where this version does not take it, for the reason in `notes`.
        config_text: the file itself.
        metrics, evaluations: the numbers of `metrics.jsonl` and `evaluation.jsonl`, nested names joined with "/"
            (`knn_top1/10`, `pixels_top1/10`, `label_free/rankme`).
        warnings: of `train.log`, in the order in which they came last.
        pictures: kind ("pca", "attention", …) -> (iteration, file), by iteration.
        first_batch: what the networks were shown, or None.
        results: `evaluate/results.json`, what `dinocomp evaluate` found.
        weights: the files of weights that are there, by name.
        notes: what could not be read.
    """

    folder: Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Config | None = None
    config_text: str = ""
    metrics: Table = field(default_factory=dict)
    evaluations: Table = field(default_factory=dict)
    warnings: tuple[Warned, ...] = ()
    pictures: Mapping[str, list[tuple[int, Path]]] = field(default_factory=dict)
    first_batch: Path | None = None
    results: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    def part(self, name: str) -> Mapping[str, Any]:
        """The facts of that name, which are several (`data`, `parameters`, …); empty where there are none."""
        found = self.facts.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def iteration(self) -> int:
        """The last that is known to be finished."""
        lines = [int(table["iteration"][-1]) for table in (self.metrics, self.evaluations) if table]
        return max([*lines, _whole(self.facts.get("iteration"))])

    @property
    def iterations(self) -> int:
        """Of the whole run; 0 where that is not known."""
        if self.config is not None:
            return derive.total_iterations(self.config)
        return _whole(self.facts.get("iterations"))

    @property
    def status(self) -> str:
        """One of `STATUSES`, or "unknown"."""
        status = self.facts.get("status")
        if status in STATUSES:
            return status
        return "finished" if 0 < self.iterations <= self.iteration else "unknown"

    @property
    def warmup(self) -> int:
        """Iterations in which the learning rate rises."""
        optim, train = (self.config.optim, self.config.train) if self.config else (None, None)
        return optim.warmup_epochs * train.OFFICIAL_EPOCH_LENGTH if optim else 0

    @property
    def prototypes(self) -> Mapping[str, int]:
        """Of the head of each loss that is on; empty where the configuration is not understood."""
        return derive.prototypes(self.config) if self.config else {}

    def recent(self, name: str, lines: int = 20) -> float:
        """The median of a metric over its last lines; NaN where there is none."""
        values = self.metrics.get(name, np.empty(0))
        values = values[np.isfinite(values)][-lines:]
        return float(np.median(values)) if len(values) else math.nan

    @property
    def training_seconds(self) -> float:
        """Spent in training steps, over all starts of the run; without evaluations and checkpoints."""
        if "seconds_per_iteration" not in self.metrics:
            return math.nan
        steps = np.diff(self.metrics["iteration"], prepend=0)
        return float(np.nansum(steps * self.metrics["seconds_per_iteration"]))

    @property
    def seconds_left(self) -> float:
        """Of training steps, at the pace of the last lines; NaN where it is not known."""
        paces = self.metrics.get("seconds_per_iteration", np.empty(0))
        paces = [pace for pace in paces[-50:].tolist() if math.isfinite(pace)]
        if not paces or not self.iterations:
            return math.nan
        return max(0, self.iterations - self.iteration) * statistics.median(paces)


def read_run(folder: Path) -> RunRecord:
    """Reads a run's folder. Files may be missing, cut short, or be written at this moment.

    Raises:
        DataError: there is no such folder, or nothing of a run is in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(missing(folder) if not folder.exists() else f"{folder} is a file; give the folder of a run")
    if not any((folder / name).is_file() for name in (CONFIG, METRICS, FACTS, LOG)):
        runs = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f" Runs below it: {', '.join(runs[:5])}." if runs else ""
        raise DataError(f"{folder} is no run's folder: it has neither {CONFIG} nor {METRICS}.{hint}")
    notes: list[str] = []
    text, settings, config = _read_config(folder / CONFIG, notes)
    pictures, first_batch = _find_pictures(folder / "pictures")
    return RunRecord(
        folder=folder.resolve(),
        facts=_read_json(folder / FACTS, notes),
        settings=settings,
        config=config,
        config_text=text,
        metrics=_read_table(folder / METRICS, notes),
        evaluations=_read_table(folder / EVALUATIONS, notes),
        warnings=tuple(_read_warnings(folder / LOG)),
        pictures=pictures,
        first_batch=first_batch,
        results=_read_json(folder / RESULTS, notes),
        weights=tuple(name for name in _WEIGHTS if (folder / name).is_file()),
        notes=tuple(notes),
    )


_WEIGHTS = ("teacher.safetensors", "best_teacher.safetensors")


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else 0


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _read_config(path: Path, notes: list[str]) -> tuple[str, dict[str, Any], Config | None]:
    """The file, its values by dotted key, and the same checked."""
    if not path.is_file():
        return "", {}, None
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return "", {}, None
    try:
        config = load_config(str(path)).config
    except ConfigError as error:  # of another version, say; its words can still be shown
        notes.append(f"{path.name} is not a configuration of this version: {str(error).splitlines()[0]}")
        return text, dict(_leaves(tree)), None
    return text, {spec.name: spec.default for spec in walk(config)}, config


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", tuple(value) if isinstance(value, list) else value


def _read_table(path: Path, notes: list[str]) -> Table:
    """The numbers of a file with one JSON object a line; lines that are cut short are left out."""
    blocks: list[tuple[tuple[str, ...], list[list[Any]]]] = []  # lines on end that have the same names
    bad = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    numbers = json.loads(line)
                    if not set(map(type, numbers.values())) <= _NUMBERS:
                        numbers = {name: value for name, value in flat(numbers).items() if type(value) in _NUMBERS}
                    int(numbers["iteration"])
                except (ValueError, AttributeError, KeyError, TypeError):
                    bad += bool(line.strip())
                    continue
                names = tuple(numbers)
                if not blocks or blocks[-1][0] != names:
                    blocks.append((names, []))
                blocks[-1][1].append(list(numbers.values()))
    except FileNotFoundError:
        return {}
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    if bad:
        notes.append(f"{path.name}: {bad} line(s) cannot be read, perhaps cut short, and are left out")
    if not blocks:
        return {}
    length, at = sum(len(lines) for _, lines in blocks), 0
    table = {name: np.full(length, math.nan) for name in dict.fromkeys(name for names, _ in blocks for name in names)}
    for names, lines in blocks:
        numbers = np.array(lines, dtype=np.float64)  # [lines, names]; None becomes NaN
        for i, name in enumerate(names):
            table[name][at : at + len(lines)] = numbers[:, i]
        at += len(lines)
    # Where iterations were done again after a restart, those count that were written last.
    after = np.minimum.accumulate(table["iteration"][::-1])[::-1]
    kept = table["iteration"] < np.append(after[1:], np.inf)
    return {name: column[kept] for name, column in table.items()}


def _read_warnings(path: Path) -> list[Warned]:
    """Warnings that differ in numbers alone are one."""
    found: dict[str, Warned] = {}
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if match := _WARNING.match(line):
                    time, text = match.groups()
                    kind = _DIGITS.sub("0", text)
                    before = found.pop(kind, None)
                    found[kind] = Warned(time, text, before.count + 1 if before else 1)
    except OSError:
        pass  # without a log there are none to show
    return list(found.values())


def _find_pictures(folder: Path) -> tuple[dict[str, list[tuple[int, Path]]], Path | None]:
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("iteration-*/*.png")):
        if match := _ITERATION.fullmatch(path.parent.name):
            found.setdefault(path.stem, []).append((int(match[1]), path))
    first = folder / "first_batch.png"
    return {kind: sorted(pictures) for kind, pictures in found.items()}, first if first.is_file() else None
