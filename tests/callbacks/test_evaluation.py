"""When the teacher is evaluated, what is kept of it, and that training does not notice."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer.utils import dist, get_device
from PIL import Image
from sklearn.datasets import load_digits

from dinocomp.build import build_run, check_start
from dinocomp.build.evaluation import labelled_pair
from dinocomp.callbacks import OnlineEvaluation
from dinocomp.callbacks.evaluation import Measures
from dinocomp.checkpoints.folder import BEST_TEACHER, TEACHER
from dinocomp.config import load_config
from dinocomp.evaluate.online import Evaluated, pixels_of, read_evaluations, scores_of, write_evaluations
from dinocomp.interop import read_about, read_teacher
from dinocomp.train import main

from ..helpers import small_folder, words, yaml_of_nothing

pytestmark = pytest.mark.usefixtures("one_cache")


def test_training_does_not_notice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same weights to the last bit with every measure and pictures, in spite of drop path and workers."""
    nothing = yaml_of_nothing(tmp_path)
    every = {
        "evaluation__eval_period_iterations": 4,
        "evaluation__at_start": "true",
        "evaluation__pictures": "true",
        "evaluation__label_free": "always",
        "evaluation__label_free_images": 16,
        "evaluation__label_free_views": 2,
        "evaluation__train_images": 100,
        "evaluation__val_images": 50,
    }
    for name, changes in (("with", every), ("without", {"evaluation__eval_period_iterations": 0})):
        settings = words(tmp_path / name, optim__epochs=2, train__num_workers=1, **changes)
        assert main([nothing, *settings]) == 0
    ours, theirs = (read_teacher(tmp_path / name / TEACHER)[0] for name in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()

    found = read_evaluations(tmp_path / "with" / "evaluation.jsonl")
    assert sorted(found) == [0, 4, 8] and all(evaluated.seconds > 0 for evaluated in found.values())
    assert {*found[8].label_free} == {"rankme", "lidar", "neighbour_consistency"}
    best = max(found.values(), key=lambda evaluated: evaluated.score)
    assert int(read_about(tmp_path / "with" / BEST_TEACHER)["iteration"]) == best.iteration
    assert (tmp_path / "with/pictures/iteration-00000004/pca.png").exists()
    said = capsys.readouterr().out
    assert "k-NN accuracy on 50 held-out images" in said
    pixels = found[0].pixels[5]
    assert pixels > 0.8 and not found[4].pixels and f"; of raw pixels (16 x 16): k=5 {pixels:.1%}" in said
    assert f"; raw pixels {pixels:.1%}\n" in said, "and in the summary"


def test_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = small_folder(tmp_path / "images", 20)
    settings = words(tmp_path / "run", train__dataset_path=images, optim__epochs=1, evaluation__label_free_images=16)
    assert main([yaml_of_nothing(tmp_path), *settings]) == 0
    said = capsys.readouterr().out
    (line,) = (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["iteration"] == 4 and "knn_top1" not in found
    rank = found["label_free"]["rankme"]
    assert f"without labels, the teacher at iteration 4: rankme {rank:.3g} of 16, lidar " in said
    assert f"\nwithout labels: rankme {rank:.3g} of 16, lidar " in said, "and in the summary"
    assert 1 < rank <= 16 and 0 <= found["label_free"]["neighbour_consistency"] <= 1
    assert not (tmp_path / "run" / BEST_TEACHER).exists()


class Clock:
    """A day in which evaluations take 10 s and an iteration takes 1 s."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr("dinocomp.callbacks.evaluation.time", clock)
    yield clock


def evaluation_of(folder: Path, clock: Clock, accuracies: Iterator[float], **settings: object) -> OnlineEvaluation:
    def knn(backbone: object) -> dict[int, float]:
        clock.now += 10
        return {5: next(accuracies)}

    def export() -> object:
        def write(path: Path, iteration: int) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(iteration))

        return write

    model = SimpleNamespace(shells=lambda role: {"backbone": None})

    def pixels(backbone: object) -> dict[int, float]:
        clock.now += 90
        return {5: 0.95}

    defaults = {"period": 5, "iterations": 10**6, "at_start": False, "budget": 1.0, "remedy": "change something"}
    return OnlineEvaluation(
        model,
        Measures(knn=knn, pixels=pixels),
        folder=folder,
        export_teacher=export,
        stop=SimpleNamespace(requested=False),
        **defaults | settings,
    )


def run(evaluation: OnlineEvaluation, clock: Clock, start: int, end: int) -> dict[str, float]:
    """The metrics that were logged."""
    logged: dict[str, float] = {}
    logger = SimpleNamespace(log_metrics=lambda metrics: logged.update(metrics))

    def event(name: str, iteration: int) -> None:
        state = SimpleNamespace(timestamp=SimpleNamespace(batch=iteration))
        getattr(evaluation, name)(state, logger)

    event("fit_start", start)
    for iteration in range(start + 1, end + 1):
        clock.now += 1
        event("batch_end", iteration)
    event("fit_end", end)
    return logged


def test_the_budget_is_kept(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """At a quarter, 30 s of training lie between evaluations of 10 s; copies are kept all the same."""
    caplog.set_level(logging.INFO, "dinocomp")
    evaluation = evaluation_of(tmp_path, clock, iter([0.5] * 99), budget=0.25)
    run(evaluation, clock, 0, 102)
    assert sorted(evaluation.found) == [5, 35, 65, 95, 102]
    assert len([*tmp_path.glob("evaluation/iteration-*/teacher.safetensors")]) == 20
    told = [message for message in caplog.messages if "left out" in message]
    assert len(told) == 1 and "evaluation.budget=0.25 wants 30 s of training" in told[0]


def test_the_best_teacher_stays(tmp_path: Path, clock: Clock) -> None:
    evaluation = evaluation_of(tmp_path, clock, iter([0.3, 0.5, 0.8, 0.6, 0.8, 0.7]), at_start=True)
    run(evaluation, clock, 0, 25)
    assert (tmp_path / BEST_TEACHER).read_text() == "10", "the first of two equal ones"
    assert evaluation.found[25].knn == {5: 0.7}


def test_a_best_teacher_of_a_future_that_is_trained_anew(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on from iteration 12, with a best teacher of 15: that of 10, kept at its evaluation, takes over."""
    monkeypatch.setattr("dinocomp.callbacks.evaluation.read_about", lambda path: {"iteration": Path(path).read_text()})
    run(evaluation_of(tmp_path, clock, iter([0.3, 0.5, 0.8])), clock, 0, 15)
    assert (tmp_path / BEST_TEACHER).read_text() == "15"
    evaluation = evaluation_of(tmp_path, clock, iter([0.4, 0.6]))
    run(evaluation, clock, 12, 14)
    assert (tmp_path / BEST_TEACHER).read_text() == "10" and sorted(evaluation.found) == [5, 10, 14]


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    assert read_evaluations(path) == {}
    found = {3: Evaluated(3, {10: 0.5, 20: 0.25}, {"rankme": 7.5}, 1.25), 9: Evaluated(9, {}, {"rankme": 8.0}, 2.0)}
    found[0] = Evaluated(0, {10: 0.25}, {}, 0.5, {10: 0.75, 20: 0.5})
    write_evaluations(path, found)
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"iteration": 0, "knn_top1": {"10": 0.25}, "pixels_top1": {"10": 0.75, "20": 0.5}, "seconds": 0.5}
    assert read_evaluations(path) == found and found[3].score == 0.5 and found[9].score == -1
    path.write_text(path.read_text()[:-20])  # cut short
    assert read_evaluations(path) == {0: found[0], 3: found[3]}
    assert pixels_of(found, 20) == 0.5 and pixels_of(found, 5) is None
    assert scores_of(found, 10) == [(0, 0.25), (3, 0.5)]


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    """Of two folders that number their classes each in its own way; the online accuracy is that of the right labels."""
    digits = load_digits()
    for split, start in (("train", 0), ("val", 500)):
        for label in range(0 if split == "train" else 2, 5):  # val lacks the first two
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in [i for i in range(start, start + 300) if digits.target[i] == label][:12]:
                Image.fromarray((digits.images[i] * 15).astype("uint8")).resize((16, 16)).save(folder / f"{i}.png")
    paths = {f"evaluation__{split}_dataset_path": tmp_path / split for split in ("train", "val")}
    config = load_config(None, words(tmp_path / "run", **paths, data__cache_dir=tmp_path / "cache")).config
    pair = labelled_pair(config)
    assert [name for _, name in pair.val.classes] == [name for _, name in pair.train.classes]
    for images in (pair.train, pair.val):
        for i in range(len(images)):
            sample, _ = images.decode(i)
            assert images.classes[sample.label].id == sample.key.split("/")[0]


def test_a_diverged_teacher_is_no_reason_to_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = small_folder(tmp_path / "images", 20)
    settings = words(tmp_path / "run", train__dataset_path=images, evaluation__label_free_images=16)
    config = load_config(None, settings).config
    dist.initialize_dist(get_device("cpu"))
    run = build_run(config, check_start(config))
    with torch.no_grad():
        run.model.networks("teacher")["backbone"].pos_embed.fill_(torch.nan)
    assert run.callbacks.evaluation.measures.label_free(run.model.shells("teacher")["backbone"]) == {}
    assert "not finite" in caplog.text


def test_only_accuracies_of_the_same_k_are_compared(tmp_path: Path, clock: Clock) -> None:
    """A run that goes on with other neighbours begins to compare anew."""
    write_evaluations(tmp_path / "evaluation.jsonl", {5: Evaluated(5, {20: 0.9})})
    run(evaluation_of(tmp_path, clock, iter([0.4])), clock, 6, 9)
    assert (tmp_path / BEST_TEACHER).read_text() == "9"


def test_a_decline_is_said_when_it_is_new(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Once, again where it grows, and not again by a process that goes on; raw pixels are measured once."""

    def told() -> list[str]:
        found = [message for message in caplog.messages if message.startswith("iteration ")]
        caplog.clear()
        return found

    scores = iter([0.5, 0.505, 0.505, 0.8, 0.7, 0.695])
    evaluation = evaluation_of(tmp_path, clock, scores, at_start=True, iterations=40)
    assert run(evaluation, clock, 0, 25)["knn/pixels_k5"] == 0.95
    assert told() == [
        "iteration 10: k-NN accuracy of 50.5 % is no better than before training (50.0 %) -> change something",
        "iteration 20: k-NN accuracy fell from 80.0 % (iteration 15) to 70.0 %; k-NN accuracy of 70.0 % is worse than "
        "that of raw pixels (95.0 %) -> the better teacher is in best_teacher.safetensors; change something",
    ]
    evaluation = evaluation_of(tmp_path, clock, iter([0.69, 0.6, 0.6]), at_start=True, iterations=40)
    assert "knn/pixels_k5" not in run(evaluation, clock, 25, 40)
    assert evaluation.found[0].pixels == {5: 0.95} and evaluation.took == 10
    assert told() == [
        "iteration 35: k-NN accuracy fell from 80.0 % (iteration 15) to 60.0 % -> the better teacher is in "
        "best_teacher.safetensors; change something"
    ]


def test_raw_pixels_do_not_count_for_the_budget(tmp_path: Path, clock: Clock) -> None:
    """They take 90 s, once, and the evaluation 10 s: at a half, the next may come 10 s later."""
    evaluation = evaluation_of(tmp_path, clock, iter([0.5] * 9), at_start=True, budget=0.5)
    run(evaluation, clock, 0, 10)
    assert sorted(evaluation.found) == [0, 10] and evaluation.found[0].seconds == 10
