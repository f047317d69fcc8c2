"""Around the forward passes of a step: what micro-batches have to know of each other, and what is done with."""

import torch
from composer import Callback, Logger, State
from composer.core import get_precision_context

from dinocomp.data import Batch, split_batch
from dinocomp.method import DINOv2


class MicroBatches(Callback):
    """Shows the whole batch to the model before its micro-batches are trained on, one after the other.

    Composer fires `before_train_batch` again where it begins a batch anew because its micro-batches did not fit.

    Args:
        graphs: whether what is compiled runs as CUDA graphs.
    """

    def __init__(self, model: DINOv2, *, graphs: bool = False) -> None:
        self.model = model
        self.graphs = graphs
        self._batch: Batch | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        self._batch = state.batch  # where a batch is begun anew, the state holds the micro-batch that did not fit

    def before_train_batch(self, state: State, logger: Logger) -> None:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # they may write over what they gave in the last step
        parts = split_batch(self._batch, state.device_train_microbatch_size)
        with get_precision_context(state.precision, state.precision_config):
            self.model.begin_step(parts, state.device.batch_to_device)

    def after_loss(self, state: State, logger: Logger) -> None:
        state.outputs = None  # Composer keeps logits and targets until the next forward pass has made its own
