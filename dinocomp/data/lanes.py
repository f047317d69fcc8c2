"""The order of training where shards have to be fetched: each part of the global batch has shards of its own."""

import numpy as np

_SHARD_STREAM, _LANE_STREAM = 106, 107  # keep these draws apart from those of crops and masks
MOST_LANES = 64


def count_lanes(shard_sizes: np.ndarray, block: int, global_batch: int) -> int:
    """How many lanes: the largest power of two that divides the global batch, as far as shards and block allow.

    A lane has two shards or more, and shuffles more than one of them at a time.
    """
    lanes = min(MOST_LANES, global_batch & -global_batch)
    while lanes > 1 and (2 * lanes > len(shard_sizes) or lane_block(shard_sizes, block, lanes) < shard_sizes.max()):
        lanes //= 2
    return lanes


def lane_block(shard_sizes: np.ndarray, block: int, lanes: int) -> int:
    """How many samples a lane shuffles together.

    Each lane's block begins and ends inside a shard: all of them together keep as many samples' shards as one block.
    """
    ends = 2 * int(shard_sizes.max())
    return max(2, (block + ends) // lanes - ends)


class LaneOrder:
    """Which sample stands at which position: a function of (seed, position, global batch).

    The places of the global batch, G, are divided among c lanes: place s belongs to lane s * c // G. In each pass all
    shards are put in random order, one after another, and cut into c parts with as many samples as each lane has
    positions in that pass (a pass may begin and end inside a batch). A lane goes through its part from one end to the
    other, in random order inside blocks. So a rank, or a machine with several, which takes neighbouring places, needs
    the shards of its lanes only; those at cuts belong to two lanes.

    Args:
        shard_sizes: int64 [shards], samples of each.
        block: samples that are shuffled at a time, over all lanes.
        global_batch: G.
        offset: position of the first place of some batch; 0, unless the run had another global batch before.
    """

    def __init__(self, shard_sizes: np.ndarray, block: int, *, seed: int, global_batch: int, offset: int = 0) -> None:
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.samples = int(self.shard_sizes.sum())
        self.seed = seed
        self.global_batch = global_batch
        self.lanes = count_lanes(self.shard_sizes, block, global_batch)
        self.block = lane_block(self.shard_sizes, block, self.lanes)
        self._shift = -offset % global_batch  # makes positions begin with a whole batch
        self._width = global_batch // self.lanes
        self._pass = -1
        self._parts: dict[int, np.ndarray] = {}  # of the current pass, those asked for

    def __call__(self, passes: int, positions: np.ndarray) -> np.ndarray:
        """The samples at positions (int64 [n]) that all lie in one pass: int64 [n]."""
        if passes != self._pass:
            self._pass, self._parts = passes, {}
            self._cut(passes)
        lane = (positions + self._shift) % self.global_batch // self._width  # [n]
        turn = self._before(positions, lane) - self._before(passes * self.samples, lane)  # [n]
        found = np.empty(len(positions), np.int64)
        for number in np.unique(lane).tolist():
            found[lane == number] = self._part(number)[turn[lane == number]]
        return found

    def _before(self, position: np.ndarray | int, lane: np.ndarray) -> np.ndarray:
        """How many positions before the given ones are the lanes': int64 [n]."""
        batches, place = np.divmod(position + self._shift, self.global_batch)
        return batches * self._width + np.clip(place - lane * self._width, 0, self._width)

    def _cut(self, passes: int) -> None:
        """The shards of a pass in random order, and where each lane's part begins."""
        lanes = np.arange(self.lanes)
        first = passes * self.samples
        counts = self._before(first + self.samples, lanes) - self._before(first, lanes)  # [lanes]
        self._cuts = np.concatenate([[0], counts.cumsum()])  # [lanes + 1]
        self._shards = self._random(_SHARD_STREAM).permutation(len(self.shard_sizes))  # [shards]
        self._ends = self.shard_sizes[self._shards].cumsum()  # [shards]

    def _part(self, lane: int) -> np.ndarray:
        """One lane's samples in the current pass, in its order: int64 [its positions]."""
        if lane in self._parts:
            return self._parts[lane]
        begin, end = self._cuts[lane : lane + 2].tolist()
        left = np.searchsorted(self._ends, begin, "right")
        right = np.searchsorted(self._ends, end, "left") + 1
        chosen, ends = self._shards[left:right], self._ends[left:right]
        added = self.shard_sizes.cumsum()[chosen] - ends  # [the lane's shards], to a place in the pass, for its sample
        inside = np.minimum(ends, end) - np.maximum(ends - self.shard_sizes[chosen], begin)  # [the lane's shards]
        part = np.arange(begin, end) + np.repeat(added, inside)  # [the lane's positions]
        random = self._random(_LANE_STREAM, lane)
        first = int(random.integers(1, self.block, endpoint=True))  # lanes come to new shards at different times
        for start in (0, *range(first, len(part), self.block)):
            random.shuffle(part[start : start + self.block if start else first])
        self._parts[lane] = part
        return part

    def _random(self, stream: int, *lane: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox((self.seed, stream, self._pass, *lane)))
