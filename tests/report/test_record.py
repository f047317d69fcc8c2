"""Runs are read in whatever state their files are."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from dinocomp.errors import DataError
from dinocomp.report import read_run, render

from .folders import line, write_run

FILES = ("config.yaml", "metrics.jsonl", "evaluation.jsonl", "train.log", "run.json", "teacher.safetensors")


def test_a_whole_run(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "run", pictures=(500, 1000), warnings=("step 3 was bad", "step 14 was bad")))
    assert (record.name, record.status, record.iteration, record.iterations) == ("run", "finished", 1000, 1000)
    assert record.prototypes == {"dino": 128, "ibot": 128} and record.warmup == 100
    assert record.metrics["lr"].shape == (100,) and record.notes == ()
    assert record.evaluations["knn_top1/10"].tolist() == [0.5, 0.8, 0.85]
    assert record.training_seconds == pytest.approx(500) and record.seconds_left == 0
    assert [iteration for iteration, _ in record.pictures["pca"]] == [500, 1000]
    assert [(w.text, w.count) for w in record.warnings] == [("step 14 was bad", 2)], "alike but for numbers"
    assert record.settings["optim.base_lr"] == 0.002 and record.weights == ("teacher.safetensors",)


@pytest.mark.parametrize("name", FILES)
def test_any_file_may_be_missing_or_cut_anywhere(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", lines=[line(10), line(20)], pictures=(10,))
    whole = (folder / name).read_bytes()
    for length in (None, 0, len(whole) // 2, len(whole) - 3):
        if length is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(whole[:length])
        assert "<h1>run</h1>" in render(read_run(folder))


def test_cut_lines_are_left_out_and_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines=[line(10), line(20), line(30)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\n{"lr": 3}\n\n{"iteration": 40, "loss/to')
    record = read_run(folder)
    assert record.metrics["iteration"].tolist() == [10, 20, 30]
    assert record.notes == ("metrics.jsonl: 3 line(s) cannot be read, perhaps cut short, and are left out",)


def test_null_and_missing_numbers_are_nan(tmp_path: Path) -> None:
    lines = [line(10), line(20, loss__total=None), line(30, new=7), {"iteration": 40, "word": "no number"}]
    record = read_run(write_run(tmp_path / "run", lines=lines))
    assert np.isnan(record.metrics["loss/total"]).tolist() == [False, True, False, True]
    assert np.isnan(record.metrics["new"]).tolist() == [True, True, False, True] and record.metrics["new"][2] == 7
    assert "word" not in record.metrics
    render(record)


def test_what_was_done_again_counts_once(tmp_path: Path) -> None:
    lines = [line(10, lr=1), line(20, lr=1), line(30, lr=1), line(20, lr=2), line(40, lr=2)]
    record = read_run(write_run(tmp_path / "run", lines=lines))
    assert record.metrics["iteration"].tolist() == [10, 20, 40] and record.metrics["lr"].tolist() == [1, 2, 2]


def test_half_written_pictures_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", pictures=(10, 20))
    path = folder / "pictures" / "iteration-00000020" / "pca.png"
    path.write_bytes(path.read_bytes()[:300])
    page = render(read_run(folder))
    assert 'data-iteration="10"' in page and 'data-iteration="20"' not in page


def test_a_config_of_another_version_is_still_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "config.yaml").open("a") as file:
        file.write("future:\n  key: 5\n")
    record = read_run(folder)
    assert record.config is None and record.settings["future.key"] == 5 and record.iterations == 1000
    assert "future" in record.notes[0] and "no such key" in render(record)


def test_status_without_facts(tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path / "a", status=None)).status == "finished"
    assert read_run(write_run(tmp_path / "b", status=None, lines=[line(10)], knn={})).status == "unknown"
    assert read_run(write_run(tmp_path / "c", status="odd", lines=[line(10)], knn={})).status == "unknown"
    record = read_run(write_run(tmp_path / "d", status="running", lines=[line(400)], knn={}))
    assert record.status == "running" and record.seconds_left == pytest.approx(300)


def test_facts_may_be_anything(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for facts in ([], {"iteration": "x", "data": None, "versions": None, "parameters": [], "evaluation": 3}, 5, {}):
        (folder / "run.json").write_text(json.dumps(facts))
        render(read_run(folder))


def test_a_copied_folder_tells_of_its_own_place(tmp_path: Path) -> None:
    shutil.copytree(write_run(tmp_path / "run"), tmp_path / "copy")
    assert str(tmp_path / "copy" / "teacher.safetensors") in render(read_run(tmp_path / "copy"))


def test_what_is_no_run(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "mine")
    with pytest.raises(DataError, match=r"no run's folder.*Runs below it: mine"):
        read_run(tmp_path / "runs")
    with pytest.raises(DataError, match="Did you mean"):
        read_run(tmp_path / "runs" / "mime")
    with pytest.raises(DataError, match="is a file"):
        read_run(tmp_path / "runs" / "mine" / "config.yaml")


def test_nothing_yet(tmp_path: Path) -> None:
    """A run that has just begun."""
    folder = write_run(tmp_path / "run", lines=[], knn={}, status="running")
    (folder / "teacher.safetensors").unlink()
    record = read_run(folder)
    assert math.isnan(record.training_seconds) and math.isnan(record.recent("lr")) and record.iteration == 0
    page = render(record)
    assert "There is none yet" in page and "data-chart" not in page.partition("<script")[0]
