"""A backbone that stays as it starts while its heads learn."""

from pathlib import Path
from signal import SIGTERM

import pytest
import torch
from composer.utils import dist, get_device

from dinocomp.build import build_run, check_start
from dinocomp.config import load_config
from dinocomp.evaluate.online import read_evaluations
from dinocomp.train import main

from . import processes
from .helpers import load_checkpoint, metrics, words, yaml_of_nothing
from .sharding import shard_on_cpu

pytestmark = pytest.mark.usefixtures("one_cache")

FROZEN = {
    "optim__freeze_backbone_epochs": 1,  # 4 iterations
    "optim__freeze_last_layer_epochs": 0,
    "student__drop_path_rate": 0,
    "student__layerscale": "null",
    "train__centering": "sinkhorn_knopp",
    "dino__koleo_distributed": "true",
}


def test_the_backbone_stays_while_heads_learn(tmp_path: Path) -> None:
    """Its averages begin when it is let go, and its learning rate rises then."""
    words_ = words(tmp_path / "run", **FROZEN)
    config = load_config(None, words_).config
    dist.initialize_dist(get_device("cpu"))
    run = build_run(config, check_start(config))
    start = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.trainer.fit()
    run.trainer.close()

    def moved(iteration: int, role: str, net: str) -> bool:
        saved = load_checkpoint(tmp_path / "run", iteration)["state"]["model"]
        names = [name for name in saved if name.startswith(f"{role}_{net}.")]
        return any(not torch.equal(saved[name], start[name]) for name in names)

    assert moved(4, "student", "dino_head") and moved(4, "teacher", "dino_head")
    assert not moved(4, "student", "backbone") and not moved(4, "teacher", "backbone")
    assert moved(8, "student", "backbone") and moved(8, "teacher", "backbone")
    for iteration, steps in ((4, {0, 4}), (8, {4, 8})):
        state = load_checkpoint(tmp_path / "run", iteration)["state"]["optimizers"]["AdamW"]["state"]
        assert {int(averages["step"]) for averages in state.values()} == steps
        assert {int(averages["step"]) for name, averages in state.items() if "backbone" in name} == {min(steps)}
    lines = metrics(tmp_path / "run")
    norms = [line["grad_norm/backbone"] for line in lines]
    assert [line["backbone_lr"] for line in lines[:5]] == [0] * 5 and lines[-1]["backbone_lr"] == lines[-1]["lr"]
    assert norms[:4] == [0] * 4 and min(norms[4:]) > 0 and min(line["grad_norm/dino_head"] for line in lines) > 0


def test_a_run_goes_on_with_other_groups(tmp_path: Path) -> None:
    """Frozen or not decides which weights the optimizer holds together; a checkpoint of the other kind goes on."""
    nothing = yaml_of_nothing(tmp_path)
    for name, first, then in (("a", 0, 1), ("b", 1, 0)):
        assert main([nothing, *words(tmp_path / name, optim__epochs=1, optim__freeze_backbone_epochs=first)]) == 0
        assert main([nothing, *words(tmp_path / name, optim__epochs=2, optim__freeze_backbone_epochs=then)]) == 0
        assert len(metrics(tmp_path / name)) == 8 and metrics(tmp_path / name)[-1]["loss/total"] > 0


def test_learning_rates() -> None:
    from dinocomp.schedules import Schedules

    schedules = Schedules(100, 1.0, 0.0, 10, 0, 0.04, 0.4, 0.99, 1.0, 0.07, 0.04, 10, freeze_backbone=20)
    assert [schedules.at(i).backbone_lr for i in (0, 19, 20)] == [0, 0, 0]
    for i in (21, 25, 29):
        assert schedules.at(i).backbone_lr == pytest.approx(schedules.at(i).lr * (i - 20) / 10)
    assert all(schedules.at(i).backbone_lr == schedules.at(i).lr > 0 for i in (30, 31, 99))


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        ("ddp", False),
        *(
            pytest.param(strategy, kept, marks=pytest.mark.slow)
            for strategy in ("fsdp", "fsdp2")
            for kept in (False, True)
        ),
    ],
)
def test_on_two_processes(strategy: str, kept: bool, tmp_path: Path, free_port: int) -> None:
    """In two micro-batches each, frozen for 4 of 8 iterations, as one process with the whole batch."""
    nothing, changes = yaml_of_nothing(tmp_path), FROZEN | {"optim__epochs": 2}
    assert main([nothing, *words(tmp_path / "one", **changes)]) == 0
    changes |= {"train__batch_size_per_gpu": 4, "train__microbatch_size": 2, "parallelism__strategy": strategy}
    changes |= {"parallelism__reshard_after_forward": str(not kept).lower()}
    started = processes.start_ranks([nothing, *words(tmp_path / "two", **changes)], 2, free_port, shard_on_cpu)
    assert [processes.finish(rank) for rank in started] == [0, 0]
    ours, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert len(ours) == len(theirs) == 8
    for a, b in zip(ours, theirs, strict=True):
        for name in (name for name in a if name.startswith(("loss/", "grad_norm/", "teacher/"))):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-9), (a["iteration"], name)


@pytest.mark.slow
def test_a_sharded_run_stopped_while_it_is_frozen_goes_on(tmp_path: Path, free_port: int) -> None:
    nothing = yaml_of_nothing(tmp_path)
    changes = FROZEN | {"optim__epochs": 2, "train__batch_size_per_gpu": 4, "parallelism__strategy": "fsdp2"}

    def run(name: str, *before: object) -> list[int]:
        settings = [nothing, *words(tmp_path / name, **changes)]
        return [processes.finish(rank) for rank in processes.start_ranks(settings, 2, free_port, shard_on_cpu, *before)]

    assert run("whole") == [0, 0]
    assert run("parts", processes.signal_at_iteration, 2, SIGTERM) == [75, 75]
    assert run("parts") == [0, 0]
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        for name in (name for name in a if name.startswith(("loss/", "grad_norm/"))):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-9), (a["iteration"], name)


@pytest.mark.slow
def test_good_weights_stay_good(tmp_path: Path) -> None:
    """The quickstart, shortened, and `from_pretrained` on its teacher: accuracy never falls by more than a point."""
    settings = [
        *("evaluation.budget=1", "evaluation.pictures=false", "loggers.report=false", "train.num_workers=0"),
        "train.device=cpu",
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["quickstart", *settings, "optim.epochs=4", f"train.output_dir={first}"]) == 0
    go_on = ["recipes=[from_pretrained]", f"student.pretrained_weights={first / 'teacher.safetensors'}"]
    go_on += ["optim.epochs=2", "evaluation.eval_period_iterations=50", f"train.output_dir={second}"]
    assert main(["quickstart", *go_on, *settings]) == 0
    before, after = (read_evaluations(output / "evaluation.jsonl") for output in (first, second))
    assert before[200].score > 0.95, "they are good"
    assert after[0].score == pytest.approx(before[200].score, abs=1e-9)
    assert sorted(after) == [0, 50, 100] and min(found.score for found in after.values()) > after[0].score - 0.01
