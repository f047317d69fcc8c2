"""The endless order of training: which sample stands at which place of the run."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from dinocomp.errors import DataError

_ORDER_STREAM = 103  # keeps this draw apart from those of crops and masks

Place = tuple[int, int, int]  # position in the run, pass over the data, sample


class Resumable(Protocol):
    """A dataset that knows where the run stands."""

    position: int  # images consumed by all ranks so far
    iteration: int  # iterations done so far


def uniform_permutation(samples: int, seed: int, passes: int) -> np.ndarray:
    """All samples in uniformly random order: int64 [samples], a function of (seed, pass)."""
    return np.random.Generator(np.random.Philox((seed, _ORDER_STREAM, passes))).permutation(samples)


def shard_permutation(shard_sizes: np.ndarray, seed: int, passes: int, block: int) -> np.ndarray:
    """Shards in random order, samples shuffled inside blocks of about `block`: int64 [samples].

    Only a few shards are needed at a time, so that training can start before everything is downloaded
    (Streaming's `py1br`).
    """
    from streaming.base.shuffle import get_shuffle

    return get_shuffle("py1br", np.asarray(shard_sizes, np.int64), 1, seed, passes, block)


class TrainingOrder(DistributedSampler):
    """Yields (position, pass, sample) for one rank until the run's iterations are done.

    Position p, counted over the whole run and all ranks from 0, holds sample permutation(seed, p // N)[p % N] of pass
    p // N, where N is the number of samples. Iteration t takes positions t*B*W .. (t+1)*B*W-1 and rank r of W the r-th
    B of them. So every sample is seen once before any is seen again, nothing is dropped (a batch may hold the end of
    one pass and the beginning of the next), and the order of the run is the same for any number of ranks or workers.

    It is a `DistributedSampler` because Composer accepts nothing else on several ranks; `set_epoch` has no effect, the
    whole run is one epoch of the loader.

    Args:
        dataset: `position` and `iteration` are read whenever iteration begins, which is how a resumed run goes on.
        samples: N.
        batch_size: B, images of one rank in one iteration.
        iterations: of the whole run.
        shard_sizes, block: given, passes are shuffled shard by shard, as `shard_permutation` does (for remote data);
            None, uniformly.
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

    def __len__(self) -> int:
        """Images of this rank in the whole run, also after resuming: Composer counts a run's batches from its start."""
        return self.iterations * self.batch_size

    def __iter__(self) -> Iterator[Place]:
        start: Resumable = self.dataset
        global_batch = self.batch_size * self.num_replicas
        current, order = -1, np.empty(0, np.int64)
        for step in range(self.iterations - start.iteration):
            first = start.position + step * global_batch + self.rank * self.batch_size
            for position in range(first, first + self.batch_size):
                passes, place = divmod(position, self.samples)
                if passes != current:
                    current, order = passes, self.permutation(passes)
                yield position, passes, int(order[place])

    def permutation(self, passes: int) -> np.ndarray:
        """The order of one pass: int64 [samples]."""
        if self.shard_sizes is None or self.block is None:
            return uniform_permutation(self.samples, self.seed, passes)
        return shard_permutation(self.shard_sizes, self.seed, passes, self.block)
