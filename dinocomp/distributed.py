"""What the losses need of the other ranks; on one process, nothing."""

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    """`x` summed ("sum") or its maximum ("max") over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return x
