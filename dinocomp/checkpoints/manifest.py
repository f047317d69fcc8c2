"""A checkpoint's manifest.json: which files it has, and what they are like when they are whole."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import xxhash

from dinocomp.errors import ConfigError, DinocompError

FORMAT = "dinocomp-checkpoint-1"
MANIFEST = "manifest.json"


class DamagedError(DinocompError):
    """A checkpoint is not what its manifest says, or is gone; trying again does not mend it."""


class Entry(NamedTuple):
    """One file of a checkpoint, as its manifest has it."""

    bytes: int
    xxh64: str


def write_manifest(folder: Path, files: Sequence[Path], *, iteration: int, world_size: int) -> None:
    """Lists the `files` of `folder` in its manifest.

    Args:
        iteration: finished iterations.
        world_size: of the processes that trained it.
    """
    content = {
        "format": FORMAT,
        "iteration": iteration,
        "world_size": world_size,
        "files": {path.name: {"bytes": path.stat().st_size, "xxh64": xxh64(path)} for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))


def is_of(folder: Path, iteration: int) -> bool:
    """Whether the whole checkpoint in `folder` is the one after `iteration` iterations."""
    return json.loads((folder / MANIFEST).read_text()).get("iteration") == iteration


def world_size_of(folder: Path) -> int:
    """Processes that trained the whole checkpoint in `folder`."""
    return int(json.loads((folder / MANIFEST).read_text()).get("world_size", 1))


def parse_manifest(text: bytes, where: str) -> dict[str, Entry]:
    """The files of a checkpoint, by name.

    Args:
        text: what manifest.json holds.
        where: the manifest's path or address, for messages.

    Raises:
        DamagedError: it is not a manifest, or names files outside of the checkpoint's folder.
        ConfigError: another version of dinocomp has written it.
    """
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise ConfigError(f"{where} has the format {manifest['format']!r}, expected {FORMAT!r}; update dinocomp")
        files = {name: Entry(int(file["bytes"]), str(file["xxh64"])) for name, file in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{where} is damaged ({error!r}); delete that checkpoint, an older one is used then"
        ) from error
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or name == MANIFEST or str(path) != name:
            raise DamagedError(f"{where} names the file {name!r}, which is not in its folder; delete that checkpoint")
    return files


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The files of the local checkpoint `folder`, by name.

    Raises:
        DamagedError: one of them is not there or has another size, or the manifest is damaged.
    """
    try:
        files = parse_manifest((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry.bytes:
                raise DamagedError(f"{folder / name} has {size} bytes, its manifest says {entry.bytes}")
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read: {error.strerror}") from error
    return files


def folder_name(iteration: int) -> str:
    """What the folder of a checkpoint is called, here and there."""
    return f"iteration-{iteration:08d}"


def iteration_of(folder: Path) -> int:
    """Finished iterations of the checkpoint in `folder`."""
    return int(folder.name.removeprefix("iteration-"))


def xxh64(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
