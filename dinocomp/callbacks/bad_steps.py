"""Between backward and step: a step whose loss or gradient is not finite is not taken."""

import logging
from typing import Any

import torch
from composer import Callback, Logger, State

from dinocomp.callbacks.clip import ClipGradients
from dinocomp.distributed import any_rank
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

    Attributes:
        bad: whether the last step was.
        count: bad steps of the run so far.
        in_a_row: those at its end.
    """

    def __init__(self, model: DINOv2, clip: ClipGradients, max_in_a_row: int, lr: str = "optim.base_lr") -> None:
        self.model = model
        self.clip = clip
        self.max_in_a_row = max_in_a_row
        self.lr = lr
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
        terms, norms = self.model.terms, self.clip.norms
        values = torch.stack([value.float().reshape(()) for value in (*terms.values(), *norms.values())])
        bad_here = not bool(torch.isfinite(values).all())
        self.bad = any_rank(bad_here)
        if not self.bad:
            self.in_a_row = 0
            return
        for parameter in self.model.parameters():
            parameter.grad = None
        self.count += 1
        self.in_a_row += 1
        iteration = int(state.timestamp.batch) + 1
        seen = ", ".join(f"{name} {value:.4g}" for name, value in zip((*terms, *norms), values.tolist(), strict=True))
        seen = seen if bad_here else "of another process"
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
