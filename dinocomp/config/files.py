"""Where shipped runs (yamls/) and recipes (recipes/) are, and which of their files a typed name means."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from dinocomp.errors import ConfigError


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


def shipped(folder: str) -> dict[str, Path]:
    """Name -> file of everything shipped in `folder` ("yamls" or "recipes"), sorted by name.

    An installed wheel has the folder inside the package, a checkout beside it.
    """
    package = Path(__file__).resolve().parents[1]
    for home in (package / folder, package.parent / folder):
        if home.is_dir():
            return {path.stem: path for path in sorted(home.glob("*.yaml"))}
    raise ConfigError(f"The folder {folder}/ is missing from this installation. Install dinocomp again.")


def find(name: str, folder: str) -> tuple[Path, str]:
    """Return the file meant by `name` (a path, or the name of a shipped file) and how to call it in messages.

    Raises:
        ConfigError: there is no such file, neither at that path nor shipped.
    """
    path = Path(name).expanduser()
    known = shipped(folder)
    if path.is_file():
        ours = known.get(path.stem)
        return path, f"{folder}/{path.name}" if ours is not None and ours == path.resolve() else name
    stem = path.name.removesuffix(".yaml").removesuffix(".yml")
    if stem in known and str(path.parent) in (".", folder):
        return known[stem], f"{folder}/{stem}.yaml"
    kind = folder.removesuffix("s")
    listing = ", ".join(known)
    raise ConfigError(
        f"{name}: no such file, and no {kind} of that name.{did_you_mean(stem, known)} Shipped: {listing}."
    )


def first_comment(path: Path) -> str:
    """The text of a file's first line if that is a comment, else nothing: a shipped file's one-line meaning."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return line.lstrip("# ").rstrip() if line.startswith("#") else ""
