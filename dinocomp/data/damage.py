"""Is a file of shards what the index says it is?"""

import hashlib
import os
from pathlib import Path

import xxhash

_CHUNK = 1 << 24  # bytes read at a time


def damage(path: Path, size: int, hashes: dict[str, str] | None = None) -> str:
    """What is wrong with a file, in words; "" if nothing is.

    Args:
        size: bytes that it should have.
        hashes: algorithm -> what its content should hash to; one of them is checked. None or empty: only the size is.
    """
    found = os.path.getsize(path) if path.is_file() else None
    if found is None:
        return "is missing"
    if found != size:
        return f"has {found} bytes, but should have {size}"
    for name, expected in (hashes or {}).items():
        if (content := _hash(path, name)) is not None:
            return "" if content == expected else f"does not match its hash ({name})"
    return ""


def _hash(path: Path, name: str) -> str | None:
    """None for an algorithm that is not known here."""
    library = next((lib for lib in (xxhash, hashlib) if name in lib.algorithms_available), None)
    if library is None or not hasattr(library, name) or name.startswith("shake_"):
        return None
    running = getattr(library, name)()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            running.update(chunk)
    return running.hexdigest()
