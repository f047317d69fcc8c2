"""Numbers and times as people read them."""

import math
from collections.abc import Mapping
from typing import Any


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else "–"


def count(value: object) -> str:
    """A whole number; anything else as it is."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def number(value: float, digits: int = 3) -> str:
    """Three digits, or all of a whole number."""
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """The two largest units: "2 d 4 h", "3 min 20 s", "0.4 s"."""
    if not math.isfinite(seconds):
        return "–"
    if 0 < seconds < 10:
        return f"{seconds:.2g} s"
    left, parts = round(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    parts = parts[:2]
    return parts[0] if len(parts) == 2 and parts[1].startswith("0 ") else " ".join(parts)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, names joined with "/"."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = value
    return found
