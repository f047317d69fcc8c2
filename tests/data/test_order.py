"""The order of a run's images."""

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from dinocomp.data.order import TrainingOrder, uniform_permutation
from dinocomp.errors import DataError


class Start:
    def __init__(self, position: int = 0, iteration: int = 0) -> None:
        self.position, self.iteration = position, iteration

    def __len__(self) -> int:
        return 10


def order(start: Start | None = None, **changes) -> TrainingOrder:
    settings = {"samples": 10, "batch_size": 4, "world_size": 1, "rank": 0, "iterations": 8, "seed": 0} | changes
    return TrainingOrder(start or Start(), **settings)


def test_every_sample_once_before_any_again() -> None:
    places = list(order(iterations=25))
    assert [p for p, _, _ in places] == list(range(100))
    assert [passes for _, passes, _ in places] == [p // 10 for p in range(100)]
    for begin in range(0, 100, 10):
        assert sorted(sample for _, _, sample in places[begin : begin + 10]) == list(range(10))
    assert len({tuple(s for _, _, s in places[b : b + 10]) for b in range(0, 100, 10)}) > 5  # passes differ


def test_more_images_a_batch_than_there_are() -> None:
    assert [sample for *_, sample in order(samples=1, iterations=2)] == [0] * 8


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_single_order(world: int) -> None:
    single = list(order(batch_size=8, iterations=6))
    ranks = [list(order(batch_size=8 // world, world_size=world, rank=r, iterations=6)) for r in range(world)]
    size = 8 // world
    merged = [p for t in range(6) for rank in ranks for p in rank[t * size : (t + 1) * size]]
    assert merged == single


def test_resumed_order_is_the_rest() -> None:
    whole = list(order(iterations=9))
    assert list(order(Start(20, 5), iterations=9)) == whole[20:]
    # With another global batch the images go on at the next one and the iterations at theirs.
    rest = list(order(Start(20, 5), iterations=9, batch_size=2))
    assert rest == whole[20:28]


def test_sampler_is_what_composer_wants() -> None:
    sampler = order(Start(20, 5), iterations=9)
    assert isinstance(sampler, DistributedSampler) and len(sampler) == 36
    before = list(sampler)
    sampler.set_epoch(4)
    assert list(sampler) == before


def test_permutations() -> None:
    first = uniform_permutation(1000, 0, 0)
    assert sorted(first) == list(range(1000)) and np.array_equal(first, uniform_permutation(1000, 0, 0))
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1
    for other in (uniform_permutation(1000, 0, 1), uniform_permutation(1000, 1, 0)):
        assert not np.array_equal(first, other)


def test_no_images() -> None:
    with pytest.raises(DataError, match="no images"):
        order(samples=0)
