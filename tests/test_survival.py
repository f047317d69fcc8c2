"""Runs that are killed, told to stop, or run out of disk: nothing is lost, and they end where they would have."""

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from dinocomp.checkpoints.folder import (
    STATE,
    begin,
    discard,
    find_fault,
    list_checkpoints,
    publish,
)
from dinocomp.checkpoints.manifest import MANIFEST, iteration_of
from dinocomp.checkpoints.plain import check_state, only_plain_types
from dinocomp.errors import WeightsError
from dinocomp.train import main

from . import processes
from .helpers import ROOT, metrics, small_folder, weights, words, yaml_of_nothing

TIMELESS = ("images_per_second", "seconds_per_iteration", "data_wait", "memory_gb")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Arguments of a run in a folder: 12 iterations of 8 of 40 images, so that it sees each 2.4 times."""
    folder = tmp_path_factory.mktemp("command")
    images, nothing = small_folder(folder / "images"), yaml_of_nothing(folder)

    def arguments(output: Path, **changes: object) -> list[str]:
        fixed = {"train__dataset_path": images, "data__cache_dir": folder / "cache", "checkpoint__max_to_keep": 2}
        return [nothing, *words(output, **fixed | changes)]

    return arguments


@pytest.fixture(scope="module")
def uninterrupted(command: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert processes.finish(processes.start(command(output))) == 0
    return output


def assert_same(first: Path, second: Path) -> None:
    """Bit for bit: weights, optimizer, centres, random states and metrics."""
    tensors, others = weights(first, 12), weights(second, 12)
    assert tensors.keys() == others.keys() and len(tensors) > 50
    assert not [name for name in tensors if not torch.equal(tensors[name], others[name])]
    lines, other_lines = (
        [{name: value for name, value in line.items() if name not in TIMELESS} for line in metrics(output)]
        for output in (first, second)
    )
    assert lines == other_lines and [line["iteration"] for line in lines] == list(range(1, 13))


def whole_ones(output: Path) -> list[int]:
    return [iteration_of(path) for path in list_checkpoints(output / "checkpoints") if not find_fault(path)]


@pytest.mark.slow
def test_killed_before_each_file_operation_of_saving(command: Callable, uninterrupted: Path, tmp_path: Path) -> None:
    """One run, killed and started again and again: at operation 1, 2, 3, … below checkpoints/ after its start."""
    output = tmp_path / "run"
    kills, had = 0, 0
    for operation in range(1, 200):
        process = processes.start(command(output), processes.kill_at_file_operation, operation, "run/checkpoints")
        code = processes.finish(process)
        found = whole_ones(output) if (output / "checkpoints").exists() else []
        assert len(found) == len(list_checkpoints(output / "checkpoints")), "all that is listed is whole"
        assert max(found, default=0) >= had, "what was there once is not lost"
        had = max(found, default=0)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 10 and had == 12
    assert_same(uninterrupted, output)
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"iteration-00000008", "iteration-00000012"}


@pytest.mark.parametrize(
    ("workers", "centering"),
    [
        (0, "centering"),
        pytest.param(2, "sinkhorn_knopp", marks=pytest.mark.slow),
        pytest.param(0, "sinkhorn_knopp", marks=pytest.mark.slow),
        pytest.param(2, "centering", marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(command: Callable, tmp_path: Path, workers: int, centering: str) -> None:
    """Ten kills of one run, anywhere between its start and its end."""
    changes = {"train__num_workers": workers, "train__centering": centering}
    assert processes.finish(processes.start(command(tmp_path / "whole", **changes))) == 0
    moments = random.Random(f"{workers} {centering}")
    arguments = command(tmp_path / "killed", **changes, checkpoint__save_frequency=1, train__OFFICIAL_EPOCH_LENGTH=4)
    seconds, kills = 4.0, 0
    while kills < 10:
        began = time.monotonic()
        process = processes.start(arguments)
        process.join(moments.uniform(0.3, seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # it ran to its end: the next one starts from an earlier checkpoint, and is killed sooner
            assert process.exitcode == 0
            seconds = 0.8 * (time.monotonic() - began)
            for newest in list_checkpoints(tmp_path / "killed" / "checkpoints")[-1:]:
                discard(newest)
    assert processes.finish(processes.start(arguments)) == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_killed_run_leaves_no_workers(command: Callable, tmp_path: Path) -> None:
    """Here they are made by a fork server, which would live as long as they do, and they as long as it."""
    arguments = command(tmp_path / "run", train__num_workers=2)
    process = processes.start(arguments, processes.pause_at_iteration, 2, tmp_path / "never")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 3, "a fork server and two workers"
    process.kill()
    process.join()
    assert not psutil.wait_procs(below, timeout=20)[1]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGINT, signal.SIGUSR1))],
)
def test_told_to_stop(command: Callable, uninterrupted: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The step is finished and saved, between two of the regular checkpoints; the exit code says so."""
    output = tmp_path / "run"
    process = processes.start(command(output), processes.signal_at_iteration, 6, number)
    assert processes.finish(process) == 75
    assert whole_ones(output) == [4, 6] and len(metrics(output)) == 6
    said = (output / "train.log").read_text()
    assert "stopped at iteration 6 of 12; the same command goes on" in said
    assert processes.finish(processes.start(command(output))) == 0
    assert_same(uninterrupted, output)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_whole_job_is_told_to_stop(command: Callable, tmp_path: Path, number: signal.Signals) -> None:
    """Through the launcher, as by Ctrl-C or a scheduler: launcher, two ranks and their workers all get the signal."""
    output = tmp_path / "run"
    settings = command(output, train__num_workers=2, train__batch_size_per_gpu=4, optim__epochs=2000)
    launcher = Path(sys.executable).with_name("composer")
    job = subprocess.Popen(
        [launcher, "-n", "2", "dinocomp/train.py", *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (output / "metrics.jsonl").exists():
        assert job.poll() is None
        time.sleep(0.1)
    os.killpg(job.pid, number)
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 75 and "the same command goes on" in said
    (checkpoint,) = list_checkpoints(output / "checkpoints")
    assert find_fault(checkpoint) == "" and iteration_of(checkpoint) == len(metrics(output))


@pytest.mark.slow
def test_told_to_stop_twice(command: Callable, uninterrupted: Path, tmp_path: Path) -> None:
    """The second signal leaves at once, also in the middle of saving, and what is there is whole."""
    output = tmp_path / "run"
    process = processes.start(command(output), processes.hang_while_saving)
    while not list(output.glob("checkpoints/.partial-*")):
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)  # of the same request: a scheduler and the launcher both pass it on
    process.join(3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    assert processes.finish(process, timeout=5) == 128 + signal.SIGTERM
    assert list_checkpoints(output / "checkpoints") == []
    assert processes.finish(processes.start(command(output))) == 0
    assert_same(uninterrupted, output)
    assert not list(output.glob("checkpoints/.*"))


def test_a_disk_that_is_full(command: Callable, uninterrupted: Path, tmp_path: Path) -> None:
    """By policy an end or a warning; the last good checkpoint stays, and there is nothing half-written."""
    output = tmp_path / "run"
    assert processes.finish(processes.start(command(output), processes.limit_file_size_from, 6, 100_000)) == 3
    assert whole_ones(output) == [4] and not list(output.glob("checkpoints/.*"))
    assert "the checkpoint of iteration 8 could not be written" in (output / "train.log").read_text()
    assert processes.finish(processes.start(command(output))) == 0
    assert_same(uninterrupted, output)

    output = tmp_path / "patient"
    arguments = command(output, checkpoint__on_save_failure="warn")
    assert processes.finish(processes.start(arguments, processes.limit_file_size_from, 6, 100_000)) == 3
    said = (output / "train.log").read_text()
    assert "training goes on, and the next is due at iteration 12" in said
    assert "the checkpoint of iteration 12 could not be written" in said, "the last one is insisted on"
    assert len(metrics(output)) == 12 and whole_ones(output) == [4]


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no manifest"])
def test_a_damaged_newest_checkpoint(command: Callable, uninterrupted: Path, tmp_path: Path, damage: str) -> None:
    """The newest whole one is gone on from; the damaged one is no longer counted."""
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    newest = output / "checkpoints" / "iteration-00000012"
    content = (newest / STATE).read_bytes()
    if damage == "cut":
        (newest / STATE).write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        (newest / STATE).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        (newest / (STATE if damage == "missing" else MANIFEST)).unlink()
    assert processes.finish(processes.start(command(output))) == 0
    said = (output / "train.log").read_text()
    assert "iteration-00000012 is passed over: " in said and "now set-aside-1-iteration-00000012" in said
    assert whole_ones(output) == [8, 12]
    assert_same(uninterrupted, output)


def test_no_whole_checkpoint_is_no_silent_start_from_scratch(
    uninterrupted: Path, command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    for path in list_checkpoints(output / "checkpoints"):
        (path / STATE).write_bytes(b"")
    assert main(command(output)) == 2
    said = capsys.readouterr().err
    assert "no checkpoint is whole" in said and "has 0 bytes, its manifest says" in said and "train.output_dir" in said


class _Code:
    """What a tampered file may hold: it runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_tampered_checkpoint_runs_nothing(
    uninterrupted: Path, command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Not as a checkpoint to go on from, with hashes that fit; not as weights; not by Composer's own loading."""
    output, trace = tmp_path / "run", tmp_path / "it ran"
    shutil.copytree(uninterrupted, output)
    newest = list_checkpoints(output / "checkpoints")[-1]
    partial = begin(output / "checkpoints", 16)
    content = torch.load(newest / STATE, weights_only=False)
    torch.save(content | {"extra": _Code(trace)}, partial / STATE)
    tampered = publish(partial)
    assert find_fault(tampered) == ""
    assert main(command(output)) == 2
    assert "could run code when it is loaded" in capsys.readouterr().err
    assert main(command(tmp_path / "other", MODEL__WEIGHTS=tampered)) == 2
    with only_plain_types(), pytest.raises(pickle.UnpicklingError):
        torch.load(tampered / STATE, weights_only=False)

    content["state"]["algorithms"] = [("__import__('pathlib').Path('it ran').touch()", {})]
    torch.save(content, tampered / STATE)
    with pytest.raises(WeightsError, match="not loaded"):
        check_state(tampered / STATE)
    assert not trace.exists()
    torch.load(tampered / STATE, weights_only=False)  # that the trap works
    torch.save({"extra": _Code(trace)}, tmp_path / "trap.pt")
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert trace.exists()


def test_a_run_that_went_on_meanwhile(command: Callable, uninterrupted: Path, tmp_path: Path) -> None:
    """Between its look for a checkpoint and its lock, another run saved a newer one: nothing of it is touched."""
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    newest = output / "checkpoints" / "iteration-00000012"
    newest.rename(tmp_path / "later")
    process = processes.start(command(output), processes.rename_before_lock, tmp_path / "later", newest)
    assert processes.finish(process) == 2
    assert whole_ones(output) == [8, 12]


@pytest.mark.parametrize("iteration", [3, 5])
def test_a_disk_without_room_for_a_folder(command: Callable, tmp_path: Path, free_port: int, iteration: int) -> None:
    """Both ranks end, and say why."""
    arguments = command(tmp_path / "run", train__batch_size_per_gpu=4, checkpoint__max_to_keep=0)
    ranks = processes.start_ranks(arguments, 2, free_port, processes.refuse_folders_from, iteration)
    assert [processes.finish(rank, timeout=60) for rank in ranks] == [3, 3]
    assert whole_ones(tmp_path / "run") == ([] if iteration == 3 else [4])
    assert "No space left on device" in (tmp_path / "run" / "train.log").read_text()


def test_a_full_disk_while_evaluating(command: Callable, tmp_path: Path) -> None:
    """The copy of the teacher is not worth the run."""
    arguments = command(tmp_path / "run", evaluation__eval_period_iterations=6, checkpoint__on_save_failure="warn")
    assert processes.finish(processes.start(arguments, processes.limit_file_size_from, 5, 60_000)) == 3
    said = (tmp_path / "run" / "train.log").read_text()
    assert "iteration-00000006/teacher.safetensors cannot be written" in said and len(metrics(tmp_path / "run")) == 12


def test_stopped_while_images_are_converted(command: Callable, tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", data__cache_dir=tmp_path / "cache")
    stop = (processes.kill_at_file_operation, 3, f"{tmp_path}/cache", signal.SIGTERM)
    assert processes.finish(processes.start(arguments, *stop)) == 128 + signal.SIGTERM
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    assert processes.finish(processes.start(arguments)) == 0


def test_two_runs_in_one_folder(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "run"
    process = processes.start(command(output), processes.hang_while_saving)
    while not list(output.glob("checkpoints/.partial-*")):
        assert process.is_alive()
        time.sleep(0.05)
    try:
        assert main(command(output)) == 2
        assert "another run is at work in" in capsys.readouterr().err
    finally:
        process.kill()
        process.join()
    assert main(command(output, optim__epochs=1)) == 0, "the lock went with the process"
