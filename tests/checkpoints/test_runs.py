"""Whole runs whose checkpoints are copied to an object store."""

import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from dinocomp import cli
from dinocomp.checkpoints.folder import find_fault, list_checkpoints
from dinocomp.train import main
from tests import processes
from tests.checkpoints.conftest import Bucket
from tests.checkpoints.proxy import Proxy
from tests.helpers import metrics, small_folder, weights, words, yaml_of_nothing
from tests.sharding import shard_on_cpu


@pytest.fixture
def command(bucket: Bucket, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a run of 12 iterations with a checkpoint at each 4th, copied to the bucket."""
    images, nothing = small_folder(tmp_path / "images"), yaml_of_nothing(tmp_path)

    def arguments(output: Path, **changes: object) -> list[str]:
        fixed = {"train__dataset_path": images, "data__cache_dir": tmp_path / "cache"}
        fixed |= {"checkpoint__remote": bucket.address}
        return [nothing, *words(output, **fixed | changes)]

    return arguments


def there(bucket: Bucket) -> set[str]:
    """Names of the checkpoints that are whole in the bucket."""
    return {name.split("/")[-2] for name in bucket.names() if name.endswith("/manifest.json")}


def test_another_machine_keeps_what_auto_was_when_the_run_began(
    command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = {"optim__warmup_epochs": "auto", "checkpoint__save_frequency": 3}
    assert main(command(tmp_path / "here", **auto)) == 0
    shutil.rmtree(tmp_path / "here")
    assert main(command(tmp_path / "other", **auto, optim__epochs=21)) == 0
    text = (tmp_path / "other" / "config.yaml").read_text()
    assert yaml.safe_load(text)["optim"]["warmup_epochs"] == 1, "a new run of 21 epochs would have 3"
    assert "# auto: optim.warmup_epochs=1: a tenth of the run's 3 official epochs" in text, "with the reason of then"
    for folder, planned in (
        ("other", "1 +a tenth of the run's 3 official epochs"),
        ("new", "3 +a tenth of the run's 30"),
    ):
        assert cli.main(["plan", *command(tmp_path / folder, **auto, optim__epochs=30)]) == 0
        assert re.search(f"optim.warmup_epochs +{planned}", capsys.readouterr().out)


@pytest.mark.slow
def test_a_machine_that_has_nothing_but_the_remote(command: Callable, bucket: Bucket, tmp_path: Path) -> None:
    """Stopped on one machine, gone on with on another: bit for bit what one machine would have done."""
    assert processes.finish(processes.start(command(tmp_path / "whole", checkpoint__remote="''"))) == 0
    stop = (processes.signal_at_iteration, 10, signal.SIGTERM)
    assert processes.finish(processes.start(command(tmp_path / "here"), *stop)) == 75
    assert there(bucket) == {"iteration-00000004", "iteration-00000008", "iteration-00000010"}
    shutil.rmtree(tmp_path / "here")
    assert processes.finish(processes.start(command(tmp_path / "other", checkpoint__max_to_keep=1))) == 0
    whole, other = weights(tmp_path / "whole", 12), weights(tmp_path / "other", 12)
    assert not [name for name in whole if not torch.equal(whole[name], other[name])]
    assert [line["iteration"] for line in metrics(tmp_path / "other")] == list(range(1, 13))
    assert there(bucket) == {"iteration-00000012"}, "pruned there as here, whoever wrote them"
    assert bucket.get("runs/a/metrics.jsonl") == (tmp_path / "other" / "metrics.jsonl").read_bytes()
    said = (tmp_path / "other" / "train.log").read_text()
    assert said.count("training: 12 iterations") == 2 and "checkpoint.max_to_keep was 3, is 1 (safe" in said
    assert "copied: " in said


@pytest.mark.slow
def test_shares_are_copied_and_come_back(command: Callable, bucket: Bucket, tmp_path: Path, free_port: int) -> None:
    """A sharded run, stopped on one machine, goes on with another that has nothing."""
    sharded = {"train__batch_size_per_gpu": 4, "parallelism__strategy": "fsdp2"}
    stop = (processes.signal_at_iteration, 6, signal.SIGTERM)
    ranks = processes.start_ranks(command(tmp_path / "here", **sharded), 2, free_port, shard_on_cpu, *stop)
    assert [processes.finish(rank) for rank in ranks] == [75, 75]
    folder = "runs/a/checkpoints/iteration-00000006"
    expected = {"manifest.json", "teacher.safetensors", ".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert {name.rpartition("/")[2] for name in bucket.names() if name.startswith(folder)} == expected
    before = metrics(tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    ranks = processes.start_ranks(command(tmp_path / "other", **sharded), 2, free_port, shard_on_cpu)
    assert [processes.finish(rank) for rank in ranks] == [0, 0]
    assert metrics(tmp_path / "other")[:6] == before and len(metrics(tmp_path / "other")) == 12
    assert find_fault(list_checkpoints(tmp_path / "other" / "checkpoints")[-1]) == ""


def test_an_outage_in_the_middle(command: Callable, bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
    """Training does not wait for it, and afterwards nothing is missing."""
    process = processes.start(command(tmp_path / "run"), processes.pause_at_iteration, 6, tmp_path / "go on")
    while not list_checkpoints(tmp_path / "run" / "checkpoints"):
        assert process.is_alive()
        time.sleep(0.05)
    proxy.down()
    (tmp_path / "go on").touch()
    while len(metrics(tmp_path / "run")) < 12:
        assert process.is_alive()
        time.sleep(0.05)
    assert process.is_alive() and "iteration-00000012" not in there(bucket)
    proxy.up()
    assert processes.finish(process) == 0
    assert there(bucket) == {"iteration-00000004", "iteration-00000008", "iteration-00000012"}


def test_what_is_missing_at_the_end_is_said(command: Callable, bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", checkpoint__remote_wait_seconds=1)
    process = processes.start(arguments, processes.pause_at_iteration, 2, tmp_path / "go on")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.05)
    proxy.down()
    (tmp_path / "go on").touch()
    assert processes.finish(process) == 3
    assert there(bucket) == set()
    said = (tmp_path / "run" / "train.log").read_text()
    assert "not all of it was copied to" in said and "iteration-00000012: " in said
    proxy.up()
    patient = [*arguments, "checkpoint.remote_wait_seconds=60"]  # a busy machine may need more than a second
    assert processes.finish(processes.start(patient)) == 0, "the same command copies the rest"
    assert there(bucket) == {"iteration-00000004", "iteration-00000008", "iteration-00000012"}


@pytest.mark.slow
def test_damage_here_and_there(command: Callable, bucket: Bucket, tmp_path: Path) -> None:
    """A whole copy takes the place of a damaged local one; a damaged copy is passed over."""
    assert processes.finish(processes.start(command(tmp_path / "run", optim__epochs=2))) == 0
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (newest / "checkpoint.pt").write_bytes(b"cut")
    assert processes.finish(processes.start(command(tmp_path / "run", optim__epochs=2))) == 0
    assert find_fault(newest) == "" and newest.with_name("set-aside-1-iteration-00000008").exists()
    bucket.put("runs/a/checkpoints/iteration-00000008/checkpoint.pt", b"cut")
    assert processes.finish(processes.start(command(tmp_path / "other"))) == 0
    said = (tmp_path / "other" / "train.log").read_text()
    assert "iteration 8 in" in said and "is passed over" in said
    assert "resuming from" in said and "iteration-00000004" in said


def test_wrong_credentials_stop_before_anything(
    command: Callable, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert processes.finish(processes.start(command(tmp_path / "run"))) == 2
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
