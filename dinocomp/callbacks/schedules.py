"""Before each step: learning rates, weight decay, teacher temperature and momentum of the iteration."""

from collections.abc import Sequence

from composer import Callback, Logger, State

from dinocomp.method import DINOv2
from dinocomp.optim import Multipliers
from dinocomp.schedules import Schedules


class ApplySchedules(Callback):
    """Sets what the iteration uses in the optimizer's groups and in the model.

    Args:
        model: whose teacher temperature and momentum are set.
        multipliers: of each of the optimizer's groups, in their order.
    """

    def __init__(self, model: DINOv2, schedules: Schedules, multipliers: Sequence[Multipliers]) -> None:
        self.model = model
        self.schedules = schedules
        self.multipliers = list(multipliers)

    def batch_start(self, state: State, logger: Logger) -> None:
        values = self.schedules.at(int(state.timestamp.batch))
        # Read anew each time: sharding replaces the groups' dicts, and loading a checkpoint overwrites their values.
        for group, factor in zip(state.optimizers[0].param_groups, self.multipliers, strict=True):
            lr = values.backbone_lr if factor.is_backbone else values.lr
            group["lr"] = factor.lr * (values.last_layer_lr if factor.is_last_layer else lr)
            group["weight_decay"] = factor.weight_decay * values.weight_decay
        self.model.teacher_temp = values.teacher_temp
        self.model.momentum = values.momentum
