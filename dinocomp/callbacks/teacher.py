"""After each optimizer step: the teacher follows the student."""

from composer import Callback, Logger, State

from dinocomp.method import DINOv2


class UpdateTeacher(Callback):
    """Updates the teacher and the centres once an optimizer step, before evaluation and checkpoints see them."""

    def __init__(self, model: DINOv2) -> None:
        self.model = model

    def batch_end(self, state: State, logger: Logger) -> None:
        self.model.update_teacher()
