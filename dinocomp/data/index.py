"""The index of a folder of shards, on this disk or in an object store."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from dinocomp.data.damage import damage
from dinocomp.data.store import Downloads, StoreError
from dinocomp.errors import DataError

log = logging.getLogger(__name__)

INDEX = "index.json"


def read_index(folder: Path) -> dict[str, Any]:
    """Streaming's index of a folder of shards, checked to be one with at least one sample.

    Raises:
        DataError: it is missing, damaged or empty, or names files outside the folder.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["version"] != 2:
            raise ValueError(f"its version is {index['version']}, expected 2")
        samples = sum(shard["samples"] for shard in index["shards"])
        files = [f for shard in index["shards"] for f in (shard["raw_data"], shard.get("zip_data")) if f]
        sizes = {file["basename"]: file["bytes"] + 0 for file in files}
    except FileNotFoundError:
        raise DataError(f"{path} is missing; copy it again or convert the images again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); copy it again or convert the images again") from None
    if outside := [name for name in sizes if name.startswith("/") or ".." in name.split("/")]:
        raise DataError(f"{path} names a file outside its folder, {outside[0]!r}; do not use these shards")
    if samples == 0:
        raise DataError(f"{path} lists no samples; convert some images with `dinocomp convert SRC DST`")
    return index


def check_files(folder: Path, index: dict[str, Any]) -> None:
    """Missing and cut shards are found before training: one form, packed or not, of each has to be whole.

    Raises:
        DataError: names the shard.
    """
    for shard in index["shards"]:
        forms = [form for form in (shard["raw_data"], shard.get("zip_data")) if form]
        wrong = {folder / form["basename"]: damage(folder / form["basename"], form["bytes"]) for form in forms}
        if all(wrong.values()):
            found = "; ".join(f"{path} {reason}" for path, reason in wrong.items())
            raise DataError(
                f"{found} according to {folder / INDEX}. Copy the shard again, or delete {folder} and convert the "
                "images again"
            )


def put_index(folder: Path, text: bytes) -> None:
    """Write an index, all or nothing, whoever else writes the same."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as writing:
        (Path(writing) / INDEX).write_bytes(text)
        (Path(writing) / INDEX).replace(folder / INDEX)


def cached_index(
    remote: str, split: str, folder: Path, *, ask: bool = False, exact: bool = False
) -> dict[str, Any] | None:
    """The index of a remote's shards, at `remote` or `remote/split` (`exact`: only there).

    Without `ask` only one fetched earlier is looked at. None if there is none.

    Raises:
        DataError: the store refuses or cannot be reached.
    """
    places = [(remote, folder / "root"), (f"{remote}/{split}", folder / split)]
    for where, local in places[1:] if exact else places:
        if not fetch_json(f"{where}/{INDEX}", local / INDEX) if ask else (local / INDEX).is_file():
            return read_index(local)
    return None


def fetch_json(address: str, local: Path) -> str:
    """Get one small JSON file from an object store, all or nothing. One that is there is taken, unless it is damaged.

    Returns:
        the store's reason where it does not give one, else "".

    Raises:
        StoreError: the store does not answer, or does not know the caller.
    """
    try:
        json.loads(local.read_bytes())
        return ""
    except FileNotFoundError:
        local.parent.mkdir(parents=True, exist_ok=True)
    except ValueError:
        log.warning("the copy %s is damaged; it is fetched again", local)
    with tempfile.TemporaryDirectory(dir=local.parent, prefix=".fetching-") as folder:
        try:
            Downloads(address).fetch(address, Path(folder) / local.name)
        except StoreError as error:
            if error.denied:
                return str(error)
            raise
        (Path(folder) / local.name).replace(local)
    return ""
