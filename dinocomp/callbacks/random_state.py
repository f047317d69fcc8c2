"""After a resume: the random numbers go on where they stopped."""

import warnings

from composer import Callback, Logger, State, Trainer
from composer.utils import reproducibility


class RestoreRandomState(Callback):
    """Restores the generators' states that a checkpoint holds.

    Composer reads them but, for a checkpoint inside an epoch whose dataset resumes by itself, never puts them back.
    This does so before the first batch, once the loader has drawn its own seed. `attach` it to the built Trainer.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self.trainer is not None and self.trainer._rng_state is not None:
            with warnings.catch_warnings():  # other world sizes and devices; the run's notes say so
                warnings.simplefilter("ignore")
                reproducibility.load_rng_state(self.trainer._rng_state)
            self.trainer._rng_state = None
