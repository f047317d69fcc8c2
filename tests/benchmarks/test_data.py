"""The data benchmark, on almost nothing: what it does, not how fast."""

import json
from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.timing import median_seconds


def test_each_action_is_warmed_up_and_then_called_in_every_round() -> None:
    calls: list[str] = []
    found = median_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert found.keys() == {"a", "b"} and all(seconds >= 0 for seconds in found.values())


def test_every_stage_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "found.json"
    tiny = "--width 60 --height 45 --crops 32 16 --images 2 --batch 2 --device cpu --json"
    data.main(["--rounds=1", "--workers=1", "--batches=1", *tiny.split(), str(path)])
    found = json.loads(path.read_text())
    stages = [row["stage"] for row in found["rows"]]
    assert len(stages) == len(set(stages)) == 16 and all(row["images_per_second"] > 0 for row in found["rows"])
    assert {"decode", "whole sample", "reference's (Pillow) whole sample", "loader, 1 worker"} <= set(stages)
    assert capsys.readouterr().out.count("\n") == 2 + len(stages)
