"""What the losses need of the other ranks, and what ranks agree on; on one process, nothing."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dinocomp.errors import DinocompError

T = TypeVar("T")

_PATIENCE = timedelta(days=1)  # what rank 0 does for the others may be long; a rank that died ends the job at once

_cpu_group: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None  # the default group, and gloo over its ranks


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    """`x` summed ("sum") or its maximum ("max") over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return x


def all_gather(x: Tensor) -> tuple[Tensor, int, int]:
    """The rows [n, ...] of all ranks, which have the same number of them, as [W * n, ...]; and this rank, and W."""
    if world_size() == 1:
        return x, 0, 1
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts), dist.get_rank(), world_size()


def any_rank(flag: bool) -> bool:
    """Whether any rank says so. All ranks must ask; it goes over the CPU, so that no GPU is waited for."""
    if world_size() == 1:
        return flag
    said = torch.tensor(int(flag))
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=_gloo())
    return bool(said)


def on_rank_0(action: Callable[[], T]) -> T:
    """What `action` gives on rank 0, the only one to do it, on all ranks. It must be possible to pickle that.

    Raises:
        DinocompError: on all ranks, where rank 0's action raises it; none is left waiting.
        RuntimeError: on the others, where rank 0's action raises anything else.
    """
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    raised: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [action(), None]
        except DinocompError as error:
            outcome = [None, error]
        except Exception as error:  # whatever it is, and whether it can be pickled or not
            outcome, raised = [None, RuntimeError(f"rank 0: {type(error).__name__}: {error}")], error
    dist.broadcast_object_list(outcome, src=0, group=_gloo())
    result, error = outcome
    if error is not None:
        raise raised or error
    return result


def _gloo() -> dist.ProcessGroup:
    global _cpu_group
    world = dist.group.WORLD
    if _cpu_group is None or _cpu_group[0] is not world:  # also after the default group was made anew
        _cpu_group = (world, dist.new_group(backend="gloo", timeout=_PATIENCE))
    return _cpu_group[1]
