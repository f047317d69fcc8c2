"""Every few official epochs, at the end, and when a signal asks for it: a checkpoint with the teacher beside it."""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from composer import Callback, Logger, State
from composer.utils import dist, save_checkpoint
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from dinocomp.callbacks.bad_steps import SkipBadSteps
from dinocomp.callbacks.stop import StopOnSignal
from dinocomp.checkpoints.folder import (
    STATE,
    TEACHER,
    begin,
    discard,
    gather_shares,
    list_checkpoints,
    partial_of,
    publish,
    set_aside,
    sweep,
)
from dinocomp.checkpoints.manifest import iteration_of
from dinocomp.checkpoints.shapes import what_failed
from dinocomp.checkpoints.uploads import Uploads
from dinocomp.distributed import on_rank_0
from dinocomp.errors import TrainingError

log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Saves Composer's checkpoints as folders that appear only once they are whole.

    Composer's own saver writes under the final name, so that a killed run leaves half a file that looks finished, and
    it prunes only what its own process wrote. Here the folders on the disk count, whoever wrote them.

    Args:
        folder: where checkpoints go.
        interval: iterations between them; the last iteration has one, too.
        total: iterations of the run.
        expired: from the iterations of all checkpoints to those that may be deleted; never the newest.
        export_teacher: gives what writes the teacher, of an iteration, to a path; all ranks call it.
        latest_teacher: where the newest checkpoint's teacher is also found.
        damaged: those that resuming has passed over; they are put aside.
        bad_steps: puts off a checkpoint while steps are skipped.
        stop: asks for a checkpoint at any iteration.
        copies: to an object store, or None.
        on_failure: `raise` to stop where a checkpoint cannot be written, `warn` to go on without it. The last
            checkpoint of a process is always insisted on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        interval: int,
        total: int,
        expired: Callable[[Sequence[int]], list[int]],
        export_teacher: Callable[[], Callable[[Path, int], None]],
        latest_teacher: Path,
        damaged: Sequence[Path],
        bad_steps: SkipBadSteps,
        stop: StopOnSignal,
        copies: Uploads | None = None,
        on_failure: str = "raise",
    ) -> None:
        self.folder = folder
        self.interval = interval
        self.total = total
        self.expired = expired
        self.export_teacher = export_teacher
        self.latest_teacher = latest_teacher
        self.damaged = damaged
        self.bad_steps = bad_steps
        self.stop = stop
        self.copies = copies
        self.on_failure = on_failure
        self.owed = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Also for a run whose training had ended: settles what a process left that was killed while it saved."""
        if dist.get_global_rank() == 0:
            sweep(self.folder)
            for path in self.damaged:
                if path.is_dir():
                    aside = set_aside(path)
                    log.warning("the damaged checkpoint %s is now %s; delete it when you like", path, aside.name)
            there = list_checkpoints(self.folder)
            if self.copies:
                self.copies.add_missing(there)
            if there:
                self._settle(there[-1])
        dist.barrier()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        finished = int(state.timestamp.batch)
        is_last = finished == self.total or self.stop.requested
        self.owed = self.owed or finished % self.interval == 0
        if not is_last and (not self.owed or self.bad_steps.in_a_row):
            return  # weights between bad steps may be about to break: the next good step has the checkpoint
        self.owed = False
        failure = self._save(state, finished)
        if not failure:
            return
        kept = list_checkpoints(self.folder)
        message = (
            f"the checkpoint of iteration {finished} could not be written to {self.folder}: {failure}. "
            f"{f'The one before it is whole: {kept[-1].name}' if kept else 'There is no earlier one'}. "
            f"{shutil.disk_usage(self.latest_teacher.parent).free / 1e6:,.0f} MB are free there; while one is written "
            "there is one more than checkpoint.max_to_keep. Make room (disk or quota), or keep fewer"
        )
        if is_last or self.on_failure == "raise":
            raise TrainingError(f"{message}; then give the same command again.")
        log.warning("%s; training goes on, and the next is due at iteration %d", message, finished + self.interval)

    def _save(self, state: State, finished: int) -> str:
        """Writes a checkpoint; gives, on all ranks, why that failed, or ""."""
        partial, first = partial_of(self.folder, finished), dist.get_global_rank() == 0
        # Before the other ranks wait for what rank 0 writes.
        if failure := on_rank_0(lambda: _failure(lambda: begin(self.folder, finished))):
            return failure
        write_teacher = self.export_teacher()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch's own use of it, for shares
            # Where each rank writes its share, an error that torch has not told all ranks of must end this one: the
            # others wait for it.
            expected = CheckpointException if state.fsdp_sharded_state_dict_enabled else _UNWRITTEN
            failure = _failure(lambda: save_checkpoint(state, str(partial / STATE)), expected)
        if failure:
            # The other ranks wait in the barrier at the end of save_checkpoint: they write nothing, or, where each
            # writes its share, have all failed like this one.
            dist.barrier()
        dist.barrier()  # Composer has looked on every rank whether its share is where it was written
        if first:
            failure = failure or _failure(lambda: self._publish(partial, finished, write_teacher))
            if failure:
                shutil.rmtree(partial, ignore_errors=True)
        return on_rank_0(lambda: failure)

    def _publish(self, partial: Path, finished: int, write_teacher: Callable[[Path, int], None]) -> None:
        gather_shares(partial)
        write_teacher(partial / TEACHER, finished)
        path = publish(partial, dist.get_world_size())
        log.info("checkpoint: %s", path)
        if self.copies:
            self.copies.add(path)
        self._settle(path)

    def _settle(self, newest: Path) -> None:
        """What comes after a checkpoint, and is no reason to stop."""
        try:
            _link(newest / TEACHER, self.latest_teacher)
            there = {iteration_of(path): path for path in list_checkpoints(self.folder)}
            for iteration in self.expired(list(there)):
                if not self.copies or self.copies.withdraw(there[iteration]):
                    discard(there[iteration])
        except OSError as error:
            log.warning("%s is whole, but what follows it failed (%s); it is tried again with the next", newest, error)


_UNWRITTEN = (OSError, RuntimeError, SafetensorError)


def _failure(action: Callable[[], object], expected: type | tuple[type, ...] = _UNWRITTEN) -> str:
    """Why `action`, which writes files, fails; "" if it does not."""
    try:
        action()
    except expected as error:
        if isinstance(error, CheckpointException):
            return what_failed(error)
        # torch goes on after a full disk, and trips over what it could not write.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        return f"{type(cause).__name__}: {cause}"
    return ""


def _link(file: Path, name: Path) -> None:
    """Makes `name` the same as `file` without room of its own, where the file system can."""
    partial = name.with_name(f".{name.name}.partial")
    partial.unlink(missing_ok=True)
    if name.exists() and name.samefile(file):
        return
    try:
        os.link(file, partial)
    except OSError:
        shutil.copyfile(file, partial)
    partial.replace(name)
