"""What whitening does to features, and the comparison of a run with its start."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import whitening
from dinocomp import train
from tests.helpers import words, yaml_of_nothing


def test_columns_are_uncorrelated_and_the_held_out_rows_are_moved_with_them() -> None:
    torch.manual_seed(0)
    of_all = 5 + torch.randn(300, 8) @ torch.randn(8, 8)
    nothing = 1e-6 * torch.randn(300, 1)
    rows = torch.cat([of_all, nothing], dim=1)
    train_rows, val_rows = whitening.whiten(rows, rows[:50], least=1e-4)
    assert train_rows.shape == (300, 8)  # without what is next to nothing
    torch.testing.assert_close(train_rows.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(train_rows.T @ train_rows / 300, torch.eye(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(val_rows, train_rows[:50])


def test_a_run_is_compared_with_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert not train.main(
        [yaml_of_nothing(tmp_path), *words(run, evaluation__at_start="true", evaluation__val_images=100)]
    )
    evaluations = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    measured = [line["knn_top1"]["5"] for line in evaluations]
    monkeypatch.setattr(sys, "argv", ["whitening", str(run)])
    capsys.readouterr()
    whitening.main()
    pixels, start, teacher = capsys.readouterr().out.splitlines()
    assert pixels.startswith(f"raw pixels: {100 * evaluations[0]['pixels_top1']['5']:.1f} %, whitened ")
    assert start.startswith(f"random start 0: {100 * measured[0]:.1f} %, whitened ")
    assert teacher.startswith(f"teacher: {100 * measured[-1]:.1f} %, whitened ")
    assert all(float(line.split()[-2]) > 50 for line in (pixels, start, teacher))  # of 10 classes
