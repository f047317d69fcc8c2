"""FSDP and FSDP2 on CPUs, which torch does not support: what has to be mended in a process for that."""

from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from composer import Logger, State
from torch.distributed.fsdp import _init_utils

from dinocomp.build import parallel
from dinocomp.callbacks import ClipGradients


def shard_on_cpu(before: Callable[..., None] | None = None, *details: object) -> None:
    """Lets a process shard its networks over gloo; then calls `before(*details)`."""
    parallel.check_sharding = lambda strategy, gpu: None
    # FSDP puts weights on "the current GPU"; of FSDP2's gradients some versions of gloo give the sum, not the mean.
    torch.cuda.current_device = lambda: torch.device("cpu")
    _init_utils._check_module_states_for_sync_module_states = lambda states: None
    to_empty, clip = torch.nn.Module.to_empty, ClipGradients.after_train_batch

    def to_empty_cpu(self: torch.nn.Module, *, device: object, recurse: bool = True) -> torch.nn.Module:
        return to_empty(self, device=str(device).removeprefix("cuda:"), recurse=recurse)

    def mean_and_clip(self: ClipGradients, state: State, logger: Logger) -> None:
        for parameter in self.model.parameters():
            if hasattr(parameter, "to_local") and parameter.grad is not None:
                parameter.grad.div_(_sums_for_means())
        clip(self, state, logger)

    torch.nn.Module.to_empty, ClipGradients.after_train_batch = to_empty_cpu, mean_and_clip
    if before:
        before(*details)


@cache
def _sums_for_means() -> float:
    """How many times too large gloo's mean over ranks is: 1, or the number of ranks (pytorch issue 162338)."""
    mean = torch.zeros(1)
    dist.reduce_scatter_tensor(mean, torch.ones(dist.get_world_size()), op=dist.ReduceOp.AVG)
    return float(mean)
