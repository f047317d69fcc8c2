"""After each optimizer step: the teacher follows the student."""

from composer import Callback, Logger, State

from dinocomp.callbacks.bad_steps import SkipBadSteps
from dinocomp.method import DINOv2

_TIDY = 1000  # iterations between


class UpdateTeacher(Callback):
    """Updates the teacher and the centres once an optimizer step, before evaluation and checkpoints see them.

    After a step that was not taken they stay as they are, and what its batch would have told the centres is forgotten.
    """

    def __init__(self, model: DINOv2, bad_steps: SkipBadSteps) -> None:
        self.model = model
        self.bad_steps = bad_steps

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.bad_steps.bad:
            self.model.forget_batch()
        else:
            self.model.update_teacher()
        if int(state.timestamp.batch) % _TIDY == 0:
            without_backward = [*self.model.shells("teacher").values(), *self.model.shells("target").values()]
            if self.model.frozen_backbone:
                without_backward.append(self.model.student_backbone)
            for shell in without_backward:
                shell.forget_forwards()
