"""Copies checkpoints to an object store behind the training's back, through outages of any length."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dinocomp.checkpoints.manifest import MANIFEST, DamagedError, folder_name, iteration_of, read_manifest
from dinocomp.checkpoints.remote import RemoteFolder
from dinocomp.checkpoints.store import cause_of, is_refused

log = logging.getLogger(__name__)


class Uploads:
    """A queue of local checkpoints, and a thread that copies them one after another, oldest first.

    A copy that fails is tried again for as long as the process lives, after longer and longer waits; one warning tells
    when that begins and one message when it is over. What is queued are folders on disk, not their bytes, so that the
    queue is bounded by local retention, which asks `withdraw` before it deletes one. After each copy, old checkpoints
    there are deleted.

    The thread is a daemon and starts no others, so that it neither outlives nor delays the end of the process. Data
    workers may be forked at any time: they never touch it.

    Args:
        remote: where to; its `check` has been called.
        expired: gives, for the iterations of the checkpoints there, those to be deleted.
        run_files: the run's small files, copied with each checkpoint where they exist.
        first_wait: seconds before the first new try.
        longest_wait: most seconds between two tries.
    """

    def __init__(
        self,
        remote: RemoteFolder,
        *,
        expired: Callable[[Sequence[int]], Sequence[int]],
        run_files: Sequence[Path] = (),
        first_wait: float = 1,
        longest_wait: float = 60,
    ) -> None:
        self._remote = remote
        self._expired = expired
        self._run_files = run_files
        self._first_wait = first_wait
        self._longest_wait = longest_wait
        self._random = random.Random()  # the global one belongs to the training, whose state is saved
        self._changed = threading.Condition()  # guards everything below
        self._queue: list[Path] = []
        self._busy: Path | None = None  # the one whose files are being read now
        self._lost: dict[str, str] = {}  # damaged or gone before they were copied, with the reason
        self._failures = 0  # in a row
        self._trouble = ""  # reason of the last failure; '' when all is well
        self._refused = False  # whether that was a refusal
        self._since = 0.0  # when the trouble began
        self._ending = False  # nothing comes after what is queued
        self._stopped = False
        self._finished = False
        self._unpruned = 0  # failures to prune, in a row
        self._prune_warned = False
        self._swept = False  # whether parts that killed processes left have been thrown away
        threading.Thread(target=self._work, name="uploads", daemon=True).start()

    @property
    def pending(self) -> list[str]:
        """Names of the checkpoints that are not there yet."""
        with self._changed:
            return [folder.name for folder in self._queue]

    def add(self, folder: Path) -> None:
        """Queue the whole local checkpoint `folder`, unless it is queued."""
        with self._changed:
            if folder not in self._queue:
                self._queue.append(folder)
                self._changed.notify_all()

    def add_missing(self, folders: Iterable[Path]) -> None:
        """Queue those of the whole local checkpoints `folders` that are not there yet, such as a killed run leaves."""
        for folder in sorted(folders):  # the thread finds out which are there
            self.add(folder)

    def withdraw(self, folder: Path) -> bool:
        """Take `folder` from the queue, for it is about to be deleted. False: it is being copied; ask again later."""
        with self._changed:
            if folder == self._busy:
                return False
            if folder in self._queue:
                self._queue.remove(folder)
            return True

    def finish(self, timeout: float, go_on: Callable[[], bool] = lambda: True) -> list[str]:
        """Wait until all is copied, the run's files as they are now included, or `timeout` seconds are over.

        Nothing more is begun afterwards; what is being tried at that moment may still come through.

        Args:
            go_on: asked about once a second; the waiting ends where it says no.

        Returns:
            What is missing there, each with the reason; empty if nothing is.
        """
        with self._changed:
            self._ending = True
            self._failures = 0  # try at once
            self._changed.notify_all()
            end = time.monotonic() + timeout
            while go_on() and not self._changed.wait_for(lambda: self._finished, min(1, end - time.monotonic())):
                if time.monotonic() >= end:
                    break
            self._stopped = True
            self._changed.notify_all()
            reason = self._trouble or f"not copied within {timeout:g} s"
            missing = [f"{name}: {lost}" for name, lost in self._lost.items()]
            missing += [f"{folder.name}: {reason}" for folder in self._queue]
            if self._run_files and not self._finished:
                missing.append(f"{', '.join(path.name for path in self._run_files)}: {reason}")
            return missing

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._failures:
                    self._changed.wait_for(lambda: self._stopped or not self._failures, self._pause())
                self._changed.wait_for(lambda: self._queue or self._ending)
                if self._stopped:
                    return
                folder = self._busy = self._queue[0] if self._queue else None
            copied, error = False, None
            try:
                copied = self._copy(folder)
            except Exception as raised:
                error = raised
            if isinstance(error, DamagedError):
                log.error("%s is not copied to %s: %s", folder.name, self._remote.address, error)
            else:
                self._tell(error)
            with self._changed:
                self._busy = None
                if isinstance(error, DamagedError):
                    self._lost[folder.name] = str(error)
                elif error is not None:
                    continue  # it stays in the queue while we wait, where it may be withdrawn
                self._queue = [queued for queued in self._queue if queued != folder]
                self._finished = folder is None
                self._changed.notify_all()
            if self._finished:
                return
            if copied:
                self._prune(iteration_of(folder))

    def _pause(self) -> float:
        longest = min(self._longest_wait, self._first_wait * 2 ** min(self._failures - 1, 30))
        return longest * self._random.uniform(0.5, 1)  # many runs must not come back to a store at once

    def _copy(self, folder: Path | None) -> bool:
        """Copy the run's files, and the checkpoint `folder` if there is one. Gives False if that was there already."""
        if folder is not None:
            read_manifest(folder)
            if self._remote.holds(folder):
                return False
        for path in self._run_files:
            if path.is_file():
                self._remote.upload_file(path, path.name)
        if folder is not None:
            self._remote.upload(folder)
            log.info("copied: %s/checkpoints/%s", self._remote.address, folder.name)
        return True

    def _tell(self, error: Exception | None) -> None:
        """Keep count of an outage. Warns when it begins and when its reason turns to a refusal, and tells its end."""
        if error is None:
            if self._trouble:
                log.info("copies to %s work again, after %.0f s", self._remote.address, time.monotonic() - self._since)
            self._failures, self._trouble, self._refused = 0, "", False
            return
        refused = is_refused(error)
        cause = cause_of(error)
        if refused and not self._refused:
            log.warning(
                "checkpoints cannot be copied to %s: %s. The store refuses, which will not pass by itself: %s. "
                "Training goes on; copies are tried again until they work",
                *(self._remote.address, cause, self._remote.advice(error)),
            )
        elif not self._trouble:
            log.warning(
                "checkpoints cannot be copied to %s: %s. Training goes on; copies are tried again until they work",
                *(self._remote.address, cause),
            )
        if not self._trouble:
            self._since = time.monotonic()
        with self._changed:
            self._failures += 1
            self._trouble, self._refused = cause, refused

    def _prune(self, newest: int) -> None:
        """Delete what retention lets go there, and what killed runs left half-copied.

        Newer checkpoints than the one just copied are of another run or of a past that was given up: they neither count
        nor go, or they would have the new ones deleted.
        """
        if not self._remote.prunes:
            return
        try:
            if not self._swept:
                self._remote.abort_parts()
                self._swept = True
            there = {i: names for i, names in self._remote.listing().items() if i <= newest}
            whole = sorted(iteration for iteration, names in there.items() if MANIFEST in names)
            queued = self.pending
            halves = [i for i in there if i not in whole and folder_name(i) not in queued]
            for iteration in (*self._expired(whole), *halves):
                self._remote.delete(iteration)
        except Exception as error:
            # Once may be the beginning of an outage, of which the next copy tells.
            self._unpruned += 1
            if not self._prune_warned and (is_refused(error) or self._unpruned > 1):
                log.warning(
                    "old checkpoints in %s cannot be deleted: %s. It is tried again after each copy",
                    *(self._remote.address, cause_of(error)),
                )
                self._prune_warned = True
        else:
            self._unpruned, self._prune_warned = 0, False
