"""Stopping, going on, and starting from weights."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from composer.utils import dist, get_device
from safetensors.torch import load_file

from dinocomp.build import Run, build_run, check_start
from dinocomp.config import load_config
from dinocomp.evaluate.online import read_evaluations
from dinocomp.train import main

from . import processes
from .helpers import CURRICULUM, load_checkpoint, metrics, small_folder, weights, words, yaml_of_nothing

pytestmark = pytest.mark.usefixtures("one_cache")


def open_run(output: Path, **changes) -> Run:
    """A run of this process, built and not started."""
    config = load_config(None, words(output, **changes)).config
    return build_run(config, check_start(config))


@pytest.mark.parametrize(
    ("workers", "changes"),
    [
        (0, {"train__centering": "centering"}),
        (2, {"train__centering": "centering"}),
        (0, {"train__centering": "sinkhorn_knopp"}),
        (2, {"train__centering": "sinkhorn_knopp", "optim__freeze_backbone_epochs": 1}),
        (2, {"train__centering": "sinkhorn_knopp", "performance__device_augment": "true", "train__microbatch_size": 4}),
        (0, {"train__centering": "centering", **CURRICULUM, "curriculum__fraction": 0.42}),
        (2, {"train__centering": "sinkhorn_knopp", **CURRICULUM, "train__microbatch_size": 4}),
    ],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, workers: int, changes: dict) -> None:
    """Bit for bit: weights, optimizer, centres; with drop path and masks drawn on the way.

    Of 12 iterations; smaller crops end at the 5th, just before the first run does, or at the 7th, after it.
    """
    changes = {"train__num_workers": workers, "ibot__separate_head": "true", **changes}

    def run(output: Path, iterations: int | None) -> None:
        dist.initialize_dist(get_device("cpu"))
        output.mkdir(exist_ok=True)
        run = open_run(output, **changes)
        run.trainer.fit() if iterations is None else run.trainer.fit(duration=f"{iterations}ba")
        run.trainer.close()

    run(tmp_path / "whole", None)
    run(tmp_path / "parts", 6)  # two iterations after the checkpoint of iteration 4, which are lost
    assert [line["iteration"] for line in metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    run(tmp_path / "parts", None)
    whole, parts = (weights(tmp_path / name, 12) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and len(whole) > 50
    differing = [name for name in whole if not torch.equal(whole[name], parts[name])]
    assert not differing
    timeless = ("images_per_second", "seconds_per_iteration", "data_wait", "memory_gb")
    logged = [
        [{k: v for k, v in m.items() if k not in timeless} for m in metrics(tmp_path / n)] for n in ("whole", "parts")
    ]
    assert logged[0] == logged[1]


def test_weights_to_start_from(tmp_path: Path) -> None:
    """A checkpoint gives student and teacher, a teacher file the teacher twice, a backbone the backbone."""
    nothing = yaml_of_nothing(tmp_path)
    assert main([nothing, *words(tmp_path / "first", optim__epochs=2)]) == 0
    checkpoint, teacher = tmp_path / "first/checkpoints/iteration-00000008", tmp_path / "first/teacher.safetensors"
    saved = load_checkpoint(tmp_path / "first", 8)["state"]["model"]
    dist.initialize_dist(get_device("cpu"))

    def start(**changes) -> dict[str, torch.Tensor]:
        run = open_run(tmp_path / "second", **changes)
        run.trainer.close()
        return run.model.state_dict()

    prefix = "student_backbone.net."
    ours = start(MODEL__WEIGHTS=checkpoint)
    assert all(torch.equal(ours[name], weight) for name, weight in saved.items())
    assert ours["dino_targets.center"].any()
    ours = start(MODEL__WEIGHTS=teacher)
    assert all(torch.equal(ours[n], saved[n.replace("student", "teacher")]) for n in ours if "center" not in n)
    ours = start(student__pretrained_weights=teacher)
    assert all(torch.equal(ours[n], saved[n.replace("student", "teacher")]) for n in ours if n.startswith(prefix))
    assert not torch.equal(ours["student_dino_head.net.mlp.0.weight"], saved["teacher_dino_head.net.mlp.0.weight"])


def test_resume_by_key(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nothing = yaml_of_nothing(tmp_path)
    assert main([nothing, *words(tmp_path / "run", checkpoint__resume="must")]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert main([nothing, *words(tmp_path / "run", optim__epochs=1)]) == 0
    assert main([nothing, *words(tmp_path / "run", checkpoint__resume="never")]) == 2
    assert "there are checkpoints in" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_stop_and_resume_together(tmp_path: Path, free_port: int) -> None:
    """Only one of two is told to stop: both do after the same step, and end bit for bit where they would have."""
    nothing, four = yaml_of_nothing(tmp_path), {"train__batch_size_per_gpu": 4, "optim__epochs": 2}

    def run(name: str, *before: object) -> list[int]:
        ranks = processes.start_ranks([nothing, *words(tmp_path / name, **four)], 2, free_port, *before)
        return [processes.finish(rank) for rank in ranks]

    assert run("whole") == [0, 0]
    assert run("parts", processes.signal_at_iteration, 6, signal.SIGTERM, 1) == [75, 75]
    assert [line["iteration"] for line in metrics(tmp_path / "parts")] == list(range(1, 7))
    assert run("parts") == [0, 0]
    whole, parts = (weights(tmp_path / name, 8) for name in ("whole", "parts"))
    assert not [name for name in whole if not torch.equal(whole[name], parts[name])]


@pytest.mark.slow
def test_other_processes_and_workers_on_resume(tmp_path: Path, free_port: int) -> None:
    """1 -> 2 -> 1 processes, 0 -> 2 -> 0 workers: the same images, crops and masks, so the same losses."""
    images = small_folder(tmp_path / "images")

    def arguments(name: str, **changes: object) -> list[str]:
        fixed = {"student__drop_path_rate": 0, "dino__koleo_loss_weight": 0, "train__dataset_path": images}
        fixed |= {"data__cache_dir": tmp_path / "cache"}
        return [yaml_of_nothing(tmp_path), *words(tmp_path / name, **fixed | changes)]

    assert processes.finish(processes.start(arguments("whole"))) == 0
    stop = (processes.signal_at_iteration, 4, signal.SIGTERM)
    assert processes.finish(processes.start(arguments("parts"), *stop)) == 75
    two = arguments("parts", train__batch_size_per_gpu=4, train__num_workers=2)
    assert [processes.finish(rank) for rank in processes.start_ranks(two, 2, free_port, *stop)] == [75, 75]
    assert processes.finish(processes.start(arguments("parts"))) == 0
    said = (tmp_path / "parts" / "train.log").read_text()
    assert "processes were 1, are 2 (" in said and "processes were 2, are 1 (" in said
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [line["iteration"] for line in parts] == list(range(1, 13))
    for one, other in zip(whole, parts, strict=True):
        for name in ("loss/total", "loss/dino_local", "loss/ibot", "grad_norm/backbone", "lr", "teacher/entropy_ibot"):
            assert other[name] == pytest.approx(one[name], rel=2e-5), (one["iteration"], name)


def test_weights_with_their_iteration(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`MODEL.KEEP_ITERATION` takes over the iteration, as the reference does, but not the optimizer."""
    nothing = yaml_of_nothing(tmp_path)
    assert main([nothing, *words(tmp_path / "first", optim__epochs=2)]) == 0
    assert main([nothing, *words(tmp_path / "whole")]) == 0
    changes = {"MODEL__KEEP_ITERATION": "true"}
    for name in ("checkpoints/iteration-00000004", "teacher.safetensors"):
        weights_file, output = tmp_path / "first" / name, tmp_path / name.replace("/", "-")
        start = 4 if "checkpoints" in name else 8
        assert main([nothing, *words(output, **changes, MODEL__WEIGHTS=weights_file)]) == 0
        lines, whole = metrics(output), metrics(tmp_path / "whole")
        assert [line["iteration"] for line in lines] == list(range(start + 1, 13))
        assert [line["lr"] for line in lines] == [line["lr"] for line in whole[start:]]
        if start == 4:  # the same images and weights: the same first loss, but for what drop path draws
            assert lines[0]["loss/dino_global"] == pytest.approx(whole[4]["loss/dino_global"], rel=0.1)
    capsys.readouterr()
    teacher = load_file(tmp_path / "first" / "teacher.safetensors")
    torch.save({"teacher": teacher}, tmp_path / "reference.pth")
    assert main([nothing, *words(tmp_path / "no", **changes, MODEL__WEIGHTS=tmp_path / "reference.pth")]) == 2
    assert "does not say of which iteration it is; type MODEL.KEEP_ITERATION=false" in capsys.readouterr().err
    torch.save({"teacher": teacher, "iteration": 11}, tmp_path / "reference.pth")
    assert main([nothing, *words(tmp_path / "no", **changes, MODEL__WEIGHTS=tmp_path / "reference.pth")]) == 2
    assert "is of iteration 12, and the run has 12. Raise optim.epochs" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_finished_run_goes_on_without_its_weights_file(tmp_path: Path) -> None:
    nothing, output = yaml_of_nothing(tmp_path), tmp_path / "run"
    assert main([nothing, *words(tmp_path / "first", optim__epochs=1)]) == 0
    teacher = tmp_path / "first" / "teacher.safetensors"
    changes = {"MODEL__WEIGHTS": teacher, "optim__epochs": 1}
    assert main([nothing, *words(output, **changes)]) == 0
    teacher.unlink()
    assert main([nothing, *words(output, **changes | {"optim__epochs": 2})]) == 0
    assert [line["iteration"] for line in metrics(output)] == list(range(1, 9))


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nothing, output = yaml_of_nothing(tmp_path), tmp_path / "run"
    changes = {"optim__epochs": 1, "evaluation__eval_period_iterations": 0}
    assert main([nothing, *words(output, **changes)]) == 0
    whole = (output / "evaluation.jsonl").read_text()
    before = read_evaluations(output / "evaluation.jsonl")
    assert list(before) == [4]
    for left in (whole[:-15], None):
        (output / "evaluation.jsonl").unlink()
        if left:
            (output / "evaluation.jsonl").write_text(left)
        assert main([nothing, *words(output, **changes)]) == 0
        assert "k-NN accuracy on 359 held-out images" in capsys.readouterr().out
        assert read_evaluations(output / "evaluation.jsonl")[4].knn == before[4].knn


@pytest.mark.slow
def test_a_stop_at_an_evaluation(tmp_path: Path) -> None:
    """One that is due in the step that was told to stop is made up for; one that is under way is finished first."""
    arguments = [yaml_of_nothing(tmp_path), *words(tmp_path / "run", evaluation__eval_period_iterations=6)]
    stop = (processes.signal_at_iteration, 6, signal.SIGTERM)
    assert processes.finish(processes.start(arguments, *stop)) == 75
    assert not (tmp_path / "run" / "evaluation").exists()
    assert processes.finish(processes.start(arguments, processes.signal_at_evaluation, signal.SIGTERM)) == 75
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == list(range(1, 8)), "one step more"

    def evaluated() -> list[int]:
        return [json.loads(line)["iteration"] for line in (tmp_path / "run/evaluation.jsonl").read_text().splitlines()]

    assert (tmp_path / "run/evaluation/iteration-00000006/teacher.safetensors").exists() and evaluated() == [6]
    assert processes.finish(processes.start(arguments)) == 0
    assert evaluated() == [6, 12]


def test_a_teacher_without_checkpoints_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nothing = yaml_of_nothing(tmp_path)
    assert main([nothing, *words(tmp_path / "run", optim__epochs=1)]) == 0
    teacher = tmp_path / "run" / "teacher.safetensors"
    before = teacher.read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main([nothing, *words(tmp_path / "run", optim__epochs=1)]) == 2
    assert "starting from scratch would write over it" in capsys.readouterr().err and teacher.read_bytes() == before


def test_checkpoints_of_an_earlier_layout_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/iteration-00000004.pt").write_bytes(b"old")
    assert main([yaml_of_nothing(tmp_path), *words(tmp_path / "run")]) == 2
    assert "checkpoints of an earlier dinocomp" in capsys.readouterr().err


def test_what_is_refused_leaves_everything_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nothing, output = yaml_of_nothing(tmp_path), tmp_path / "run"
    assert main([nothing, *words(output, optim__epochs=1)]) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    images = small_folder(tmp_path / "images", 8)
    refused = {
        "student__depth": (3, "student.depth was 2, is 3"),
        "dino__head_n_prototypes": (40, "dino.head_n_prototypes was 32, is 40"),
        "checkpoint__resume": ("never", "there are checkpoints in"),
        "performance__precision": ("bf16", "needs a GPU"),
    }
    for key, (value, message) in refused.items():
        capsys.readouterr()
        change = {key: value, "train__dataset_path": images, "data__cache_dir": tmp_path / "cache"}
        assert main([nothing, *words(output, optim__epochs=1, **change)]) == 2, key
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "cache").exists(), "nothing was converted for a run that cannot be"


def test_what_changed_is_said_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run that goes on with other settings says which, and keeps the old ones; a finished one keeps its config."""
    nothing, output = yaml_of_nothing(tmp_path), tmp_path / "run"
    assert main([nothing, *words(output, optim__epochs=1)]) == 0
    first = (output / "config.yaml").read_text()
    assert main([nothing, *words(output, optim__epochs=1, train__seed=5)]) == 0
    assert "was 0, is 5" not in capsys.readouterr().out, "nothing goes on with it"
    assert (output / "config.yaml").read_text() == first
    assert main([nothing, *words(output, optim__epochs=2, train__seed=5)]) == 0
    said = capsys.readouterr().out
    assert "note: train.seed was 0, is 5 (images come in another order and other crops from here on)" in said
    assert "note: optim.epochs was 1, is 2" in said
    assert (output / "config-until-00000004.yaml").read_text() == first
    assert load_config(str(output / "config.yaml")).config.train.seed == 5
    shutil.rmtree(output / "checkpoints" / "iteration-00000008")  # as if killed before it was saved
    assert main([nothing, *words(output, optim__epochs=2, train__seed=6)]) == 0
    assert (output / "config-until-00000004.yaml").read_text() == first, "what iterations 1 to 4 were made with"


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    for where in ("file", "file/below"):
        assert main([yaml_of_nothing(tmp_path), *words(tmp_path / where)]) == 2
        assert "cannot be written to" in capsys.readouterr().err


def test_missing_weights_are_a_message(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nothing = yaml_of_nothing(tmp_path)
    assert main([nothing, *words(tmp_path / "run", MODEL__WEIGHTS="nowhere.pt")]) == 2
    assert "MODEL.WEIGHTS=nowhere.pt: nowhere.pt does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
