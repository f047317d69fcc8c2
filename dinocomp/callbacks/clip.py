"""Between backward and step: gradients are clipped, each network by itself."""

import torch
from composer import Callback, Logger, State
from torch import Tensor

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
        self.norms = {
            name: torch.nn.utils.clip_grad_norm_(net.parameters(), limit)
            for name, net in self.model.networks("student").items()
        }
