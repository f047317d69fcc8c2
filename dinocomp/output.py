"""The folder that a run writes to: taken for one run at a time, with its log and its configuration."""

import logging
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dinocomp.config import Config, to_yaml
from dinocomp.errors import ConfigError

LOG = "train.log"
CONFIG = "config.yaml"
_LAST_BREATH = 8  # seconds that a killed run's data workers may still hold its lock
# Copied with each checkpoint: small, but for the page's few megabytes.
RUN_FILES = (CONFIG, "metrics.jsonl", "evaluation.jsonl", LOG, "run.json", "report.html")


@contextmanager
def open_output(folder: Path) -> Iterator[None]:
    """Makes the folder, keeps other runs out of it and logs to it, until the end of the context. On rank 0 only.

    The lock is the kernel's: it is gone with the process, however that ends.

    Raises:
        ConfigError: the folder cannot be written to, or another run is at work in it.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_LAST_BREATH)
        _start_log(folder / LOG)
    except Timeout as error:
        raise ConfigError(
            f"another run is at work in train.output_dir={folder}. Wait for its end, stop it, or give another folder."
        ) from error
    except OSError as error:
        raise ConfigError(f"train.output_dir={folder} cannot be written to: {error}; give another one") from error
    try:
        yield
    except BaseException:
        logging.getLogger("dinocomp").debug("the run was left by an error", exc_info=True)
        raise
    finally:
        _stop_log()
        lock.release()


def keep_config(
    folder: Path, config: Config, *, made_of: str, changed_at: int | None, chosen: Sequence[str] = ()
) -> None:
    """Writes the run's configuration; an earlier one, with which it went until now, stays under another name.

    Args:
        made_of: the command, for the top of the file.
        changed_at: the iteration from which on the configuration is another, if it is.
        chosen: a line for each value that was given as `auto`.
    """
    path = folder / CONFIG
    header = f"Made by: {made_of}\nThis file alone reproduces the run."
    if changed_at is not None:
        until = folder / f"config-until-{changed_at:08d}.yaml"
        if not until.exists():  # else an earlier try from here has put it there, and got no further
            copy = until.with_suffix(".partial")
            shutil.copyfile(path, copy)
            copy.replace(until)
        header += f"\nUp to iteration {changed_at} it was another: {until.name}"
    header += "".join(f"\nauto: {line}" for line in chosen)
    partial = path.with_suffix(".partial")
    partial.write_text(to_yaml(config, header=header))
    partial.replace(path)


class _Terminal(logging.StreamHandler):
    """Clears the moving progress line before a message."""

    def format(self, record: logging.LogRecord) -> str:
        clear = "\r\x1b[2K" if self.stream.isatty() else ""
        return clear + super().format(record)


class _Words(logging.Formatter):
    """Says which messages are warnings."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record.message = f"warning: {record.message}"
        return super().formatMessage(record)


class _File(logging.FileHandler):
    """Says once, instead of a traceback for every line, that the disk is full."""

    complained = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.complained:
            print(f"warning: {self.baseFilename} cannot be written to: {sys.exc_info()[1]}", file=sys.stderr)
        self.complained = True


def _start_log(path: Path) -> None:
    """Messages to the terminal; those, every progress line and the versions to the file."""
    import composer
    import torch

    from dinocomp import __version__

    to_file = _File(path)
    to_file.setFormatter(_Words("%(asctime)s %(message)s"))
    to_terminal = _Terminal(sys.stdout)
    to_terminal.setFormatter(_Words())
    to_terminal.setLevel(logging.INFO)
    log = logging.getLogger("dinocomp")
    log.setLevel(logging.DEBUG)
    log.handlers[:] = [to_file, to_terminal]
    log.debug(
        "dinocomp %s, python %s, torch %s, composer %s, %s",
        __version__,
        platform.python_version(),
        torch.__version__,
        composer.__version__,
        platform.platform(),
    )


def _stop_log() -> None:
    log = logging.getLogger("dinocomp")
    for handler in log.handlers[:]:
        handler.close()
        log.removeHandler(handler)
