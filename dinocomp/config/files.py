"""Where shipped runs (yamls/) and recipes (recipes/) are, and which of their files a typed name means."""

from pathlib import Path

from dinocomp.errors import ConfigError
from dinocomp.hints import did_you_mean


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
    kind, other = {"yamls": ("run", "recipes"), "recipes": ("recipe", "yamls")}[folder]
    if path.is_dir():
        instead = f"the images of a run are train.dataset_path={name}" if kind == "run" else "a recipe is a YAML file"
        raise ConfigError(f"{name}: this is a folder, not the YAML of a {kind}; {instead}.")
    if stem in shipped(other):
        what = f"a recipe; type YAML recipes=[{stem}]" if kind == "run" else f"a run; name it as the first word, {stem}"
        raise ConfigError(f"{name}: this is the name of {what}.")
    raise ConfigError(
        f"{name}: no such file, and no {kind} of that name.{did_you_mean(stem, known)} Shipped: {', '.join(known)}."
    )


def first_comment(path: Path) -> str:
    """The text of a file's first line if that is a comment, else nothing: a shipped file's one-line meaning."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return line.lstrip("# ").rstrip() if line.startswith("#") else ""
