"""Rows that ranks have computed in turns, put together: rank r of W has rows r, r + W, r + 2 W, …"""

import math

from torch import Tensor

from dinocomp.distributed import all_gather, world_size


def gather_rows(mine: Tensor, total: int) -> Tensor:
    """All `total` rows in their order, on every rank: [n, ...] of this rank -> [total, ...].

    What shorter shares are filled up with for sending comes last, and is cut off: no row is there twice.
    """
    if world_size() == 1:
        return mine
    most = math.ceil(total / world_size())
    filled = mine.new_zeros(most, *mine.shape[1:])
    filled[: len(mine)] = mine
    rows = all_gather(filled)[0].unflatten(0, (world_size(), most))  # [W, most, ...]
    return rows.transpose(0, 1).flatten(0, 1)[:total]
