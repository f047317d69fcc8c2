"""Every few official epochs: a checkpoint, the teacher beside it, and the old ones pruned."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

from composer import Callback, Logger, State
from composer.utils import dist, save_checkpoint

log = logging.getLogger(__name__)

NAME = re.compile(r"iteration-(\d+)\.pt")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("iteration-*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=iteration_of)


def iteration_of(path: Path) -> int:
    """Finished iterations of the checkpoint called `path`."""
    return int(NAME.fullmatch(path.name)[1])


class Checkpoints(Callback):
    """Saves Composer's checkpoints under a name that appears only once the file is whole.

    Composer's own saver writes under the final name, so that a killed run leaves half a file that looks finished, and
    it prunes only what its own process wrote. Here the files in the folder count, whoever wrote them.

    Args:
        folder: where checkpoints go.
        interval: iterations between them; the last iteration has one, too.
        max_to_keep: newest checkpoints that stay; 0 keeps all.
        total: iterations of the run.
        export_teacher: called with the iteration on rank 0 after each checkpoint.
    """

    def __init__(
        self, folder: Path, *, interval: int, max_to_keep: int, total: int, export_teacher: Callable[[int], None]
    ) -> None:
        self.folder = folder
        self.interval = interval
        self.max_to_keep = max_to_keep
        self.total = total
        self.export_teacher = export_teacher

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        finished = int(state.timestamp.batch)
        if finished % self.interval and finished != self.total:
            return
        path = self.folder / f"iteration-{finished:08d}.pt"
        partial = self.folder / f".partial-{path.name}"  # Composer goes by the suffix
        save_checkpoint(state, str(partial))
        if dist.get_global_rank() == 0:
            partial.replace(path)
            log.info("checkpoint: %s", path)
            self.export_teacher(finished)
            self._prune()
        dist.barrier()

    def _prune(self) -> None:
        if self.max_to_keep:
            for path in list_checkpoints(self.folder)[: -self.max_to_keep]:
                path.unlink(missing_ok=True)
        for leftover in self.folder.glob(".partial-iteration-*.pt"):
            leftover.unlink(missing_ok=True)
