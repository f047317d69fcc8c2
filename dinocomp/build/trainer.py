"""Composer's Trainer, without the five times a step at which it waits for the device."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from composer import Trainer
from composer.core import Event, TrainerMode
from composer.utils import dist

from dinocomp.data import Batch
from dinocomp.errors import ConfigError

_REPLACED = (
    "_iter_dataloader",
    "_use_closures",
    "_train_batch",
    "_train_microbatches",
    "_accumulate_time_across_ranks",
)
_CALLED = ("_train_microbatch", "_use_grad_scaling")


class AsyncTrainer(Trainer):
    """Launches a step without reading anything back from the device.

    Composer reads: whether any rank is out of data, how many images all ranks have, the loss (twice), and how long the
    step took. Each read waits until the device has done all it was given, and leaves it with nothing to do until Python
    has launched more. Here every rank has as many images as every other and never runs out of them, so all but the loss
    is known; the loss is among dinocomp's own metrics, which are read every few steps.

    What is replaced and called are private methods: the constructor refuses a Composer that has others.

    Raises:
        ConfigError: this version of Composer works otherwise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        missing = [name for name in (*_REPLACED, *_CALLED) if not hasattr(Trainer, name)]
        if missing:
            raise ConfigError(
                f"performance.async_step=true does not know this version of Composer, which has no {missing[0]}. "
                "Type performance.async_step=false."
            )
        super().__init__(*args, **kwargs)

    def _iter_dataloader(self, trainer_mode: TrainerMode) -> Iterator[Batch]:
        batches = iter(self.state.dataloader)
        while True:
            self.engine.run_event(Event.BEFORE_DATALOADER)
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def _use_closures(self) -> bool:
        return False  # Composer's closure gives the optimizer the loss as a number, which it makes no use of

    def _train_batch(self, use_grad_scaling: bool) -> None:
        super()._train_batch(use_grad_scaling)
        return None  # what Composer's loop takes to mean that there is no loss to read and log

    def _train_microbatches(self, microbatches: Sequence[Batch], total_loss_dict: Any, ddp_sync: bool = True) -> None:
        self.engine.run_event(Event.BEFORE_TRAIN_BATCH)
        use_grad_scaling = self._use_grad_scaling(self.state.precision, self.state.scaler)
        for optimizer in self.state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        images = sum(len(batch["index"]) for batch in microbatches)
        whole = self.state.batch
        for i, batch in enumerate(microbatches):
            self.state.batch = self.state.device.batch_to_device(batch)
            self._train_microbatch(use_grad_scaling, images, i + 1 == len(microbatches))
        self.state.batch = whole
        if use_grad_scaling:
            for optimizer in self.state.optimizers:
                self.state.scaler.unscale_(optimizer)
        self.engine.run_event(Event.AFTER_TRAIN_BATCH)

    def _accumulate_time_across_ranks(
        self, num_samples: int, num_tokens: int, batch_time: timedelta
    ) -> tuple[int, int, timedelta]:
        return num_samples * dist.get_world_size(), num_tokens * dist.get_world_size(), batch_time
