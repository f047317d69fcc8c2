"""What Composer's sharding asks of a network."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from dinocomp.models.block import Block


class Shell(nn.Module):
    """Calls the network it holds, and has no parameter of its own.

    Sharding makes each child of a ComposerModel a root unit, and a root keeps its gathered weights after a forward
    without gradient, which would hide the teacher's updates. Inside a shell the network is no root.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.unit: bool | dict[str, Any] = True  # how units are sharded: as all are, or with settings of their own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool | dict[str, Any]:
        """Which modules Composer makes units of sharding: the network, and each transformer block of it."""
        return self.unit if module is self.net or isinstance(module, Block) else False

    def free_weights(self) -> None:
        """Frees the gathered weights of sharded units that keep them for backward, where there will be none."""
        for module in self.net.modules():
            if hasattr(module, "reshard"):
                module.reshard()

    def forget_forwards(self) -> None:
        """Drops what sharded units note of each forward, to fetch weights ahead in backward: a teacher has none, and
        only backward would end those lists."""
        for module in self.modules():
            group = getattr(getattr(module, "_get_fsdp_state", lambda: None)(), "_fsdp_param_group", None)
            for notes in (
                getattr(group, "_post_forward_indices", None),
                getattr(getattr(group, "comm_ctx", None), "post_forward_order", None),
                getattr(getattr(module, "_exec_order_data", None), "handles_post_forward_order", None),
            ):
                if isinstance(notes, list):
                    notes.clear()

    def param_init_fn(self, module: nn.Module) -> None:
        """How Composer fills modules without memory: not at all, their weights come from rank 0."""


@torch.no_grad()
def whole_weights(shell: Shell) -> dict[str, Tensor]:
    """The tensors of the network in a shell, by name. Those of a sharded one are gathered one by one, for which all
    ranks must call this, and come to the CPU of rank 0 alone."""
    weights = {}
    for name, weight in get_model_state_dict(shell).items():
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()  # all ranks take part
            if dist.get_rank() != 0:
                continue
            weight = weight.cpu()
        weights[name.removeprefix("net.")] = weight
    return weights
