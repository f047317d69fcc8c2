"""Shards in an object store, and what such stores do."""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dinocomp.data import decode_rgb
from dinocomp.data.convert import convert
from dinocomp.data.shards import Survey, count_images, evaluation_pair, open_images, survey_images
from dinocomp.errors import DataError

from ..helpers import launch, until, words, yaml_of_nothing
from ..store import Store
from .conftest import NAMES, image_bytes, keys, process, samples, train_on

ADDRESS = "s3://bucket/data"
WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture
def remote(store: Store, shards: Path) -> Path:
    """The folder in the store that holds the shards of ADDRESS: train/ and val/."""
    return Path(shutil.copytree(shards, store.folder / "bucket" / "data"))


@pytest.fixture
def many(store: Store) -> Path:
    """The same for 100 images in 20 shards."""
    from streaming import MDSWriter

    folder = store.folder / "bucket" / "data"
    with MDSWriter(out=str(folder), columns={"image": "bytes"}, hashes=["xxh64"], size_limit=6000) as writer:
        for number in range(100):
            writer.write({"image": image_bytes(number).ljust(1000, b"\0")})
    assert len(list(folder.glob("*.mds"))) == 20
    return folder


def first_shard(folder: Path) -> Path:
    return folder / json.loads((folder / "index.json").read_text())["shards"][0]["raw_data"]["basename"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)


def shared_memory() -> set[str]:
    """What lies in shared memory, but for scikit-learn's semaphores, which other tests' processes have to their end."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.loky")}


def later(seconds: float, action: Callable[[], None]) -> None:
    threading.Timer(seconds, action).start()


def test_remote(store: Store, remote: Path, cache: str) -> None:
    assert count_images(ADDRESS, cache) is None
    assert survey_images(ADDRESS, fetch=False, cache_dir=cache) == Survey(None, None)
    images = open_images(ADDRESS, cache_dir=cache)
    assert images.remote and len(images) == 10 == count_images(ADDRESS, cache)
    assert survey_images(ADDRESS, fetch=False, cache_dir=cache) == Survey(10, None)
    assert images.labelled and [entry.id for entry in images.classes] == ["n1", "n2"]
    assert not store.fetched()  # nothing is fetched before it is needed
    survey = survey_images(ADDRESS, cache_dir=cache)
    assert survey.images == 10 and survey.side
    assert keys(images) == sorted(NAMES) and decode_rgb(images[0].image).shape == (3, 16, 20)
    assert [len(part) for part in evaluation_pair(ADDRESS, cache_dir=cache)] == [10, 2]
    assert keys(open_images(f"{ADDRESS}/val", cache_dir=cache)) == ["n1/n1_8.png", "n2/n2_9.png"]


@WORKERS
def test_batches_are_those_of_local_shards_in_another_order(
    store: Store, remote: Path, cache: str, workers: int
) -> None:
    index = samples(train_on(open_images(ADDRESS, cache_dir=cache), num_workers=workers))
    assert sorted(index[:10]) == sorted(index[10:]) == list(range(10))
    assert set(store.fetched().values()) == {1}


def test_what_is_not_there(store: Store, cache: str) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/nothing/index\.json.*the bucket.*S3_ENDPOINT_URL"):
        open_images("s3://bucket/nothing", cache_dir=cache)
    with pytest.raises(DataError, match=r"ftp3:// is not a store.*s3"):
        open_images("ftp3://bucket/nothing", cache_dir=cache)


def test_refused(store: Store, remote: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    store.status = 403
    with pytest.raises(DataError, match=r"refuses s3://bucket/data/index\.json.*AWS_ACCESS_KEY_ID"):
        open_images(ADDRESS, cache_dir=cache)
    store.status = 0
    images = open_images(ADDRESS, cache_dir=cache)
    store.status = 403  # also in the middle of a run
    with pytest.raises(DataError, match=r"refuses s3://bucket/data/train/part.*AWS_ACCESS_KEY_ID"):
        images[0]
    store.status = 0
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(DataError, match=r"NoCredentialsError.*AWS_ACCESS_KEY_ID"):
        open_images(ADDRESS, cache_dir=cache + "2")
    assert time.monotonic() - begin < 10


def test_a_damaged_download_is_fetched_again(store: Store, remote: Path, cache: str, caplog) -> None:
    store.broken = 2
    assert keys(open_images(ADDRESS, cache_dir=cache)) == sorted(NAMES)
    assert sum(store.fetched().values()) == len(store.fetched()) + 2
    assert caplog.text.count("does not match its hash") == 2


def test_a_damaged_object_is_never_taken(store: Store, remote: Path, cache: str) -> None:
    shard = first_shard(remote / "train")
    whole = shard.read_bytes()
    flip(shard)
    for _ in range(2):  # the next run, too
        images = open_images(ADDRESS, cache_dir=cache)
        with pytest.raises(DataError, match=rf"{shard.name} of {ADDRESS}/train does not match its hash .* convert"):
            images[0]
    shard.write_bytes(whole)
    assert keys(images) == sorted(NAMES)


@pytest.mark.parametrize("change", [flip, lambda path: os.truncate(path, 20), Path.unlink])
def test_a_cached_shard_that_changed_is_fetched_again(store: Store, remote: Path, cache: str, change) -> None:
    images = open_images(ADDRESS, cache_dir=cache)
    expected = images[0]
    for again in (images, open_images(ADDRESS, cache_dir=cache)):  # in a run, and between runs
        change(first_shard(Path(again._shards.local)))
        assert again[0] == expected
    assert max(store.fetched().values()) == 3


def test_a_damaged_index_in_the_cache_is_fetched_again(store: Store, remote: Path, cache: str) -> None:
    images = open_images(ADDRESS, cache_dir=cache)
    for name in ("index.json", "dinocomp.json"):
        (Path(images._shards.local) / name).write_text('{"version": 2, "sha')
    assert keys(open_images(ADDRESS, cache_dir=cache)) == sorted(NAMES)


def test_an_index_cannot_write_elsewhere(store: Store, remote: Path, cache: str) -> None:
    index = json.loads((remote / "train" / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "../../../elsewhere.mds"
    (remote / "train" / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="outside its folder"):
        open_images(ADDRESS, cache_dir=cache)


@WORKERS
def test_a_missing_object_ends_the_run_by_name(store: Store, remote: Path, cache: str, workers: int) -> None:
    shard = first_shard(remote / "train")
    shard.unlink()
    begin = time.monotonic()
    with pytest.raises(
        DataError, match=rf"^the store has no {ADDRESS}/train/{shard.parent.name}/{shard.name}"
    ) as error:
        train_on(open_images(ADDRESS, cache_dir=cache), num_workers=workers, skip_bad=True)
    assert time.monotonic() - begin < 20 and "Traceback" not in str(error.value)


@WORKERS
def test_an_outage_is_waited_for(store: Store, remote: Path, cache: str, workers: int, caplog) -> None:
    images = open_images(ADDRESS, cache_dir=cache, timeout_seconds=40)
    store.stop()
    # Not before it was missed, however slow this machine is just now; of what workers say nothing is seen here.
    later(2, lambda: until(lambda: workers or "trying again" in caplog.text) or store.start())
    assert sorted(samples(train_on(images, num_workers=workers, iterations=2))) == list(range(10))
    if not workers:
        assert (
            "does not answer" in caplog.text and "trying again" in caplog.text and "after an outage of" in caplog.text
        )


def test_errors_and_broken_connections_are_waited_for(store: Store, remote: Path, cache: str) -> None:
    images = open_images(ADDRESS, cache_dir=cache, timeout_seconds=40)
    store.status, store.dropped = 503, 3
    later(2, lambda: setattr(store, "status", 0))
    assert keys(images) == sorted(NAMES)


@WORKERS
def test_an_outage_that_lasts_ends_the_run(store: Store, remote: Path, cache: str, workers: int) -> None:
    images = open_images(ADDRESS, cache_dir=cache, timeout_seconds=4)
    store.stop()
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"could not be fetched for .* s: .*data\.timeout_seconds"):
        train_on(images, num_workers=workers, timeout_seconds=4)
    assert time.monotonic() - begin < 12
    store.start()


@pytest.mark.parametrize("what", ["downloaded", "unpacked"])
def test_a_full_disk_is_not_an_outage(remote: Path, layout: Path, cache: str, monkeypatch, what: str) -> None:
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "downloaded":
        images = open_images(ADDRESS, cache_dir=cache)
        monkeypatch.setattr("streaming.base.storage.download.S3Downloader.download", full)
    else:
        convert(str(layout), cache + "-zstd", workers=1, progress=False, compression="zstd")
        images = open_images(cache + "-zstd", cache_dir=cache)
        monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"No space left on device; make room"):
        images[0]


def disk(folder: Path) -> int:
    """Bytes of shards, whole or not."""
    total = 0
    for place, _, names in os.walk(folder):  # which goes on where a folder is gone meanwhile
        for name in names:
            if ".mds" in name and not name.endswith(".reserved"):
                with contextlib.suppress(FileNotFoundError):
                    total += Path(place, name).stat().st_size
    return total


def test_a_limit_is_kept(store: Store, many: Path, cache: str, caplog) -> None:
    caplog.set_level(logging.INFO)
    size = disk(many)
    limit, peak, stop = size // 4, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.01):
            peak = max(peak, disk(Path(cache)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    orders = []
    for workers in (0, 2):
        images = open_images(ADDRESS, cache_dir=cache, cache_limit=limit)
        orders.append(samples(train_on(images, num_workers=workers, iterations=20)))
    stop.set()
    watcher.join()
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(100))
    assert limit / 2 < peak < 1.1 * limit
    assert "allows shuffling among about" in caplog.text
    counts = store.fetched()
    assert len(counts) == 20 and 2 <= sum(counts.values()) / 20 < 2.5  # two passes
    assert not list(Path(cache).rglob("*.reserved")) and not list(Path(cache).rglob("*.fetching*"))
    # A limit that came later is kept, too.
    keys(open_images(ADDRESS, cache_dir=cache))
    assert disk(Path(cache)) == size
    open_images(ADDRESS, cache_dir=cache, cache_limit=limit)
    assert disk(Path(cache)) <= limit


def test_a_limit_that_is_too_small(store: Store, many: Path, cache: str) -> None:
    with pytest.raises(DataError, match=r"data\.cache_limit is 1000 bytes.*largest shard.*more than 4 times"):
        open_images(ADDRESS, cache_dir=cache, cache_limit=1000)


def test_a_limit_never_touches_local_shards(shards: Path, cache: str) -> None:
    before = {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    images = open_images(str(shards), cache_dir=cache, cache_limit=100)
    train_on(images)
    assert images.block is None and {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()} == before


def test_two_runs_share_a_cache(store: Store, many: Path, cache: str) -> None:
    """And so do ranks: each shard is fetched by one of four workers."""
    results = multiprocessing.get_context("fork").Queue()

    def work() -> None:
        results.put(samples(train_on(open_images(ADDRESS, cache_dir=cache), num_workers=2, iterations=20)))

    with process(work), process(work):
        assert results.get(timeout=60) == results.get(timeout=60)
    assert len(store.fetched()) == 20 and set(store.fetched().values()) == {1}


@pytest.mark.slow
def test_two_runs_with_a_limit(store: Store, many: Path, cache: str) -> None:
    """They take shards from each other, and get them again."""
    results = multiprocessing.get_context("fork").Queue()

    def work(seed: int) -> None:
        images = open_images(ADDRESS, cache_dir=cache, cache_limit=disk(many) // 4)
        results.put(sorted(samples(train_on(images, num_workers=1, iterations=20, seed=seed))))

    with process(lambda: work(1)), process(lambda: work(2)):
        assert results.get(timeout=60) == results.get(timeout=60) == list(range(100))


def test_kill_9_leaves_nothing_that_matters(store: Store, many: Path, cache: str) -> None:
    shared = shared_memory()
    store.pause = 0.1

    def work() -> None:
        train_on(open_images(ADDRESS, cache_dir=cache, cache_limit=disk(many)), num_workers=2, iterations=20)

    for killed in range(1, 4):
        with process(work) as run:
            begin = time.monotonic()
            while len(store.fetched()) < 3 * killed and time.monotonic() - begin < 30:
                time.sleep(0.01)
            os.killpg(run.pid, signal.SIGKILL)  # while two workers are fetching
    left = list(Path(cache).rglob("*.fetching*")) + list(Path(cache).rglob("*.reserved"))
    assert len(store.fetched()) >= 9 and left, "none was killed while it fetched"
    time.sleep(0.5)
    store.pause = 0.0
    begin = time.monotonic()
    images = open_images(ADDRESS, cache_dir=cache, cache_limit=disk(many))
    assert not [path for path in left if path.exists()]
    assert sorted(samples(train_on(images, num_workers=2, iterations=20))) == list(range(100))
    assert time.monotonic() - begin < 15
    until(lambda: shared_memory() <= shared)  # what tests beside this one hold for a moment goes, too
    assert max(store.fetched().values()) <= 3


@pytest.mark.slow
def test_ranks_of_a_machine_share_a_cache(store: Store, many: Path, tmp_path: Path) -> None:
    """A whole run on two ranks, with two workers each, over a store that is away for a while."""
    keys = {"train__dataset_path": ADDRESS, "data__cache_dir": tmp_path / "cache", "train__batch_size_per_gpu": 10}
    keys |= {"train__OFFICIAL_EPOCH_LENGTH": 1, "optim__epochs": 5, "train__num_workers": 2}

    def outage() -> None:
        while len(store.fetched()) < 3:
            time.sleep(0.01)
        store.stop()
        time.sleep(5)
        store.start()

    store.pause = 0.3
    waiting = threading.Thread(target=outage, daemon=True)
    waiting.start()
    done = launch(yaml_of_nothing(tmp_path), *words(tmp_path / "run", **keys), processes=2)
    assert done.returncode == 0, done.stderr
    assert "does not answer" in (tmp_path / "run" / "train.log").read_text()
    assert set(store.fetched().values()) == {1} and len(store.fetched()) == 20
