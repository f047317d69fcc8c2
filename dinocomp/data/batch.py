"""What one rank trains on in one iteration."""

from typing import TypedDict

import torch


class _Always(TypedDict):
    global_crops: torch.Tensor  # uint8 [B, 2, 3, G, G]
    local_crops: torch.Tensor  # uint8 [B, L, 3, l, l]
    masks: torch.Tensor  # bool [B, 2, N], True where the student does not see the patch
    index: torch.Tensor  # int64 [B], the samples' numbers in the dataset
    replaced: torch.Tensor  # int64 [B], the bad sample whose place this one took, -1 for none


class Batch(_Always, total=False):
    """B images, L local crops, N patches of a global crop.

    Where augmentation's colours are left to the device, P numbers say of each crop what was drawn; see `device.py`.
    """

    global_colours: torch.Tensor  # fp32 [B, 2, P]
    local_colours: torch.Tensor  # fp32 [B, L, P]


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Micro-batches of `size` images, the last one perhaps smaller; an image's crops and masks stay together."""
    count = len(batch["index"])
    return [
        Batch(**{name: field[first : first + size] for name, field in batch.items()}) for first in range(0, count, size)
    ]
