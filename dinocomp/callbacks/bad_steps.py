"""Between backward and step: a step whose loss or gradient is not finite is not taken."""

import logging
import math
from typing import Any

import torch
from composer import Callback, Logger, State
from torch import Tensor

from dinocomp.callbacks.clip import ClipGradients
from dinocomp.distributed import all_reduce, any_rank
from dinocomp.errors import TrainingError
from dinocomp.method import DINOv2

log = logging.getLogger(__name__)

_WHAT_TO_TRY = (
    "Lower {lr} or raise optim.warmup_epochs; type optim.clip_grad=1; with fp16, type recipes=[bf16] or "
    "dino.koleo_loss_weight=0; look at pictures/first_batch.png for broken images"
)


class SkipBadSteps(Callback):
    """Drops the gradients of a bad step on all ranks together, so that the optimizer moves nothing.

    The step is bad where the loss of any rank or the gradient norm of any network is not finite. Runs behind
    `ClipGradients`, which measures the norms. Also keeps fp16's gradient scale in checkpoints.

    Args:
        max_in_a_row: raise after so many; 0 never does.
        lr: the key that sets the learning rate.
        deferred: do not wait for the device between backward and step: the optimizer, a fused one, is told on the
            device what was found, and leaves weights and averages as they are. It is read when the step is over.

    Attributes:
        bad: whether the last step was.
        count: bad steps of the run so far.
        in_a_row: those at its end.
    """

    def __init__(
        self,
        model: DINOv2,
        clip: ClipGradients,
        max_in_a_row: int,
        lr: str = "optim.base_lr",
        *,
        deferred: bool = False,
    ) -> None:
        self.model = model
        self.clip = clip
        self.max_in_a_row = max_in_a_row
        self.lr = lr
        self.deferred = deferred
        self._found: _Copy | None = None
        self.bad = False
        self.count = self.in_a_row = 0
        self._scaler: Any = None
        self._scale, self._growth = 0.0, 0  # of fp16's gradient scaler, as they were saved; 0 for none

    def init(self, state: State, logger: Logger) -> None:
        # Composer saves the scaler under the name of its class, which differs with strategy and precision: a sharded
        # state saved with one is refused by another. It is kept here instead, always under the same names.
        state.serialized_attributes = [name for name in state.serialized_attributes if name != "scaler"]

    def fit_start(self, state: State, logger: Logger) -> None:
        self._scaler = state.scaler
        numbers = state.scaler.state_dict() if state.scaler else {}  # nothing, where it is off
        if numbers and self._scale:
            state.scaler.load_state_dict({**numbers, "scale": self._scale, "_growth_tracker": self._growth})

    def state_dict(self) -> dict[str, Any]:
        numbers = self._scaler.state_dict() if self._scaler else {}
        return {
            "count": self.count,
            "in_a_row": self.in_a_row,
            "scale": float(numbers.get("scale", self._scale)),
            "growth_tracker": int(numbers.get("_growth_tracker", self._growth)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.in_a_row = int(state["count"]), int(state["in_a_row"])
        self._scale, self._growth = float(state.get("scale", 0.0)), int(state.get("growth_tracker", 0))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        values = torch.stack([value.float().reshape(()) for value in self._values().values()])
        if self.deferred:
            bad = all_reduce((~torch.isfinite(values).all()).float(), "max")
            for optimizer in state.optimizers:
                optimizer.found_inf = bad  # as fp16's gradient scaler tells it
            self._found = _Copy(torch.cat([bad[None], values]))
            return
        bad_here = not bool(torch.isfinite(values).all())
        self.bad = any_rank(bad_here)
        if self.bad:
            for parameter in self.model.parameters():
                parameter.grad = None
        self._judge(int(state.timestamp.batch) + 1, values.tolist() if bad_here else [])

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._found is None:
            return
        (bad, *values), self._found = self._found.numbers(), None
        self.bad = bool(bad)
        bad_here = not all(math.isfinite(value) for value in values)
        self._judge(int(state.timestamp.batch), values if bad_here else [])

    def _values(self) -> dict[str, Tensor]:
        return {**self.model.terms, **self.clip.norms}

    def _judge(self, iteration: int, values: list[float]) -> None:
        """What becomes of `bad`; `values` that are not all finite, or none where they are those of another process."""
        if not self.bad:
            self.in_a_row = 0
            return
        self.count += 1
        self.in_a_row += 1
        seen = "of another process"
        if values:
            seen = ", ".join(f"{name} {value:.4g}" for name, value in zip(self._values(), values, strict=True))
        log.warning(
            "iteration %d: loss or gradient is not finite (%s): step skipped (%d so far, %d in a row)",
            iteration,
            seen,
            self.count,
            self.in_a_row,
        )
        if self.max_in_a_row and self.in_a_row >= self.max_in_a_row:
            raise TrainingError(
                f"{self.in_a_row} steps in a row up to iteration {iteration} had a loss or gradient that is not finite "
                f"(optim.max_bad_steps={self.max_in_a_row}); the last: {seen}. Weights and checkpoints are as before "
                f"them. {_WHAT_TO_TRY.format(lr=self.lr)}. The run then goes on from its newest checkpoint, if it has "
                "one; should it end like this again, move that one away to go on from the one before."
            )


class _Copy:
    """Numbers of a device on their way to the CPU. Who asks for them waits for them, not for what came after."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if numbers.is_cuda else None
        if self._arrived:
            self._arrived.record()

    def numbers(self) -> list[float]:
        if self._arrived:
            self._arrived.synchronize()
        return self._numbers.tolist()
