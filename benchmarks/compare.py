"""Records of measurements side by side, relative to the first.

    python -m benchmarks.compare before.json after.json

Reads what any benchmark has written with --json, and prints a Markdown table. Rows of the files belong together where
their words are the same, such as the name of a stage; words that all rows of a file share, such as its settings, do not
tell. A warning says where files were not made on the same machine with the same versions.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinocomp.errors import ConfigError, DinocompError

_MACHINE = ("device", "device_bytes", "cpu", "cores", "threads", "cuda", "python")  # of an environment
Key = tuple[tuple[str, Any], ...]  # what a row is of: names and values


@dataclass(frozen=True)
class Record:
    """A file: its environment, and its rows with nested names joined by dots."""

    name: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]]


def read(path: Path) -> Record:
    """Reads what `benchmarks.record.write` has written.

    Raises:
        ConfigError: it is not such a file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        environment, rows = found["environment"], [dict(_flat(row)) for row in found["rows"]]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no record of a benchmark; give files that one has written with --json") from error
    return Record(path.name, environment, rows)


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Lists, such as single measurements behind a median, are left out."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield prefix + name, value


def differences(records: Sequence[Record]) -> list[str]:
    """Lines on what of machine and versions is not the same in all files; numbers then say little."""
    described = [_described(record.environment) for record in records]
    names = list(dict.fromkeys(name for each in described for name in each))
    lines = []
    for name in names:
        values = [str(each.get(name)) for each in described]
        if len(set(values)) > 1:
            said = ", ".join(f"{value} ({record.name})" for value, record in zip(values, records, strict=True))
            lines.append(f"{name}: {said}")
    return lines


def _described(environment: Mapping[str, Any]) -> dict[str, Any]:
    machine = {name: environment[name] for name in _MACHINE if name in environment}
    return machine | dict(environment.get("versions", {}))


def matched(records: Sequence[Record], by: Sequence[str] = ()) -> dict[Key, list[dict[str, Any]]]:
    """Rows that belong together: what they are of, and each file's row without that, empty where it has none.

    Args:
        by: names of numbers that tell rows apart, beside words.

    Raises:
        ConfigError: two rows of a file are of the same.
    """
    telling = [name for record in records for name in _telling(record.rows)]
    found: dict[Key, list[dict[str, Any]]] = {}
    for place, record in enumerate(records):
        for row in record.rows:
            key = tuple((name, row[name]) for name in row if name in telling or name in by)
            rows = found.setdefault(key, [{} for _ in records])
            if rows[place]:
                raise ConfigError(
                    f"{record.name} has several rows of {_title(key) or 'the same'}; name the number that tells them "
                    f"apart: --by NAME, one of {', '.join(_numbers(row))}"
                )
            rows[place] = {name: value for name, value in row.items() if name not in dict(key)}
    return found


def _telling(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of words that are not the same in all rows of a file."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, str))
    return [name for name in names if len({row.get(name) for row in rows}) > 1]


def _numbers(row: Mapping[str, Any]) -> list[str]:
    return [name for name, value in row.items() if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _title(key: Key) -> str:
    return ", ".join(f"{name} {value}" if _is_number(value) else str(value) for name, value in key)


def compare(records: Sequence[Record], by: Sequence[str] = ()) -> str:
    """Markdown: where and with what the files were made, warnings, and a table with a line for each number.

    Args:
        by: see `matched`.
    """
    first = _described(records[0].environment)
    lines = [", ".join(f"{name} {value}" for name, value in first.items() if value is not None), ""]
    for number, record in enumerate(records, start=1):
        lines.append(f"{number}. {record.name}: `{record.environment.get('command')}`")
    if different := differences(records):
        lines += ["", "**Warning: not made alike**, so that numbers may differ for that:", ""]
        lines += [f"- {line}" for line in different]
    heads = [records[0].name, *(f"{record.name} | relative" for record in records[1:])]
    lines += ["", "| | " + " | ".join(heads) + " |", "|---" * (2 * len(records)) + "|"]
    for key, rows in matched(records, by).items():
        lines += _lines(f"{_title(key)}: " if key else "", rows)
    return "\n".join(lines)


def _lines(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row):
        first, *others = [row.get(name) for row in rows]
        if first is None and all(value is None for value in others):
            continue
        cells = [_shown(first)]
        for value in others:
            cells += [_shown(value), _relative(value, first)]
        lines.append(f"| {title}{name} | " + " | ".join(cells) + " |")
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if _is_number(value) else str(value)


def _relative(value: Any, first: Any) -> str:
    """As a factor; nothing where one of them is no number."""
    return f"{value / first:.3f}" if _is_number(value) and _is_number(first) and first else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="the first is what others relate to")
    parser.add_argument("--by", action="append", default=[], metavar="NAME", help="a number that tells rows apart")
    given = parser.parse_args(arguments)
    try:
        print(compare([read(path) for path in given.files], given.by))
    except DinocompError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
