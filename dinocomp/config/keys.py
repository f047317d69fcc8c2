"""How a key of the configuration is declared (`key`, `section`), listed (`walk`) and read (`convert`)."""

import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

AUTO = "auto"


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, annotation, default, one line of meaning, and the values it takes.

    `minimum` and `maximum` are allowed values themselves, `above` and `below` are not; on a list they bound each item.
    An `int | str` is a whole number within the bounds or a word among `choices`.
    A key with `no_longer` is accepted for the sake of existing files but changes nothing; the text says why.
    One with `auto` also takes the word `auto`, for which a rule of `config/auto.py` chooses a value.
    """

    name: str
    annotation: Any
    default: Any
    meaning: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    no_longer: str = ""
    auto: bool = False


def key(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    no_longer: str = "",
    auto: bool = False,
) -> Any:
    """Declare a key of a configuration dataclass; see `Key` for the arguments."""
    metadata = {
        "meaning": meaning,
        "choices": tuple(choices),
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "no_longer": no_longer,
        "auto": auto,
    }
    return field(default=default, metadata=metadata)


def section(factory: Any, meaning: str) -> Any:
    """Declare a nested group of keys, made by `factory()`."""
    return field(default_factory=factory, metadata={"meaning": meaning})


def walk(config: Any, prefix: str = "") -> Iterator[Key]:
    """Yield every key under a configuration dataclass in order, with that instance's values as `default`."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{item.name}.")
        else:
            yield Key(f"{prefix}{item.name}", item.type, value, **item.metadata)


def with_values(config: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A copy of a configuration dataclass, with other values by dotted name."""
    changes = {}
    for item in fields(config):
        name, value = f"{prefix}{item.name}", getattr(config, item.name)
        if is_dataclass(value):
            changes[item.name] = with_values(value, values, f"{name}.")
        elif name in values:
            changes[item.name] = values[name]
    return replace(config, **changes)


def walk_sections(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, meaning) of every group of keys under a configuration dataclass, outer ones first."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield f"{prefix}{item.name}", item.metadata["meaning"]
            yield from walk_sections(value, f"{prefix}{item.name}.")


_NUMBER_OR_WORD = int | str


def _inner(annotation: Any) -> tuple[Any, bool]:
    """`T | None` -> (T, True), `int | str` -> (int, False); anything else -> (itself, False)."""
    if annotation == _NUMBER_OR_WORD:
        return int, False
    if isinstance(annotation, types.UnionType):
        return next(a for a in annotation.__args__ if a is not types.NoneType), True
    return annotation, False


def item_type(annotation: Any) -> tuple[Any, bool]:
    """What a value or each of its items is: `int | None` -> (int, False), `tuple[int, ...]` -> (int, True)."""
    inner, _ = _inner(annotation)
    items = typing.get_args(inner)
    return (items[0], True) if items else (inner, False)


_TYPE_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def type_name(annotation: Any) -> str:
    """The annotation in words, as shown in errors and tables: `whole number`, `number or null`, `list of 2 numbers`."""
    inner, optional = _inner(annotation)
    if annotation == _NUMBER_OR_WORD:
        return "whole number or word"
    if typing.get_origin(inner) is tuple:
        items = typing.get_args(inner)
        count = "" if items[-1] is Ellipsis else f"{len(items)} "
        return f"list of {count}{_TYPE_NAMES[items[0]]}{'' if items[0] is str else 's'}"
    return f"{_TYPE_NAMES[inner]} or null" if optional else _TYPE_NAMES[inner]


def convert(value: Any, annotation: Any) -> Any:
    """Return `value` as the annotated type, without guessing: only int -> float and list -> tuple are conversions.

    Raises:
        TypeError: the value does not fit; the text is what was expected.
    """
    inner, optional = _inner(annotation)
    if (value is None and optional) or (annotation == _NUMBER_OR_WORD and isinstance(value, str)):
        return value
    if typing.get_origin(inner) is tuple:
        items = typing.get_args(inner)
        if not isinstance(value, list | tuple) or (items[-1] is not Ellipsis and len(value) != len(items)):
            raise TypeError(type_name(annotation))
        try:
            return tuple(convert(item, items[0]) for item in value)
        except TypeError as error:
            raise TypeError(type_name(annotation)) from error
    if inner is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not inner:
        raise TypeError(type_name(annotation))
    if inner is float and not math.isfinite(value):
        raise TypeError("finite number")
    return value


def show(value: object) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value) if value != "" else "''"


def range_text(spec: Key) -> str:
    """The values a key takes in words: `one of a, b`, `at least 0, below 1`, or nothing where any will do."""
    if spec.choices and spec.annotation is str:
        return "one of " + ", ".join(spec.choices)
    words = {"at least": spec.minimum, "above": spec.above, "at most": spec.maximum, "below": spec.below}
    shown = {word: f"{bound:g}" if isinstance(bound, float) else str(bound) for word, bound in words.items()}
    bounds = [f"{word} {shown[word]}" for word, bound in words.items() if bound is not None]
    return ", ".join(bounds + [f"or {word}" for word in (*spec.choices, *([AUTO] if spec.auto else []))])


def out_of_range(spec: Key, value: Any) -> bool:
    """Whether a value of the right type lies outside what the key takes. `None` never does."""
    items = value if isinstance(value, tuple) else (value,)
    for item in items:
        if isinstance(item, str) and spec.choices and item not in spec.choices:
            return True
        if isinstance(item, bool) or not isinstance(item, int | float):
            continue
        too_small = (spec.minimum is not None and item < spec.minimum) or (
            spec.above is not None and item <= spec.above
        )
        too_large = (spec.maximum is not None and item > spec.maximum) or (
            spec.below is not None and item >= spec.below
        )
        if too_small or too_large:
            return True
    return False
