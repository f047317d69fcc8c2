import numpy as np
import pytest

from dinocomp.data.masks import MaskSettings, batch_masks, block_mask, mask_targets, max_masked_patches
from dinocomp.errors import ConfigError

LARGE = MaskSettings((14, 14))


def rank_maximum(settings: MaskSettings, batch: int, world: int, steps: int) -> list[np.ndarray]:
    return [mask_targets(settings, 0, step, batch).reshape(world, -1).sum(1) for step in range(steps)]


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (7, 7), (12, 20)])
def test_blocks_reach_the_target_and_never_pass_it(grid: tuple[int, int]) -> None:
    settings, rng = MaskSettings(grid), np.random.default_rng(0)
    targets = rng.integers(1, settings.patches // 2, 1500)
    counts = np.array([block_mask(int(t), settings, rng).sum() for t in targets])
    assert (counts <= targets).all()
    assert (counts == targets).mean() > 0.88
    assert (targets - counts).mean() < 0.15


def test_block_shapes() -> None:
    """A target that one block fills: an area and aspect within bounds, smaller than the grid, anywhere on it."""
    settings, rng = MaskSettings((14, 14), block_min_patches=20), np.random.default_rng(1)
    seen = np.zeros((14, 14))
    ratios = []
    for _ in range(2000):
        mask = block_mask(20, settings, rng)
        seen += mask
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if mask.sum() == len(rows) * len(columns):
            ratios.append(len(rows) / len(columns))
    assert min(ratios) >= 0.2 and max(ratios) <= 5 and abs(np.median(ratios) - 1) < 0.3
    assert (seen > 0).all() and seen[5:9, 5:9].min() > seen[0, 0]


def test_no_block_covers_the_whole_side() -> None:
    settings = MaskSettings((4, 4), block_max_fraction=1.0)
    masks = [block_mask(6, settings, np.random.default_rng(seed)) for seed in range(50)]
    assert all(mask.sum() <= 6 for mask in masks) and any(mask.sum() == 6 for mask in masks)
    assert not block_mask(0, settings, np.random.default_rng(0)).any()
    assert not block_mask(3, MaskSettings((1, 8)), np.random.default_rng(0)).any()  # no block is less than one row


def test_targets_are_stratified() -> None:
    batch = 64
    edges = LARGE.edges(batch)
    for step in range(20):
        targets = mask_targets(LARGE, 3, step, batch)
        assert targets.shape == (64, 2)
        drawn = np.sort(targets[targets > 0])
        assert len(drawn) == 64  # int(2 * 64 * 0.5)
        low, high = (196 * edges[:-1]).astype(int), (196 * edges[1:]).astype(int)
        assert (low <= drawn).all() and (drawn <= high).all()


def test_every_crop_is_masked_equally_often_and_deeply() -> None:
    steps = 3000
    targets = np.stack([mask_targets(LARGE, 0, step, 32) for step in range(steps)]).reshape(steps, -1)
    assert np.abs((targets > 0).mean(0) - 0.5).max() < 0.05
    means = np.array([column[column > 0].mean() for column in targets.T])
    assert np.abs(means / (196 * 0.3) - 1).max() < 0.06
    both = ((targets.reshape(steps, 32, 2) > 0).all(2)).mean()
    assert 0.15 < both < 0.3  # the two crops of an image are masked nearly independently


@pytest.mark.parametrize("probability", [0.0, 0.01, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("batch", [1, 2, 7, 16, 24, 40, 64, 100])
def test_number_of_masked_crops(batch: int, probability: float) -> None:
    settings = MaskSettings((14, 14), sample_probability=probability)
    for step in range(5):
        assert (mask_targets(settings, 0, step, batch) > 0).sum() == int(2 * batch * probability)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(
    ("batch", "world"),
    [(64, 1), (64, 8), (64, 32), (96, 3), (96, 6), (120, 5), (16, 16), (24, 8), (2048, 32), (12, 1), (12, 4), (80, 10)],
)
def test_the_bound_is_never_passed(batch: int, world: int, probability: float) -> None:
    settings = MaskSettings((14, 14), sample_probability=probability)
    bound = max_masked_patches(settings, batch, world)
    most = max(counts.max() for counts in rank_maximum(settings, batch, world, 10 if batch > 1000 else 100))
    assert most <= bound
    if batch // world >= 8:  # it is of use: the busiest rank comes near it
        assert most > 0.6 * bound


@pytest.mark.parametrize("images", [32, 64, 128])
@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 32])
def test_the_bound_is_tight_for_powers_of_two(images: int, world: int) -> None:
    """Within 2 % of the mean from 64 images a rank on, whatever the world size; 2.5 % at 32."""
    batch = images * world
    if not 64 <= batch <= 2048:
        pytest.skip("outside of what is claimed")
    bound = max_masked_patches(LARGE, batch, world)
    edges = LARGE.edges(batch)
    assert bound == sum(int(196 * edges[(i + 1) * world]) for i in range(images))
    mean = np.mean(rank_maximum(LARGE, batch, world, 6))
    assert mean <= bound < mean * (1.02 if images >= 64 else 1.026)


def test_bound_of_the_spec() -> None:
    assert max_masked_patches(LARGE, 64, 1) == 3771


def test_world_size_must_divide() -> None:
    with pytest.raises(ConfigError, match="multiple of 3"):
        max_masked_patches(LARGE, 64, 3)


def test_masks_do_not_depend_on_who_asks() -> None:
    whole = batch_masks(LARGE, 1, 7, 16, np.arange(16))
    parts = [batch_masks(LARGE, 1, 7, 16, np.array(slots)) for slots in ([3, 0], [15], [])]
    assert whole.shape == (16, 2, 196) and whole.dtype == bool
    assert np.array_equal(parts[0], whole[[3, 0]]) and np.array_equal(parts[1], whole[15:]) and parts[2].shape[0] == 0
    assert not np.array_equal(whole, batch_masks(LARGE, 1, 8, 16, np.arange(16)))
    assert not np.array_equal(whole, batch_masks(LARGE, 2, 7, 16, np.arange(16)))


def test_masked_counts_follow_the_targets() -> None:
    targets = mask_targets(LARGE, 0, 0, 64)
    counts = batch_masks(LARGE, 0, 0, 64, np.arange(64)).sum(-1)
    assert (counts <= targets).all() and ((counts > 0) == (targets > 0)).all() and (targets - counts).mean() < 0.15


def test_masking_can_be_off() -> None:
    off = MaskSettings((14, 14), sample_probability=0.0)
    assert not batch_masks(off, 0, 0, 8, np.arange(8)).any() and max_masked_patches(off, 8, 2) == 0
