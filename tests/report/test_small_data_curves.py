"""The guide's picture of several runs' curves."""

import importlib.util
import json
from pathlib import Path

import yaml

from .folders import write_run

SCRIPT = Path(__file__).parents[2] / "docs" / "small_data.py"


def test_a_column_for_each_run_and_what_is_off_left_out(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("small_data_curves", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    runs = {
        "one": write_run(tmp_path / "one", pixels=0.9),
        "other": write_run(tmp_path / "other", words=("dino.loss_weight=0",)),
    }
    axes = script.draw(runs).axes  # row by row
    assert len(axes) == 10 and [axis.get_title() for axis in axes[:2]] == ["one", "other"]
    scored = [json.loads(line) for line in (runs["one"] / "evaluation.jsonl").read_text().splitlines()]
    assert list(axes[0].lines[0].get_ydata()) == [100 * next(iter(line["knn_top1"].values())) for line in scored]
    assert len(axes[0].lines) == 2 and len(axes[1].lines) == 1, "raw pixels, where they were measured"
    ranks = [line["label_free"]["rankme"] for line in scored]
    width = yaml.safe_load((runs["one"] / "config.yaml").read_text())["student"]["embed_dim"]
    assert [rank / width for rank in ranks] == [
        *next(line for line in axes[2].lines if line.get_label() == "rankme").get_ydata()
    ]
    assert len(axes[4].lines) == 2 and len(axes[5].lines) == 1, "no loss of DINO, where it is off"
