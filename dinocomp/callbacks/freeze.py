"""In the first steps of a run from pretrained weights: the heads learn, the backbone stays."""

import torch.distributed as dist
from composer import Callback, Logger, State
from torch.nn.parallel import DistributedDataParallel

from dinocomp.distributed import all_reduce
from dinocomp.method import DINOv2
from dinocomp.optim import begin_averages


class FreezeBackbone(Callback):
    """Leaves the student's backbone without gradients for the first `until` iterations.

    Fresh heads send gradients that say nothing yet; they would spoil weights that are good. No backward pass through
    the backbone is computed meanwhile, and the optimizer's averages of it begin behind it.

    Args:
        until: iterations; 0 freezes nothing.
    """

    def __init__(self, model: DINOv2, until: int) -> None:
        self.model = model
        self.until = until

    def fit_start(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) < self.until:
            for optimizer in state.optimizers:
                begin_averages(optimizer)

    def batch_start(self, state: State, logger: Logger) -> None:
        self.model.frozen_backbone = int(state.timestamp.batch) < self.until
        if isinstance(state.model, DistributedDataParallel):
            # It would wait for the backbone's gradients; those of the heads are added up below.
            state.model.require_backward_grad_sync = not self.model.frozen_backbone

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if not (self.model.frozen_backbone and isinstance(state.model, DistributedDataParallel)):
            return
        for network in self.model.networks("student").values():
            for parameter in network.parameters():
                if parameter.grad is not None:
                    all_reduce(parameter.grad).div_(dist.get_world_size())
