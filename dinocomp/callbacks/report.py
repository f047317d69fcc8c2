"""While training: `run.json`, the facts of the run as it stands, and `report.html`, the run on one page."""

import json
import logging
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist

from dinocomp.callbacks.stop import StopOnSignal

log = logging.getLogger(__name__)

FACTS = "run.json"
_LOOK = 1.0  # seconds between looks at what is new: a file system over a network takes its time
_PERIOD = 60.0  # seconds between pages where there are new lines of metrics alone
_SHARE = 100  # times as long as a page took is waited before the next
_AT_ONCE = ("evaluation.jsonl", "teacher.safetensors")  # written at evaluations and checkpoints
_NOW_AND_THEN = "metrics.jsonl"


class Report(Callback):
    """Keeps a run's page up to date, on rank 0 alone; comes last, so that it sees what the others wrote.

    A page is written at the start and the end, after evaluations and checkpoints, and once a minute where there are new
    metrics; but for the first and the last it takes no more than about a hundredth of the time. What goes wrong here is
    a warning: training does not depend on it.

    Args:
        folder: the run's.
        facts: of the run, for `run.json`, that stay as they are; `iterations` among them.
        stop: tells a run that was stopped from a finished one.
        page: whether to write `report.html`; `run.json` is written anyway.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], stop: StopOnSignal, *, page: bool = True) -> None:
        self.folder = folder
        self.facts = {"command": "", "status": "running", "started": "", "updated": "", "iteration": 0, **facts}
        self.stop = stop
        self.page = page
        self.looked = self.written = time.monotonic()
        self.took = 0.0  # seconds, for the last page
        self.seen: dict[str, int] = {}  # of each file, when it was changed
        self.complained = False

    def fit_start(self, state: State, logger: Logger) -> None:
        self._update("running", int(state.timestamp.batch))

    def batch_end(self, state: State, logger: Logger) -> None:
        now = time.monotonic()
        if dist.get_global_rank() != 0 or now - self.looked < _LOOK:
            return
        self.looked = now
        waited = now - self.written
        if waited < _SHARE * self.took:
            return
        new = {name for name, changed in self._changes().items() if changed != self.seen.get(name)}
        if new.intersection(_AT_ONCE) or (new and waited >= _PERIOD):
            self._update("running", int(state.timestamp.batch))

    def fit_end(self, state: State, logger: Logger) -> None:
        """Also for a run whose training had ended."""
        self._update("stopped" if self.stop.requested else "finished", int(state.timestamp.batch))

    def fail(self, error: BaseException, iteration: int) -> None:
        """Says that the run was left by an error."""
        first = (str(error).splitlines() or [""])[0]
        name = type(error).__name__
        self.facts["error"] = f"{name}: {first}" if first else name
        self._update("failed", iteration)

    def _changes(self) -> dict[str, int]:
        found = {}
        for name in (*_AT_ONCE, _NOW_AND_THEN):
            try:
                found[name] = (self.folder / name).stat().st_mtime_ns
            except OSError:  # not there yet
                continue
        return found

    def _update(self, status: str, iteration: int) -> None:
        if dist.get_global_rank() != 0:
            return
        self.seen = self._changes()
        began = time.monotonic()
        try:
            self._write(status, iteration)
            self.complained = False
        except Exception as error:  # a page is never worth a run, whatever is wrong with it
            if not self.complained:
                log.warning("the run's page in %s cannot be written: %s: %s", self.folder, type(error).__name__, error)
                log.debug("this is why", exc_info=True)
            self.complained = True
        self.written = time.monotonic()
        self.took = self.written - began

    def _write(self, status: str, iteration: int) -> None:
        from dinocomp.report import write_page, write_report  # not for those who write none

        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        started = self.facts["started"] or _started(self.folder / FACTS) or now
        self.facts |= {"status": status, "started": started, "updated": now, "iteration": iteration}
        write_page(self.folder / FACTS, json.dumps(self.facts, indent=2) + "\n")
        if self.page:
            write_report(self.folder)


def _started(path: Path) -> str:
    """When the run began, of which this process may be a later one."""
    try:
        return str(json.loads(path.read_text())["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
