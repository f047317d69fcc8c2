"""The order of training where shards have to be fetched, and what each machine has to fetch."""

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest

from dinocomp.data.lanes import LaneOrder, count_lanes
from dinocomp.data.order import TrainingOrder
from dinocomp.data.shards import open_images

from ..store import Store
from .conftest import image_bytes, process, samples, train_on


class Start:
    def __init__(self, position: int = 0, iteration: int = 0) -> None:
        self.position, self.iteration = position, iteration

    def __len__(self) -> int:
        return N


SIZES = np.random.default_rng(0).integers(5, 16, 150)  # 1561 samples
N = int(SIZES.sum())
SHARD = np.repeat(np.arange(150), SIZES)  # [N], of each sample
BLOCK = 640


def order(rank: int = 0, world: int = 1, start: Start | None = None, iterations: int = 120, batch: int = 32, **changes):
    """What one of `world` ranks sees; `batch` images of all of them in an iteration."""
    settings = {"samples": N, "shard_sizes": SIZES, "block": BLOCK, "seed": 3} | changes
    settings |= {"batch_size": batch // world, "world_size": world, "rank": rank, "iterations": iterations}
    return list(TrainingOrder(start or Start(), **settings))


def whole_passes(places: list) -> list[list[int]]:
    """The samples of every pass that is there from its beginning to its end."""
    passes = [[s for *_, s in group] for _, group in itertools.groupby(places, key=lambda place: place[1])]
    return passes[:-1]


@pytest.mark.parametrize("batch", [1, 12, 32, 96, 128, 1000])
def test_every_sample_once_in_a_pass(batch: int) -> None:
    places = order(batch=batch, iterations=4 * N // batch + 2)
    assert ([p for p, _, _ in places] == list(range(len(places))) and N % batch) or batch == 1
    passes = whole_passes(places)
    assert len(passes) >= 3 and all(sorted(seen) == list(range(N)) for seen in passes)
    assert passes[0] != passes[1]


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_once_for_odd_shards(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 30, random.integers(1, 60))
    total, batch = int(sizes.sum()), int(random.choice([1, 3, 8, 12, 64, 256]))
    lanes = LaneOrder(sizes, 2 * total, seed=seed, global_batch=batch, offset=int(random.integers(500)))
    for passes in range(3):
        assert sorted(lanes(passes, passes * total + np.arange(total))) == list(range(total))


def test_number_of_lanes() -> None:
    many = np.full(1000, 10)
    assert [count_lanes(many, 10**6, batch) for batch in (1, 6, 32, 96, 48, 4096)] == [1, 2, 32, 32, 16, 64]
    assert count_lanes(np.full(20, 10), 10**6, 4096) == 8  # two shards and more for each
    assert count_lanes(many, 100, 64) == 4  # with (100 + 2 * 10) / 4 samples a lane, of which shards' ends may be 20


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_single_order(world: int) -> None:
    single, size = order(), 32 // world
    ranks = [order(rank, world) for rank in range(world)]
    assert [place for t in range(120) for rank in ranks for place in rank[t * size : (t + 1) * size]] == single


@pytest.mark.parametrize("iteration", [1, 17, N // 32, N // 32 + 1, 119])
def test_resumed_order_is_the_rest(iteration: int) -> None:
    assert order(start=Start(32 * iteration, iteration)) == order()[32 * iteration :]


def test_another_global_batch(caplog: pytest.LogCaptureFixture) -> None:
    """From the next pass on each sample comes once again, and the run can be resumed anywhere."""
    caplog.set_level(logging.INFO)
    order(start=Start(1600, 50))
    assert not caplog.text
    rest = order(start=Start(1600, 50), batch=24, iterations=300)
    assert "another number before" in caplog.text and [p for p, _, _ in rest] == list(range(1600, 1600 + 250 * 24))
    passes = whole_passes(rest)[1:]
    assert len(passes) == 2 and all(sorted(seen) == list(range(N)) for seen in passes)
    assert order(start=Start(1600 + 24 * 30, 80), batch=24, iterations=300) == rest[24 * 30 :]
    halves = [order(rank, 2, Start(1600, 50), batch=24, iterations=300) for rank in range(2)]
    assert [place for t in range(250) for half in halves for place in half[t * 12 : (t + 1) * 12]] == rest


def nodes_shards(nodes: int, passes: int) -> list[set[int]]:
    """The shards that each of `nodes` machines with two ranks reads in a pass."""
    ranks = [order(rank, 2 * nodes) for rank in range(2 * nodes)]
    read = [{int(SHARD[s]) for _, k, s in places if k == passes} for places in ranks]
    return [read[2 * node] | read[2 * node + 1] for node in range(nodes)]


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_machines_read_different_shards(nodes: int) -> None:
    lanes = count_lanes(SIZES, BLOCK, 32)
    assert lanes >= 8
    for passes in (0, 1):
        read = nodes_shards(nodes, passes)
        assert len(set.union(*read)) == len(SIZES)
        assert sum(map(len, read)) <= len(SIZES) + nodes - 1  # those at cuts between machines
    first, second = nodes_shards(nodes, 0), nodes_shards(nodes, 1)
    assert len(first[0] & second[0]) < 0.8 * len(first[0]), "a machine gets other shards in the next pass"


@pytest.mark.parametrize("block", [60, 200, BLOCK])
def test_few_shards_at_a_time(block: int) -> None:
    """One machine with all lanes: at most the shards of two blocks, from a shard's first sample to its last."""
    places = [s for *_, s in order(block=block, iterations=N // 32)]
    first, last = {}, {}
    for place, sample in enumerate(places):
        first.setdefault(int(SHARD[sample]), place)
        last[int(SHARD[sample])] = place
    open_at = [sum(SIZES[s] for s in first if first[s] <= place <= last[s]) for place in range(len(places))]
    assert max(open_at) <= 2 * (block + 2 * SIZES.max())
    assert max(open_at) < N / 2


def test_samples_are_mixed() -> None:
    """A batch has samples of many shards, and those of a shard come in random order."""
    places = [s for *_, s in order()]
    batches = [len({int(SHARD[s]) for s in places[b : b + 32]}) for b in range(0, N - 32, 32)]
    assert np.mean(batches) > 16
    inside = np.array([s for s in places[:N] if SHARD[s] == 7])
    assert sorted(inside) != inside.tolist()


@pytest.fixture
def many(store: Store) -> str:
    """s3://bucket/data: 160 images in 40 shards."""
    from streaming import MDSWriter

    folder = store.folder / "bucket" / "data"
    with MDSWriter(out=str(folder), columns={"image": "bytes"}, hashes=["xxh64"], size_limit=5000) as writer:
        for number in range(160):
            writer.write({"image": image_bytes(number).ljust(1000, b"\0")})
    assert len(list(folder.glob("*.mds"))) == 40
    return "s3://bucket/data"


@pytest.mark.parametrize("nodes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_shard_is_fetched_by_one_machine(store: Store, many: str, tmp_path: Path, nodes: int) -> None:
    """Machines, each a process with a worker, two ranks' loaders and a cache of its own, over one store; two passes."""

    def machine(node: int) -> None:
        images = open_images(many, cache_dir=str(tmp_path / f"cache-{node}"))
        seen = [
            samples(
                train_on(images, batch_size=16 // nodes, world_size=2 * nodes, rank=rank, iterations=5, num_workers=1)
            )
            for rank in (2 * node, 2 * node + 1)
        ]
        (tmp_path / f"seen-{node}").write_text(" ".join(map(str, itertools.chain(*seen))))

    for node in range(nodes):
        with process(lambda node=node: machine(node)) as running:
            running.join(60)
            assert running.exitcode == 0
    seen = [int(word) for node in range(nodes) for word in (tmp_path / f"seen-{node}").read_text().split()]
    assert sorted(seen) == list(range(160))  # one pass
    counts = store.fetched()
    assert len(counts) == 40 and sum(counts.values()) <= 40 + nodes - 1


def test_ranks_of_a_machine_fetch_each_shard_once(store: Store, many: str, tmp_path: Path) -> None:
    """Two processes at the same time, over one cache; their lanes meet in a shard."""
    store.pause = 0.05

    def work(rank: int) -> None:
        images = open_images(many, cache_dir=str(tmp_path / "cache"))
        seen = samples(train_on(images, batch_size=16, world_size=2, rank=rank, iterations=10, num_workers=1))
        (tmp_path / f"seen-{rank}").write_text(" ".join(map(str, seen)))

    with process(lambda: work(0)) as first, process(lambda: work(1)) as second:
        for running in (first, second):
            running.join(60)
            assert running.exitcode == 0
    seen = [int(word) for rank in range(2) for word in (tmp_path / f"seen-{rank}").read_text().split()]
    assert sorted(seen) == sorted([*range(160), *range(160)])  # two passes
    assert len(store.fetched()) == 40 and set(store.fetched().values()) == {1}
