"""Pictures within a page: few, small, and as data URIs."""

import base64
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

T = TypeVar("T")

_LARGE = 150_000  # bytes, from which on a picture is encoded again
_SIDE = 1400  # pixels, at most, of one that is
_QUALITY = 82


@dataclass(frozen=True)
class Inlined:
    """A picture as a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int


def inline(path: Path) -> Inlined | None:
    """A picture of a run; None where it cannot be read (yet)."""
    try:
        return _inline(path, path.stat().st_mtime_ns)
    except (OSError, SyntaxError, ValueError):  # gone, or half written
        return None


@functools.lru_cache(maxsize=64)  # a page that is refreshed shows mostly the same ones
def _inline(path: Path, changed: int) -> Inlined:
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        kind, (width, height) = (image.format or "").lower(), image.size
        image.load()
        if len(content) > _LARGE or kind not in ("png", "jpeg", "webp"):
            image = image.convert("RGB")
            image.thumbnail((_SIDE, _SIDE))
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=_QUALITY, method=4)
            content, kind, (width, height) = buffer.getvalue(), "webp", image.size
    return Inlined(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width, height)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
