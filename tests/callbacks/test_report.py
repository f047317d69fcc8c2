"""A run's page while it trains: when it is written, what it says, and that it never costs the run."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dinocomp.callbacks import report as module
from dinocomp.callbacks.report import Report
from dinocomp.report import read_run
from dinocomp.train import main

from ..helpers import weights, words, yaml_of_nothing
from ..report.folders import line, write_run


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Pages:
    """A report whose pages are counted, of a run's folder."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        self.stop = SimpleNamespace(requested=False)
        self.report = Report(folder, {"iterations": 1000}, self.stop, **arguments)
        self.folder = folder

    def at(self, event: str, iteration: int) -> bool:
        """Whether a page was written at the event."""
        before = self.facts().get("updated"), self._changed()
        getattr(self.report, event)(SimpleNamespace(timestamp=SimpleNamespace(batch=iteration)), None)
        return (self.facts().get("updated"), self._changed()) != before

    def facts(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _changed(self) -> int:
        path = self.folder / "report.html"
        return path.stat().st_mtime_ns if path.exists() else 0

    def touch(self, name: str) -> None:
        with (self.folder / name).open("a") as file:
            file.write("\n")
        os.utime(self.folder / name, ns=(self._tick(), self._tick()))

    ticks = 10**18

    def _tick(self) -> int:
        Pages.ticks += 10**9
        return Pages.ticks


def test_pages_come_when_there_is_news(tmp_path: Path, clock: Clock) -> None:
    pages = Pages(write_run(tmp_path / "run", status=None, lines=[line(10)], knn={}))
    assert pages.at("fit_start", 0) and pages.facts()["status"] == "running"
    clock.now += 100
    assert not pages.at("batch_end", 10), "nothing is new"
    pages.touch("metrics.jsonl")
    clock.now += 2
    assert pages.at("batch_end", 20) and pages.facts()["iteration"] == 20
    pages.touch("metrics.jsonl")
    clock.now += 50
    assert not pages.at("batch_end", 30), "lines alone have a minute's time"
    pages.touch("evaluation.jsonl")
    assert not pages.at("batch_end", 31), "it looks once a second"
    clock.now += 2
    assert pages.at("batch_end", 40)
    pages.touch("teacher.safetensors")
    clock.now += 2
    assert pages.at("batch_end", 50), "a checkpoint"
    assert pages.at("fit_end", 1000)
    assert (pages.facts()["status"], pages.facts()["iteration"]) == ("finished", 1000)
    assert read_run(pages.folder).status == "finished"


def test_pages_take_a_hundredth_of_the_time(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(write_run(tmp_path / "run", status=None))
    write = Report._write
    monkeypatch.setattr(Report, "_write", lambda *a: (write(*a), setattr(clock, "now", clock.now + 5)))
    pages.at("fit_start", 0)
    pages.touch("evaluation.jsonl")
    clock.now += 499
    assert not pages.at("batch_end", 10)
    clock.now += 2
    assert pages.at("batch_end", 20), "it is made up for"


def test_how_it_ended(tmp_path: Path) -> None:
    pages = Pages(write_run(tmp_path / "run", status=None, lines=[line(300)], knn={}))
    pages.stop.requested = True
    pages.at("fit_end", 300)
    assert pages.facts()["status"] == "stopped"
    pages.report.fail(OSError(28, "No space left\nmore"), 301)
    assert pages.facts()["status"] == "failed" and pages.facts()["error"] == "OSError: [Errno 28] No space left"
    assert "The run failed: OSError" in (pages.folder / "report.html").read_text()
    started = pages.facts()["started"]
    again = Pages(pages.folder)
    again.at("fit_start", 301)
    assert again.facts()["started"] == started and "error" not in again.facts(), "it is the same run"


def test_it_never_costs_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages(write_run(tmp_path / "run", status=None))
    (tmp_path / "run" / "run.json").mkdir()  # cannot be replaced
    state = SimpleNamespace(timestamp=SimpleNamespace(batch=5))
    with caplog.at_level(logging.WARNING, "dinocomp"):
        pages.report.fit_start(state, None)
        pages.report.fit_end(state, None)
    assert len(caplog.messages) == 1 and "cannot be written" in caplog.messages[0]
    (tmp_path / "run" / "run.json").rmdir()
    monkeypatch.setattr("dinocomp.report.write.render", lambda record: 1 / 0)
    pages.report.complained = False
    with caplog.at_level(logging.WARNING, "dinocomp"):
        pages.report.fit_end(state, None)
    assert "ZeroDivisionError" in caplog.messages[1] and pages.facts()["status"] == "finished"


def test_it_can_be_off_and_is_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(write_run(tmp_path / "off", status=None), page=False)
    pages.at("fit_start", 0)
    assert pages.facts()["status"] == "running" and not (tmp_path / "off" / "report.html").exists()
    monkeypatch.setattr(module.dist, "get_global_rank", lambda: 1)
    other = Pages(write_run(tmp_path / "other", status=None))
    assert not other.at("fit_start", 0) and not other.at("fit_end", 5)


@pytest.mark.slow
@pytest.mark.usefixtures("one_cache")
def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    for name in ("false", "true"):
        assert main([yaml_of_nothing(tmp_path), *words(tmp_path / name, loggers__report=name)]) == 0
    assert (tmp_path / "true" / "report.html").exists() and not (tmp_path / "false" / "report.html").exists()
    without, with_pages = (weights(tmp_path / name, 12) for name in ("false", "true"))
    assert not [name for name in without if not torch.equal(without[name], with_pages[name])]
