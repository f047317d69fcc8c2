"""Around the forward passes of a step: what micro-batches have to know of each other, and what is done with."""

import torch
from composer import Callback, Logger, State
from composer.core import get_precision_context

from dinocomp.data import split_batch
from dinocomp.method import DINOv2


class MicroBatches(Callback):
    """Shows the whole batch to the model before its micro-batches are trained on, one after the other.

    Composer fires the first event again where it starts a batch anew because its micro-batches did not fit in memory.
    """

    def __init__(self, model: DINOv2) -> None:
        self.model = model

    def before_train_batch(self, state: State, logger: Logger) -> None:
        torch.compiler.cudagraph_mark_step_begin()  # CUDA graphs may write over what they gave in the last step
        parts = split_batch(state.batch, state.device_train_microbatch_size)
        with get_precision_context(state.precision, state.precision_config):
            self.model.begin_step(parts, state.device.batch_to_device)

    def after_loss(self, state: State, logger: Logger) -> None:
        state.outputs = None  # Composer keeps logits and targets until the next forward pass has made its own
