"""Some of the images, the same ones every time."""

import numpy as np


def draw(total: int, count: int) -> list[int]:
    """`count` of `total` numbers, rising, drawn by a fixed seed; all of them where `count` is 0 or too many."""
    if not 0 < count < total:
        return list(range(total))
    return sorted(np.random.default_rng(0).permutation(total)[:count].tolist())
