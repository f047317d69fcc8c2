"""Pages as files, which appear whole or not at all."""

from pathlib import Path

from dinocomp.report.page import render
from dinocomp.report.record import read_run

PAGE = "report.html"


def write_page(path: Path, text: str) -> None:
    """Writes `text`, in place of what is there. Raises OSError where that is impossible."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", errors="replace")
    partial.replace(path)


def write_report(folder: Path, path: Path | None = None) -> Path:
    """Writes the page of the run in `folder`, to `path` or to `report.html` in it. Gives where it is.

    Raises:
        DataError: this is no run's folder.
        OSError: the page cannot be written.
    """
    path = path or Path(folder).expanduser() / PAGE
    write_page(path, render(read_run(folder)))
    return path
