"""Between backward and step: gradients are clipped, each network by itself."""

import torch
from composer import Callback, Logger, State
from torch import Tensor, nn

from dinocomp.method import DINOv2


class ClipGradients(Callback):
    """Scales the gradients of each student network so that their joint L2 norm is at most `max_norm`.

    Args:
        max_norm: 0 measures and clips nothing.

    Attributes:
        norms: of each network in the last step, before clipping.
    """

    def __init__(self, model: DINOv2, max_norm: float) -> None:
        self.model = model
        self.max_norm = max_norm
        self.norms: dict[str, Tensor] = {}

    def after_train_batch(self, state: State, logger: Logger) -> None:
        limit = self.max_norm or float("inf")
        self.norms = {name: self._clip(name, shell, limit) for name, shell in self.model.shells("student").items()}

    def _clip(self, name: str, shell: nn.Module, limit: float) -> Tensor:
        if name == "backbone" and self.model.frozen_backbone:
            return next(iter(self.model.terms.values())).new_zeros(())  # it has no gradients to take a norm of
        return _clip(shell, limit)


def _clip(network: nn.Module, limit: float) -> Tensor:
    if hasattr(network, "clip_grad_norm_"):  # of FSDP, where torch's function sees this rank's share alone
        return network.clip_grad_norm_(limit)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of FSDP2, whose gradients are DTensors
