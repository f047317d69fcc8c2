"""The benchmark of whole steps: what it counts, what it divides, what it leaves behind."""

import json
from pathlib import Path

import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent

from benchmarks import step
from benchmarks.cost import operations
from benchmarks.flops import count_flops
from benchmarks.kernels import Profile, summary
from benchmarks.phases import PHASES, Laps
from benchmarks.step import Settings, StopAfter, for_measuring, measure
from benchmarks.step_report import Steps, row, table, utilisation
from dinocomp.build.data import mask_settings
from dinocomp.config import derive, load_config
from dinocomp.data import max_masked_patches
from dinocomp.errors import ConfigError, TrainingError

from ..helpers import words, yaml_of_nothing

CHANGES = {
    "plain": {},
    "swiglu, two heads": {"student__ffn_layer": "swiglu", "ibot__separate_head": "true"},
    "nothing twice": {
        "train__microbatch_size": 2,
        "parallelism__activation_checkpointing": "full",
        "parallelism__activation_cpu_offload": "true",
    },
    "compiled": {"performance__compile": "true", "train__centering": "sinkhorn_knopp"},
    "one loss": {"ibot__loss_weight": 0, "dino__koleo_loss_weight": 0, "crops__local_crops_number": 0},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_operations_are_those_of_the_hand_count(changes: dict, tmp_path: Path) -> None:
    config = load_config(None, words(tmp_path, **changes)).config
    images, dim = config.train.batch_size_per_gpu, config.student.embed_dim
    said = operations(config, images, max_masked_patches(mask_settings(config), images, 1))
    neighbours = 2 * 2 * images**2 * dim if config.dino.koleo_loss_weight else 0  # of two views, without gradient
    counted = count_flops(config)
    assert counted.forward == said.student + said.teacher + neighbours
    assert counted.backward == said.backward
    assert counted.total == counted.forward + counted.backward


class Ticks:
    """A clock that is read every second."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        self.time += 1
        return self.time

    def seconds(self, start: float, end: float) -> float:
        return end - start


def test_phases_add_up_to_steps() -> None:
    laps = Laps(Ticks())
    one_pass = ["to_device", "forward", "loss", "backward"]
    for phase in ["data", "data", "prepare", *one_pass, *one_pass, "clip", "optimizer", "teacher", "rest"]:
        laps.lap(phase)
    for phase in ["data", "data", *list(PHASES)[1:], "data"]:
        laps.lap(phase)
    first, second = laps.steps()  # the third is not over
    assert first["data"] == 1, "the first call starts the clock"
    assert first["forward"] == first["backward"] == 2
    assert second == {name: 2.0 if name == "data" else 1.0 for name in PHASES}
    assert sum(first.values()) + sum(second.values()) == laps.clock.time - 2


def steps_of(*seconds: float, profile: Profile | None = None) -> Steps:
    """Steps that take so long, all of it forward and backward, after two that took 10 s and 4 s."""
    measured, warm_up = (
        [dict.fromkeys(PHASES, 0.0) | {"forward": each / 4, "backward": 3 * each / 4} for each in times]
        for times in (seconds, (10.0, 4.0))
    )
    memory = {"memory_bytes": 5 * 10**9, "reserved_bytes": 6 * 10**9}
    return Steps("bf16", 64, 32, warm_up, measured, **memory, bad_steps=0, profile=profile)


def test_rates_are_those_of_the_median_step() -> None:
    found = row(steps_of(2.0, 1.0, 4.0, 2.0, 2.0), flops=10**12, peak=2e12)
    assert found["images_per_second"] == 32 and found["seconds_per_step"] == 2
    assert 16 <= found["images_per_second_p10"] < 32 < found["images_per_second_p90"] <= 64
    assert found["seconds_per_step_mean"] == pytest.approx(sum(found["phases"].values())) == pytest.approx(2.2)
    assert found["phases"]["backward"] == pytest.approx(3 * found["phases"]["forward"])
    assert found["first_step_seconds"] == 10 and found["start_seconds"] == 10 + 4 - 2 * 2
    assert found["flops_per_second"] == 5e11
    assert found["mfu"] == utilisation(1e12, 2.0, 2e12) == 0.25
    assert found["step_seconds"] == [2.0, 1.0, 4.0, 2.0, 2.0]
    shown = table(found, gpu=True)
    assert "| images/s, median step | 32.0 |" in shown and "| MFU | 25.0% |" in shown
    assert "| peak memory | 5.00 GB |" in shown and "| reserved by the allocator | 6.00 GB |" in shown
    assert "1650.00 ms, 75.0% |" in shown


def test_no_mfu_without_a_peak_and_no_spread_of_one_step() -> None:
    found = row(steps_of(2.0, profile=Profile(10, 3, 0.5)), flops=10**12, peak=None)
    assert found["mfu"] is None
    assert found["images_per_second_p10"] == found["images_per_second_p90"] == 32
    shown = table(found, gpu=False)
    assert "give --peak-tflops" in shown and "| peak memory of the process |" in shown
    assert "| profiled step: kernels | 3 |" in shown and "| profiled step: busy_seconds | 0.5000 |" in shown


def test_a_gpu_is_busy_while_any_kernel_runs() -> None:
    def event(name: str, start: float, end: float, device: str = "CUDA", **more) -> FunctionEvent:
        return FunctionEvent(
            0, name, 0, start, end, device_type=getattr(torch.autograd.DeviceType, device), use_device="cuda", **more
        )

    events = [
        event("aten::mm", 0, 1, "CPU"),
        event("cudaLaunchKernel", 0, 1, "CPU"),
        event("Optimizer.step#AdamW.step", 0, 1000, is_user_annotation=True),
        event("gemm", 10, 20),
        event("copy", 15, 40),
        event("within", 20, 30),
        event("Memcpy HtoD", 50, 60),
    ]
    assert summary(events, gpu=True) == Profile(operators=1, kernels=3, busy_seconds=pytest.approx(40e-6))
    assert summary(events, gpu=False) == Profile(1, None, None)


def test_nothing_lies_between_measured_steps(tmp_path: Path) -> None:
    changes = {"evaluation__at_start": "true", "checkpoint__remote": "s3://bucket/run"}
    before = load_config(None, words(tmp_path / "old", **changes)).config
    config = for_measuring(before, tmp_path / "new")
    assert derive.checkpoint_interval(config) > derive.total_iterations(config)
    assert not config.evaluation.eval_period_iterations and not config.evaluation.at_start
    assert config.train.output_dir == str(tmp_path / "new") and not config.checkpoint.remote
    for section in ("student", "dino", "ibot", "optim", "crops", "performance", "parallelism"):
        assert getattr(config, section) == getattr(before, section)


def test_a_run_is_measured_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two passes a step; the images that it names do not exist, and nobody looks for them."""
    monkeypatch.chdir(tmp_path)
    keys = words(tmp_path / "run", train__dataset_path=tmp_path / "none", train__microbatch_size=4)
    files = ["--json", "found.json", "--profile", "profile.txt"]
    measuring = ["--iterations", "3", "--warm-up", "2", "--peak-tflops", "0.5"]
    assert step.main([yaml_of_nothing(tmp_path), *measuring, *keys, *files]) == 0
    shown = capsys.readouterr()
    assert "| images/s, median step |" in shown.out and "images/s data wait" not in shown.out
    assert "[1/12]" in shown.err, "the run's own lines"

    record = json.loads((tmp_path / "found.json").read_text())
    (found,) = record["rows"]
    assert found["device"] == "cpu" and record["environment"]["versions"]["torch"]
    assert found["run"].endswith("train.microbatch_size=4") and found["batches"] == "noise on the device"
    assert (found["precision"], found["images_per_step"], found["images_per_pass"]) == ("fp32", 8, 4)
    assert found["iterations"] == len(found["step_seconds"]) == 3 and found["warm_up"] == 2
    assert found["phases"].keys() == PHASES.keys() and all(seconds > 0 for seconds in found["phases"].values())
    assert sum(found["phases"].values()) == pytest.approx(sum(found["step_seconds"]) / 3)
    assert found["flops_per_step"] == count_flops(load_config(None, keys).config).total
    assert found["mfu"] == pytest.approx(found["flops_per_step"] / found["seconds_per_step"] / 0.5e12)
    assert found["memory_bytes"] > 10**8 and found["bad_steps"] == 0
    assert found["profile"]["operators"] > 1000 and found["profile"]["kernels"] is None
    assert "aten::mm" in (tmp_path / "profile.txt").read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_cache")
def test_real_images_go_through_the_runs_loader(tmp_path: Path) -> None:
    config = load_config(None, words(tmp_path)).config
    steps = measure(config, Settings(iterations=2, warm_up=1, real=True), tmp_path)
    assert len(steps.measured) == 2 and steps.images == steps.images_per_pass == 8
    assert not (tmp_path / "checkpoints").exists() or not any((tmp_path / "checkpoints").iterdir())


def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert step.main([yaml_of_nothing(tmp_path), *words(tmp_path), "--iterations", "30"]) == 2
    assert "the run has 12 iterations, too few to measure 40" in capsys.readouterr().err
    monkeypatch.setattr(step.dist, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="2 processes were started; a step is measured on one"):
        measure(load_config(None, words(tmp_path)).config, Settings(3, 2), tmp_path)


def test_a_measurement_that_was_stopped_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "StopAfter", lambda iterations: StopAfter(iterations - 1))
    with pytest.raises(TrainingError, match="stopped after 2 of 3 iterations"):
        measure(load_config(None, words(tmp_path)).config, Settings(2, 1), tmp_path / "run")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_time_is_read_from_its_stream(tmp_path: Path) -> None:
    changes = {"train__device": "gpu", "student__embed_dim": 48}
    config = load_config(None, words(tmp_path, **changes)).config
    steps = measure(config, Settings(3, 2, profile=tmp_path / "profile.txt"), tmp_path / "run")
    assert len(steps.measured) == 3 and all(sum(found.values()) > 0 for found in steps.measured)
    assert steps.profile.kernels > 100 and steps.profile.busy_seconds > 0
    assert 10**6 < steps.memory_bytes <= steps.reserved_bytes < 10**9
