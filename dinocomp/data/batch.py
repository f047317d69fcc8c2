"""What one rank trains on in one iteration."""

from typing import TypedDict

import torch


class Batch(TypedDict):
    """B images, L local crops, N patches of a global crop."""

    global_crops: torch.Tensor  # uint8 [B, 2, 3, G, G]
    local_crops: torch.Tensor  # uint8 [B, L, 3, l, l]
    masks: torch.Tensor  # bool [B, 2, N], True where the student does not see the patch
    index: torch.Tensor  # int64 [B], the samples' numbers in the dataset
    replaced: torch.Tensor  # int64 [B], the bad sample whose place this one took, -1 for none


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Micro-batches of `size` images, the last one perhaps smaller; an image's crops and masks stay together."""
    count = len(batch["index"])
    return [
        Batch(**{name: field[first : first + size] for name, field in batch.items()}) for first in range(0, count, size)
    ]
