"""What to type instead: the nearest known names, and what is wrong with a path."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first; of dotted names the last part alone may be what is alike."""

    def likeness(other: str) -> float:
        short, leaf = name.rpartition(".")[2].lower(), other.rpartition(".")[2].lower()
        whole = difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()
        part = 1.0 if short == leaf else 0.9 if len(short) > 3 and short in leaf else 0.0
        return max(whole, 0.95 * part, 0.9 * difflib.SequenceMatcher(None, short, leaf).ratio())

    scores = {other: likeness(other) for other in known}
    best = max(scores.values(), default=0.0)
    alike = [other for other, score in scores.items() if score >= max(0.65, best - 0.1)]
    return sorted(alike, key=lambda other: -scores[other])[:count]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the nearest known names, or nothing."""
    names = nearest(name, known)
    return f" Did you mean {' or '.join(names)}?" if names else ""


def missing(path: Path) -> str:
    """Which part of a path is not there, and the nearest names beside it. The path must not exist."""
    child = Path(os.path.abspath(path))
    while not child.parent.exists():
        child = child.parent
    try:
        beside = [entry.name for entry in os.scandir(child.parent)]
    except OSError:  # not a folder, or one that may not be listed
        beside = []
    part = "" if child == Path(os.path.abspath(path)) else f" ({child} is the first part that is missing)"
    close = [
        str(child.parent / name) for name in beside if name in difflib.get_close_matches(child.name, beside, 2, 0.7)
    ]
    if not path.is_absolute():
        close = [os.path.relpath(name) for name in close]
    return f"{path} does not exist{part}." + (f" Did you mean {' or '.join(close)}?" if close else "")


def obstacle(folder: Path) -> str:
    """Why `folder` can neither be written to nor made, as far as can be seen without trying; else nothing."""
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.exists():
        return f"{place} is a link to something that does not exist"
    if not place.is_dir():
        return f"{place} is a file, not a folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"you may not write to {place}"
    return ""
