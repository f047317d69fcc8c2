"""What is said of a run."""

from pathlib import Path
from typing import Any

import pytest

from dinocomp.report import read_run
from dinocomp.report.verdict import gauges_of, knn_of, verdicts

from .folders import line, write_run


def said(folder: Path, **run: Any) -> list[tuple[str, str]]:
    return [(verdict.level, verdict.text) for verdict in verdicts(read_run(write_run(folder, **run)))]


def test_a_healthy_run(tmp_path: Path) -> None:
    assert said(tmp_path / "run") == [
        ("good", "k-NN accuracy: 50.0 % before training, 85.0 % now."),
        ("good", "No sign of collapse: the teacher tells images apart."),
        ("good", "Data wait 1.0 %: the data are no bottleneck."),
    ]


@pytest.mark.parametrize(
    ("run", "level", "words"),
    [
        (
            {"lines": [line(900, teacher__feature_std=0.01)]},
            "bad",
            "Spread of features: 0.01. This looks like",
        ),
        ({"lines": [line(900, teacher__prototypes_dino=1.2)]}, "bad", "1.2 of 128. This looks like collapse."),
        ({"lines": [line(900, teacher__prototypes_dino=2.5)]}, "watch", "2.5 of 128. This is near collapse."),
        ({"lines": [line(900, teacher__entropy_dino=4.8519)]}, "bad", "Entropy of the targets (dino)"),
        ({"knn": {0: 0.5, 500: 0.9, 1000: 0.7}}, "watch", "k-NN accuracy fell from 90.0 % (iteration 500) to 70.0 %."),
        ({"knn": {0: 0.5, 500: 0.9, 1000: 0.7}}, "note", "k-NN accuracy: 50.0 % before training, 70.0 % now."),
        ({"knn": {0: 0.5, 500: 0.9, 1000: 0.89}}, "good", "k-NN accuracy: 50.0 % before training, 89.0 % now."),
        ({"knn": {0: 0.5, 1000: 0.4}}, "watch", "k-NN accuracy fell from 50.0 % (iteration 0)"),
        ({"knn": {0: 0.5, 1000: 0.5}}, "watch", "50.0 % is no better than before training (50.0 %)."),
        ({"pixels": 0.9}, "watch", "k-NN accuracy of 85.0 % is worse than that of raw pixels (90.0 %)."),
        ({"pixels": 0.4}, "good", "k-NN accuracy: 50.0 % before training, 85.0 % now; raw pixels 40.0 %."),
        ({"knn": {}, "evaluation": None}, "note", "No k-NN accuracy is measured"),
        ({"lines": [line(i, data_wait=0.3) for i in (1, 2, 3)]}, "watch", "Data wait 30.0 %: training stands still"),
        ({"lines": [line(i, data_wait=0.05) for i in (1, 2, 3)]}, "note", "Data wait 5.0 %"),
        ({"lines": [line(900, bad_steps=3)]}, "watch", "3 step(s) were skipped"),
        ({"lines": [line(900, bad_images=2)]}, "watch", "2 image(s) could not be read"),
        ({"lines": [line(900, loss__total=None)]}, "watch", "The last loss is not a finite number."),
        ({"status": "failed", "error": "OSError: disk full"}, "bad", "The run failed: OSError: disk full"),
        ({"status": "stopped", "lines": [line(300)], "knn": {}}, "note", "Stopped at iteration 300 of 1,000"),
        ({"warnings": ("a", "b", "b")}, "note", "3 warnings in the log, the newest: b"),
    ],
)
def test_what_is_seen(tmp_path: Path, run: dict, level: str, words: str) -> None:
    found = said(tmp_path / "run", **run)
    assert any(level == each and words in text for each, text in found), found
    order = [("bad", "watch", "note", "good").index(each) for each, _ in found]
    assert order == sorted(order), "the worst first"


def test_gauges_say_what_is_healthy_and_wait_for_the_warm_up(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "late", lines=[line(900)]))
    spread, prototypes, entropy = gauges_of(record)
    assert (spread.now, spread.level) == ("0.9", "good") and "well above 0.05" in spread.healthy
    assert prototypes.now == "120 of 128" and entropy.now == "3.2 of 4.85 nats"
    early = read_run(write_run(tmp_path / "early", lines=[line(50, teacher__entropy_dino=4.8519)], knn={}))
    entropy = gauges_of(early)[2]
    assert entropy.level == "note" and "rises until iteration 100" in entropy.now
    assert not any(verdict.level == "bad" for verdict in verdicts(early))


def test_knn_of_the_first_k(tmp_path: Path) -> None:
    knn = knn_of(read_run(write_run(tmp_path / "run", knn={0: 0.5, 500: 0.9, 1000: 0.8})).evaluations)
    assert (knn.k, knn.first, knn.last, knn.best, knn.best_iteration) == (10, 0.5, 0.8, 0.9, 500)
    assert knn_of({}) is None


def test_what_to_do_about_a_decline(tmp_path: Path) -> None:
    """What the log says, from the run's own settings."""
    words = ("optim.base_lr=0.008", "train.centering=centering")
    first, *_ = verdicts(read_run(write_run(tmp_path / "run", knn={0: 0.5, 500: 0.9, 1000: 0.7}, words=words)))
    assert first.remedy == (
        "The better teacher is kept in evaluation/iteration-00000500. Try in a new train.output_dir, one after the "
        "other: recipes=[small_data], optim.epochs=40 (twice as long, where it still rises), "
        "optim.base_lr=0.004 (half of it)."
    )
