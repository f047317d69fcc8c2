"""The endless order of training: which sample stands at which place of the run."""

import logging
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from dinocomp.data.lanes import LaneOrder
from dinocomp.errors import DataError

log = logging.getLogger(__name__)

_ORDER_STREAM = 103  # keeps this draw apart from those of crops and masks

Place = tuple[int, int, int]  # position in the run, pass over the data, sample


class Resumable(Protocol):
    """A dataset that knows where the run stands."""

    position: int  # images consumed by all ranks so far
    iteration: int  # iterations done so far


def uniform_permutation(samples: int, seed: int, passes: int) -> np.ndarray:
    """All samples in uniformly random order: int64 [samples], a function of (seed, pass)."""
    return np.random.Generator(np.random.Philox((seed, _ORDER_STREAM, passes))).permutation(samples)


class TrainingOrder(DistributedSampler):
    """Yields (position, pass, sample) for one rank until the run's iterations are done.

    Position p, counted over the whole run and all ranks from 0, holds sample permutation(seed, p // N)[p % N] of pass
    p // N, where N is the number of samples. Iteration t takes positions t*B*W .. (t+1)*B*W-1 and rank r of W the r-th
    B of them. So every sample is seen once before any is seen again, nothing is dropped (a batch may hold the end of
    one pass and the beginning of the next), and the order of the run is the same for any number of ranks or workers.

    The permutation is uniform; where shards have to be fetched it is a `LaneOrder`, so that a machine needs few of
    them at a time, and others than its neighbours. That one is a function of the global batch B*W, too: in the pass in
    which a run goes on with another one, or with another block, some samples come twice and others not at all. In every
    other pass each comes once.

    It is a `DistributedSampler` because Composer accepts nothing else on several ranks; `set_epoch` has no effect, the
    whole run is one epoch of the loader.

    Args:
        dataset: `position` and `iteration` are read whenever iteration begins, which is how a resumed run goes on.
        samples: N.
        batch_size: B, images of one rank in one iteration.
        iterations: of the whole run.
        shard_sizes, block: given, passes are shuffled shard by shard, as `LaneOrder` does (for remote data); None,
            uniformly.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        samples: int,
        batch_size: int,
        world_size: int,
        rank: int,
        iterations: int,
        seed: int,
        shard_sizes: np.ndarray | None = None,
        block: int | None = None,
    ) -> None:
        if samples < 1:
            raise DataError("the dataset has no images; give train.dataset_path a place that has some")
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.samples = samples
        self.batch_size = batch_size
        self.iterations = iterations
        self.shard_sizes = shard_sizes
        self.block = block
        self._current, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        """Images of this rank in the whole run, also after resuming: Composer counts a run's batches from its start."""
        return self.iterations * self.batch_size

    def __iter__(self) -> Iterator[Place]:
        start: Resumable = self.dataset
        global_batch = self.batch_size * self.num_replicas
        samples = self._uniform if self.block is None else self._lanes(start, global_batch)
        for step in range(self.iterations - start.iteration):
            position = start.position + step * global_batch + self.rank * self.batch_size
            stop = position + self.batch_size
            while position < stop:
                passes = position // self.samples
                places = np.arange(position, min(stop, (passes + 1) * self.samples))  # those in this pass
                for place, sample in zip(places.tolist(), samples(passes, places).tolist(), strict=True):
                    yield place, passes, sample
                position += len(places)

    def _uniform(self, passes: int, positions: np.ndarray) -> np.ndarray:
        if self._current != passes:
            self._current, self._order = passes, uniform_permutation(self.samples, self.seed, passes)
        return self._order[positions % self.samples]

    def _lanes(self, start: Resumable, global_batch: int) -> LaneOrder:
        lanes = LaneOrder(
            self.shard_sizes, self.block, seed=self.seed, global_batch=global_batch, offset=start.position
        )
        if start.position != start.iteration * global_batch:
            log.info(
                "note: the images of all processes in an iteration were another number before; where images are "
                "fetched, some come twice and others not at all in the pass in which that changed"
            )
        return lanes
