"""The numbers of a run, and what they warn of."""

import logging
from pathlib import Path

import pytest

from dinocomp.train import main

from ..helpers import metrics, words, yaml_of_nothing

pytestmark = pytest.mark.usefixtures("one_cache")


def test_collapse_is_said_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a centre, with sharp targets and without KoLeo, all images soon have the same target."""
    changes = {
        "train__batch_size_per_gpu": 16,
        "train__OFFICIAL_EPOCH_LENGTH": 20,
        "dino__center_momentum": 1,
        "dino__koleo_loss_weight": 0,
        "ibot__loss_weight": 0,
        "teacher__warmup_teacher_temp": 0.01,
        "teacher__teacher_temp": 0.01,
        "teacher__momentum_teacher": 0.5,
        "optim__lr": 0.01,
        "optim__freeze_last_layer_epochs": 0,
        "loggers__period_iterations": 4,
    }
    with caplog.at_level(logging.WARNING, "dinocomp"):
        assert main([yaml_of_nothing(tmp_path), *words(tmp_path / "run", **changes)]) == 0
    lines = metrics(tmp_path / "run")
    assert lines[-1]["teacher/prototypes_dino"] < 1.1 and lines[-1]["teacher/feature_std"] < 0.05
    assert lines[0]["teacher/center_norm_dino"] == 0 and "teacher/entropy_ibot" not in lines[0]
    said = [text for text in caplog.messages if "this looks like collapse" in text]
    assert len(said) == 1 and "the dino targets use 1." in said[0] and "recipes=[sinkhorn]" in said[0]


def test_gauges_are_of_all_ranks_and_cost_nothing_in_between(tmp_path: Path) -> None:
    changes = {"loggers__period_iterations": 3, "optim__epochs": 2}
    assert main([yaml_of_nothing(tmp_path), *words(tmp_path / "run", **changes)]) == 0
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [1, 3, 6, 8]
    for loss, count in (("dino", 32), ("ibot", 32)):
        assert all(1 <= line[f"teacher/prototypes_{loss}"] <= count for line in lines)
    assert all(0 < line["teacher/feature_std"] < 1.2 and line["bad_steps"] == 0 for line in lines)
