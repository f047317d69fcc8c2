"""Copies in the background: through outages, kills, refusals, and without disturbing the training."""

import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from dinocomp.checkpoints.remote import RemoteFolder
from dinocomp.checkpoints.uploads import Uploads
from tests.checkpoints.conftest import Bucket, halves
from tests.checkpoints.proxy import Proxy
from tests.helpers import until

ROOT = Path(__file__).parents[2]


def newest_two(iterations: Sequence[int]) -> list[int]:
    """Retention of the tests: the newest two, and every 100th for ever."""
    return [iteration for iteration in sorted(iterations)[:-2] if iteration % 100]


def nothing(iterations: Sequence[int]) -> list[int]:
    return []


@pytest.fixture(autouse=True)
def messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dinocomp")


@pytest.fixture
def remote(bucket: Bucket) -> RemoteFolder:
    return RemoteFolder(bucket.address, answer_seconds=5, retry_seconds=0.01)


@pytest.fixture
def start(remote: RemoteFolder, proxy: Proxy) -> Iterator[Callable[..., Uploads]]:
    """Starts Uploads with short waits; they end with the test."""
    started = []

    def start(**options) -> Uploads:
        options = {"expired": nothing, "first_wait": 0.05, "longest_wait": 0.2} | options
        started.append(Uploads(remote, **options))
        return started[-1]

    yield start
    for uploads in started:
        uploads.finish(0)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_copies_all_and_the_runs_files(start, remote: RemoteFolder, bucket: Bucket, write, tmp_path: Path, caplog):
    log, config = tmp_path / "train.log", tmp_path / "config.yaml"
    log.write_text("one\n")
    uploads = start(run_files=[log, config, tmp_path / "evaluation.jsonl"])
    uploads.add(write(4))
    uploads.add(write(8))
    until(lambda: not uploads.pending)
    assert remote.list_whole() == [4, 8]
    assert bucket.get("runs/a/train.log") == b"one\n"
    log.write_text("one\ntwo\n")  # after the last checkpoint
    config.write_text("train:\n")
    assert uploads.finish(20) == []
    assert bucket.get("runs/a/train.log") == b"one\ntwo\n"
    assert bucket.get("runs/a/config.yaml") == b"train:\n"
    assert "runs/a/evaluation.jsonl" not in bucket.names()
    assert uploads.finish(20) == []
    assert warnings(caplog) == []


def test_finish_with_nothing_to_do(start):
    assert start().finish(5) == []


class TestOutage:
    @pytest.mark.parametrize("kind", ["refused connections", "500", "hang-ups"])
    def test_is_told_once_and_nothing_is_lost(self, start, remote, proxy: Proxy, write, caplog, kind: str):
        uploads = start()
        uploads.add(write(4))
        until(lambda: not uploads.pending)
        if kind == "refused connections":
            proxy.down()
        elif kind == "500":
            fault = proxy.inject(answer=(500, "InternalError"), times=float("inf"))
        else:
            fault = proxy.inject(cut_request=0, times=float("inf"))
        begin = time.monotonic()
        for iteration in (8, 12, 16):
            uploads.add(write(iteration))
        assert time.monotonic() - begin < 0.5  # training does not wait
        until(lambda: uploads._failures >= 3)
        assert len(uploads.pending) == 3
        assert len(warnings(caplog)) == 1
        assert "Training goes on" in warnings(caplog)[0]
        if kind == "refused connections":
            proxy.up()
        else:
            fault.times = 0
        until(lambda: not uploads.pending)
        assert remote.list_whole() == [4, 8, 12, 16]
        assert len(warnings(caplog)) == 1
        assert caplog.text.count("work again") == 1
        assert uploads.finish(20) == []

    def test_during_finish(self, start, remote, proxy: Proxy, write):
        proxy.down()
        uploads = start(first_wait=30, longest_wait=60)  # finish does not wait for the next try
        uploads.add(write(4))
        until(lambda: uploads._failures == 1)
        proxy.up()
        assert uploads.finish(20) == []
        assert remote.list_whole() == [4]

    def test_longer_than_finish_names_what_is_missing(self, start, remote, proxy: Proxy, write, tmp_path: Path):
        log = tmp_path / "train.log"
        log.write_text("one\n")
        uploads = start(run_files=[log])
        uploads.add(write(4))
        until(lambda: not uploads.pending)
        proxy.down()
        uploads.add(write(8))
        uploads.add(write(12))
        begin = time.monotonic()
        missing = uploads.finish(1)
        assert time.monotonic() - begin < 3
        proxy.up()
        assert [line.partition(":")[0] for line in missing] == ["iteration-00000008", "iteration-00000012", "train.log"]
        assert all("Could not connect" in line for line in missing)
        time.sleep(1)
        assert 12 not in remote.list_whole()  # nothing more is begun

    def test_waits_grow_to_the_longest(self, start, proxy: Proxy, write):
        uploads = start(first_wait=1, longest_wait=60)
        waits = []
        for uploads._failures in range(1, 2000, 3):
            waits.append(uploads._pause())
        assert 0.5 <= waits[0] <= 1
        assert 4 <= waits[1] <= 8
        assert all(30 <= wait <= 60 for wait in waits[3:])
        assert len(set(waits[3:])) > 100

    def test_refusal_tells_what_to_mend(self, start, remote, proxy: Proxy, write, caplog):
        uploads = start()
        proxy.down()
        uploads.add(write(4))
        until(lambda: uploads._failures >= 2)
        fault = proxy.inject(answer=(403, "ExpiredToken"), times=float("inf"))
        proxy.up()
        until(lambda: len(warnings(caplog)) == 2)
        until(lambda: uploads._failures >= 6)
        first, second = warnings(caplog)
        assert "Could not connect" in first
        assert "will not pass by itself: check AWS_ACCESS_KEY_ID" in second
        fault.times = 0  # its owner has mended it
        until(lambda: not uploads.pending)
        assert remote.list_whole() == [4]


class TestWithdraw:
    def test_queued(self, start, remote, proxy: Proxy, write):
        proxy.down()
        uploads = start()
        first, second = write(4), write(8)
        uploads.add(first)
        uploads.add(second)
        until(lambda: uploads._failures >= 1 and uploads._busy is None)
        assert uploads.withdraw(first)
        assert uploads.pending == ["iteration-00000008"]
        proxy.up()
        assert uploads.finish(20) == []
        assert remote.list_whole() == [8]

    def test_in_flight(self, start, remote, proxy: Proxy, write):
        held = threading.Event()
        proxy.inject("PUT", "checkpoint.pt", hold=held)
        uploads = start()
        folder = write(4)
        uploads.add(folder)
        until(lambda: any(method == "PUT" for method, _ in proxy.requests))
        assert not uploads.withdraw(folder)
        held.set()
        until(lambda: not uploads.pending)
        assert uploads.withdraw(folder)
        assert remote.list_whole() == [4]

    def test_not_queued(self, start, write):
        assert start().withdraw(write(4))


class TestDamaged:
    def test_is_reported_and_the_others_go_on(self, start, remote, write, caplog):
        folder = write(4)
        (folder / "checkpoint.pt").write_bytes(b"cut")
        uploads = start()
        uploads.add(folder)
        uploads.add(write(8))
        (line,) = uploads.finish(20)
        assert line.startswith("iteration-00000004: ")
        assert "checkpoint.pt has 3 bytes" in line
        assert remote.list_whole() == [8]
        assert len(warnings(caplog)) == 1

    def test_gone(self, start, remote, tmp_path: Path):
        uploads = start()
        uploads.add(tmp_path / "iteration-00000004")
        (line,) = uploads.finish(20)
        assert "No such file" in line


class TestPrune:
    def test_after_each_copy_and_across_restarts(self, start, remote, bucket: Bucket, write):
        for iteration in (97, 98, 99, 100):  # of a process that pruned nothing
            remote.upload(write(iteration))
        bucket.put("runs/a/checkpoints/iteration-00000050/checkpoint.pt", b"half of one, of a process that was killed")
        uploads = start(expired=newest_two)
        uploads.add(write(101))
        assert uploads.finish(20) == []
        assert remote.list_whole() == [100, 101]
        assert halves(remote) == []
        again = start(expired=newest_two)
        for iteration in (102, 103):
            again.add(write(iteration))
        assert again.finish(20) == []
        assert remote.list_whole() == [100, 102, 103]

    def test_parts_that_a_killed_process_left(self, start, remote, bucket: Bucket, write):
        for name in ("runs/a/checkpoints/iteration-00000004/checkpoint.pt", "runs/b/checkpoint.pt"):
            bucket.client.create_multipart_upload(Bucket=bucket.name, Key=name)
        uploads = start()
        uploads.add(write(8))
        assert uploads.finish(20) == []
        left = bucket.client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]
        assert [upload["Key"] for upload in left] == ["runs/b/checkpoint.pt"]

    def test_newer_ones_of_another_past_neither_count_nor_go(self, start, remote, write):
        for iteration in (901, 902, 903):
            remote.upload(write(iteration))
        uploads = start(expired=newest_two)
        for iteration in (4, 8, 12):
            uploads.add(write(iteration))
        assert uploads.finish(20) == []
        assert remote.list_whole() == [8, 12, 901, 902, 903]

    def test_failure_is_told_once_and_made_up_for(self, start, remote, proxy: Proxy, write, caplog):
        fault = proxy.inject("DELETE", "iteration-00000004/checkpoint.pt", answer=(500, "InternalError"), times=1e9)
        uploads = start(expired=newest_two)
        for iteration in (4, 8, 12, 16):
            uploads.add(write(iteration))
        until(lambda: not uploads.pending)
        until(lambda: warnings(caplog) != [])
        assert remote.list_whole() == [12, 16] or remote.list_whole() == [8, 12, 16]
        fault.times = 0
        uploads.add(write(20))
        assert uploads.finish(20) == []
        assert remote.list_whole() == [16, 20]
        assert halves(remote) == []
        assert len(warnings(caplog)) == 1
        assert "old checkpoints" in warnings(caplog)[0]

    def test_store_that_cannot(self, start, remote, write, caplog):
        remote.prunes = False
        uploads = start(expired=newest_two)
        for iteration in (4, 8, 12):
            uploads.add(write(iteration))
        assert uploads.finish(20) == []
        assert remote.list_whole() == [4, 8, 12]
        assert warnings(caplog) == []


def _copy_until_killed(address: str, folder: Path) -> None:
    uploads = Uploads(RemoteFolder(address), expired=nothing)
    uploads.add(folder)
    uploads.finish(600)


class TestKilled:
    @pytest.mark.parametrize("moment", ["checkpoint.pt", "teacher.safetensors", "manifest.json"])
    def test_leaves_nothing_half_seen_and_the_next_start_completes_it(
        self, start, remote: RemoteFolder, proxy: Proxy, write, moment: str
    ):
        folders = [write(4), write(8), write(12)]
        remote.upload(folders[0])
        held = threading.Event()
        proxy.inject("PUT", f"iteration-00000008/{moment}", hold=held)
        process = multiprocessing.get_context("fork").Process(
            target=_copy_until_killed, args=(remote.address, folders[1]), daemon=True
        )
        process.start()
        until(lambda: any(method == "PUT" and f"8/{moment}" in path for method, path in proxy.requests))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert remote.list_whole() == [4]
        uploads = start()
        uploads.add_missing(folders)
        assert uploads.finish(20) == []
        held.set()
        assert remote.list_whole() == [4, 8, 12]
        sent = [path for method, path in proxy.requests if method == "PUT" and "iteration-00000004" in path]
        assert len(sent) == 3  # the one that was there was not sent again


class TestAside:
    def test_random_state_of_the_training_is_left_alone(self, start, remote, proxy: Proxy, write):
        remote.check()
        remote.upload(write(4))
        state, torch_state = random.getstate(), torch.get_rng_state()
        uploads = start()
        fault = proxy.inject("PUT", answer=(500, "InternalError"), times=float("inf"))
        for iteration in (4, 8, 12):
            uploads.add(write(iteration))
        until(lambda: uploads._failures >= 2)
        fault.times = 0
        assert uploads.finish(20) == []
        assert random.getstate() == state
        assert torch.equal(torch.get_rng_state(), torch_state)

    def test_data_workers_may_be_forked_at_any_time(self, start, remote, proxy: Proxy, write):
        remote.check()
        proxy.inject("HEAD", answer=(500, "InternalError"), times=3)
        proxy.inject("PUT", delay=0.1, times=float("inf"))
        uploads = start()
        for iteration in range(1, 15):
            uploads.add(write(iteration))
        for _ in range(6):
            loader = DataLoader(range(16), batch_size=4, num_workers=2, timeout=20)
            assert sum(int(batch.sum()) for batch in loader) == 120
        assert uploads.pending  # they were forked while it was at work
        assert uploads.finish(60) == []
        assert remote.list_whole() == list(range(1, 15))

    @pytest.mark.slow
    def test_nothing_on_the_terminal_but_our_words(self, proxy: Proxy, bucket: Bucket, write, tmp_path: Path):
        """And a process that ends in the middle of a copy ends."""
        held = threading.Event()
        proxy.inject("PUT", "checkpoint.pt", answer=(500, "InternalError"), times=2)
        proxy.inject("PUT", "checkpoint.pt", hold=held, times=9)
        script = f"""
import time, sys
from pathlib import Path
from dinocomp.checkpoints.remote import RemoteFolder
from dinocomp.checkpoints.uploads import Uploads
remote = RemoteFolder({bucket.address!r})
remote.check()
uploads = Uploads(remote, expired=lambda iterations: [], first_wait=0.1)
uploads.add(Path({str(write(4))!r}))
while uploads._failures < 1:
    time.sleep(0.01)
time.sleep(1)
print("in the middle of", uploads.pending, round(time.time(), 2))
"""
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        held.set()
        words = done.stdout.split()
        assert done.returncode == 0, done.stderr
        assert "in the middle of ['iteration-00000004']" in done.stdout
        assert time.time() - float(words[-1]) < 5
        lines = done.stderr.splitlines()  # warnings of a logger without handlers
        assert len(lines) == 1, lines
        assert lines[0].startswith("checkpoints cannot be copied to s3://")
