"""Losses and gradients that are not finite, and inputs that invite them."""

import json
from pathlib import Path

import pytest
import torch

from dinocomp.checkpoints.folder import list_checkpoints
from dinocomp.checkpoints.manifest import iteration_of
from dinocomp.method import DINOv2
from dinocomp.train import main

from . import processes
from .helpers import load_checkpoint, metrics, small_folder, weights, words, yaml_of_nothing

pytestmark = pytest.mark.usefixtures("one_cache")


DEFERRED = {"performance__async_step": "true", "performance__fused_optimizer": "true"}


@pytest.mark.parametrize(("how", "when"), [("gradient", {}), ("loss", DEFERRED)])
def test_a_bad_step_is_not_taken(tmp_path: Path, how: str, when: dict) -> None:
    """Iteration 6 of a run with a checkpoint at each, stopped there: 5 and 6 differ in nothing that is learnt."""
    kept = {"train__OFFICIAL_EPOCH_LENGTH": 1, "optim__epochs": 8, "checkpoint__max_to_keep": 0}
    arguments = [yaml_of_nothing(tmp_path), *words(tmp_path / "run", **kept, **when)]
    assert processes.finish(processes.start(arguments, processes.spoil_and_stop, [6], -1, how)) == 75
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    assert processes.finish(processes.start(arguments)) == 0
    before, after, then = (weights(tmp_path / "run", iteration) for iteration in (5, 6, 7))
    learnt = [name for name in before if not name.startswith("/rng")]
    assert any("dino_targets.center" in name for name in learnt) and any("exp_avg_sq" in name for name in learnt)
    assert not [name for name in learnt if not torch.equal(before[name], after[name])]
    moved = [name for name in learnt if not torch.equal(after[name], then[name])]
    assert len(moved) > 0.9 * len(learnt), "and the one after it is taken"
    assert all(torch.isfinite(tensor).all() for tensor in then.values())
    assert [line["bad_steps"] for line in metrics(tmp_path / "run")] == [0, 0, 0, 0, 0, 1, 1, 1]
    said = (tmp_path / "run" / "train.log").read_text()
    assert "iteration 6: loss or gradient is not finite" in said and "step skipped (1 so far, 1 in a row)" in said


@pytest.mark.parametrize("when", [{}, DEFERRED], ids=["at-once", "deferred"])
def test_all_ranks_skip_together(tmp_path: Path, free_port: int, when: dict) -> None:
    """Only rank 1 has an infinite loss; both ranks leave the step out."""
    kept = {"train__OFFICIAL_EPOCH_LENGTH": 1, "optim__epochs": 5, "checkpoint__max_to_keep": 0}
    arguments = [yaml_of_nothing(tmp_path), *words(tmp_path / "run", **kept, **when)]
    ranks = processes.start_ranks(arguments, 2, free_port, processes.spoil_and_stop, [3], 1, "loss")
    assert [processes.finish(rank) for rank in ranks] == [75, 75]
    before, after = weights(tmp_path / "run", 2), weights(tmp_path / "run", 3)
    assert not [name for name in before if not name.startswith("/rng") and not torch.equal(before[name], after[name])]
    assert "(of another process): step skipped" in (tmp_path / "run" / "train.log").read_text()


def test_too_many_bad_steps_end_the_run(tmp_path: Path) -> None:
    """The message says what to try. A checkpoint that is due among bad steps is put off until the next good one."""
    arguments = [
        yaml_of_nothing(tmp_path),
        *words(tmp_path / "run", train__OFFICIAL_EPOCH_LENGTH=2, optim__epochs=6, optim__max_bad_steps=4),
    ]
    bad = [2, 5, 6, 8, 9, 10, 11]
    assert processes.finish(processes.start(arguments, processes.spoil, bad, -1, "gradient")) == 3
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["status"], facts["iteration"]) == ("failed", 10) and facts["error"].startswith("TrainingError: ")
    said = (tmp_path / "run" / "train.log").read_text()
    assert "4 steps in a row up to iteration 11" in said and "optim.max_bad_steps=4" in said
    assert "Lower optim.base_lr" in said
    assert [iteration_of(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [3, 4, 7]
    saved = load_checkpoint(tmp_path / "run", 7)
    assert all(
        torch.isfinite(tensor).all() for tensor in saved["state"]["model"].values() if tensor.is_floating_point()
    )
    assert processes.finish(processes.start(arguments)) == 0
    assert metrics(tmp_path / "run")[-1]["bad_steps"] == 3, "those of iterations 2, 5 and 6"


def test_bad_steps_are_counted_across_a_stop(tmp_path: Path) -> None:
    arguments = [yaml_of_nothing(tmp_path), *words(tmp_path / "run", optim__max_bad_steps=4)]
    stop = (processes.spoil_and_stop, [6, 7, 8], -1, "gradient")
    assert processes.finish(processes.start(arguments, *stop)) == 75
    assert processes.finish(processes.start(arguments, processes.spoil, [1], -1, "gradient")) == 3, "3 and 1 make 4"


@pytest.mark.parametrize(
    "changes",
    [
        {"train__batch_size_per_gpu": 1},
        {"ibot__mask_sample_probability": 0.01},  # of 16 crops: none has a mask
        {"train__centering": "sinkhorn_knopp", "train__batch_size_per_gpu": 1},
        {"train__centering": "sinkhorn_knopp", "teacher__warmup_teacher_temp": 1e-4, "teacher__teacher_temp": 1e-4},
    ],
)
@pytest.mark.parametrize("equal_images", [False, True])
def test_odd_batches_are_finite(tmp_path: Path, changes: dict, equal_images: bool) -> None:
    """One image, no mask, huge logits; and all of it with images that are all the same grey."""
    images = small_folder(tmp_path / "images", 12)
    if equal_images:
        for path in images.iterdir():
            path.write_bytes((images / "000.png").read_bytes())
    fixed = {"train__dataset_path": images, "data__cache_dir": tmp_path / "cache", "optim__epochs": 1}
    arguments = [yaml_of_nothing(tmp_path), *words(tmp_path / "run", **fixed, **changes)]
    assert processes.finish(processes.start(arguments)) == 0
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4 and lines[-1]["bad_steps"] == 0
    assert all(value is not None for line in lines for value in line.values())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA out of memory. The train loop failed with an internal microbatch of size 1."),
    ],
    ids=["memory", "search"],
)
def test_out_of_memory_is_a_message(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def loss(*_: object) -> None:
        raise error

    monkeypatch.setattr(DINOv2, "loss", loss)
    assert main([yaml_of_nothing(tmp_path), *words(tmp_path / "run")]) == 3
    said = capsys.readouterr().err
    assert "8 images at a time on each process: type train.microbatch_size=4" in said and "Traceback" not in said
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
