"""One checked `Config` from defaults <- YAML <- recipes <- command line, each laid over the one before."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml as pyyaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinocomp.config import checks, distil
from dinocomp.config.auto import Choice, Facts, choose
from dinocomp.config.files import find
from dinocomp.config.keys import AUTO, Key, convert, out_of_range, range_text, walk, with_values
from dinocomp.config.overrides import Words, parse
from dinocomp.config.remedies import choice_hint, suggest_key, type_hint, unresolved
from dinocomp.config.schema import Config
from dinocomp.errors import ConfigError

COMMAND_LINE = "command line"
_STUDENT_DTYPE = "compute_precision.student.backbone.mixed_precision.param_dtype"
_STUDENT_SHARDING = "compute_precision.student.backbone.sharding_strategy"


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration and how it came about.

    Attributes:
        config: every key's value.
        notices: one line for each key that was set but no longer does anything, and for other things worth saying.
        origin: dotted key -> where it was set; keys left at their default are absent.
        recipes: names of the recipes applied, in order.
        chosen: what stands for each value that was given as `auto`, and why.
    """

    config: Config
    notices: list[str]
    origin: dict[str, str]
    recipes: list[str]
    chosen: tuple[Choice, ...] = ()


@functools.cache
def all_keys() -> Mapping[str, Key]:
    """Every key of the schema by dotted name, in order."""
    return {spec.name: spec for spec in walk(Config())}


def load_config(yaml: str | None, overrides: Sequence[str] = (), facts: Facts | None = None) -> LoadedConfig:
    """Read a run.

    Args:
        yaml: a path, or the name of a shipped YAML (`vits16`); None for defaults only.
        overrides: `key=value` words; `recipes=[a,b]` adds recipes after those that the YAML lists.
        facts: what values given as `auto` are chosen by; those that are not known yet are assumed.

    Raises:
        ConfigError: everything that is wrong with the run, together.
        WeightsError: the student's heads follow a frozen teacher (`teacher.distil_from`), whose file cannot be read.
    """
    merge = _Merge()
    recipes: list[str] = []
    if yaml is not None:
        recipes += merge.add_run(yaml)
    words = parse(overrides, all_keys())
    recipes += merge.recipe_names(words.recipes, COMMAND_LINE)
    for name in recipes:
        merge.add_recipe(name)
    merge.problems += words.problems
    merge.add_words(words)
    config, chosen = merge.build(facts)
    free = {choice.key for choice in chosen}
    config, taken = distil.follow(config, [name for name in merge.origin if name not in free])
    merge.origin |= dict.fromkeys(taken, "the file of teacher.distil_from")
    chosen = tuple(choice for choice in chosen if choice.key not in taken)
    return LoadedConfig(config, _notices(config, merge.origin), merge.origin, recipes, chosen)


def read_yaml(path: Path, label: str) -> dict[str, Any]:
    """Return a YAML file as nested dictionaries, interpolations unresolved.

    Raises:
        ConfigError: not readable as YAML, a key given twice, empty, or not a mapping at the top.
    """
    try:
        text = path.read_text(encoding="utf-8")
        loaded = OmegaConf.create(text)
        tree = OmegaConf.to_container(loaded, resolve=False)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{label}: cannot be read as text: byte {error.start + 1} is not UTF-8. Save the file as UTF-8 text."
        ) from error
    except OSError as error:
        raise ConfigError(f"{label}: cannot be read: {error.strerror}. Check its permissions.") from error
    except pyyaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        tab = mark is not None and "\t" in (text.splitlines()[mark.line : mark.line + 1] or [""])[0]
        mend = "There is a tab; indent with spaces." if tab else "Mend the YAML there."
        raise ConfigError(f"{label}{line}: {error.problem or error.context}. {mend}") from error
    except (pyyaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{label}: not a configuration: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{label}: the top of the file is a list; sections such as `train:` were expected.")
    if not tree:
        raise ConfigError(f"{label}: the file says nothing. Sections such as `train:` were expected.")
    if list(tree.values()) == [None] and ":" not in text:
        raise ConfigError(
            f"{label}: the file is plain text {text.strip()[:40]!r}; sections such as `train:` were expected."
        )
    return tree


class _Merge:
    """Layers laid over the defaults, with where each value came from and everything found wrong on the way."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {name: _plain(spec.default) for name, spec in all_keys().items()}
        self.origin: dict[str, str] = {}
        self.problems: list[str] = []

    def recipe_names(self, value: Any, label: str) -> list[str]:
        """Read a `recipes` value: one name or a list of names."""
        names = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else value
        if names is None:
            return []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self.problems.append(
                f"recipes = {value!r} ({label}): expected a name or a list of names, like [registers,bf16]"
            )
            return []
        return names

    def add_run(self, name: str) -> list[str]:
        """Lay a run's YAML over what there is; return the recipes it asks for."""
        try:
            path, label = find(name, "yamls")
            tree = read_yaml(path, label)
        except ConfigError as error:
            self.problems.append(str(error))
            return []
        names = self.recipe_names(tree.pop("recipes", None), label)
        self.add_tree(tree, label)
        return names

    def add_recipe(self, name: str) -> None:
        parts = re.split(r"[,\s]+", name.strip(", "))
        if len(parts) > 1 and not Path(name).expanduser().exists():
            self.problems.append(f"recipes = {name!r}: several go in brackets; type recipes=[{','.join(parts)}]")
            return
        try:
            path, label = find(name, "recipes")
            tree = read_yaml(path, label)
        except ConfigError as error:
            self.problems.append(str(error))
            return
        if "recipes" in tree:
            self.problems.append(
                f"recipes = {tree.pop('recipes')!r} ({label}): a recipe cannot ask for recipes; "
                "list them all in recipes=[...]"
            )
        self.add_tree(tree, f"recipe {path.stem} ({label})")

    def add_words(self, words: Words) -> None:
        for name, value in words.values.items():
            self.add(name, value, COMMAND_LINE)

    def add_tree(self, tree: Mapping[Any, Any], label: str) -> None:
        for name, value in tree.items():
            self.add_child("", name, value, label)

    def add_child(self, prefix: str, name: Any, value: Any, label: str) -> None:
        """Set one key of a file's section; a dotted one could quietly contradict the nested one."""
        if "." in str(name):
            self.problems.append(
                f"{prefix}{name} ({label}): write each section of it as a level of its own, without dots"
            )
        else:
            self.add(f"{prefix}{name}", value, label)

    def add(self, name: str, value: Any, label: str) -> None:
        """Set the key `name`, or every key below it where it is a section."""
        is_section = any(known.startswith(f"{name}.") for known in all_keys())
        if name in all_keys():
            self.values[name] = value
            self.origin[name] = label
        elif isinstance(value, dict) and (is_section or value):
            for child, inner in value.items():
                self.add_child(f"{name}.", child, inner, label)
        elif is_section:
            if value is not None:
                inside = [known for known in all_keys() if known.startswith(f"{name}.")]
                colon = ", with a space after the colon" if isinstance(value, str) and ":" in value else ""
                self.problems.append(
                    f"{name} = {value!r} ({label}): {name} is a section; set a key in it{colon}, such as {inside[0]}"
                )
        else:
            self.problems.append(f"{name} = {value!r} ({label}): no such key.{suggest_key(name, all_keys())}")

    def build(self, facts: Facts | None) -> tuple[Config, tuple[Choice, ...]]:
        """Resolve interpolations and `auto`, check types, ranges and combinations; raise everything wrong at once.

        Without facts, nothing is said against combinations with values that are not chosen yet.
        """
        auto: list[str] = []
        tree = OmegaConf.create(_nest(self.values))
        values: dict[str, Any] = {}
        for name, spec in all_keys().items():
            where = self.origin.get(name, "default")
            try:
                raw = _plain(OmegaConf.select(tree, name, throw_on_resolution_failure=True, throw_on_missing=True))
            except OmegaConfBaseException as error:
                self.problems.append(f"{name} = {self.values[name]!r} ({where}): {unresolved(str(error))}")
                continue
            if raw == AUTO and spec.auto:
                auto.append(name)
                if self.values[name] != AUTO:  # what it refers to is chosen later
                    self.problems.append(f"{name} = {self.values[name]!r} ({where}): that is auto; type a value here")
                continue
            try:
                values[name] = convert(raw, spec.annotation)
            except TypeError as error:
                or_auto = ", or auto" if spec.auto else ""
                self.problems.append(f"{name} = {raw!r} ({where}): expected {error}{or_auto}{type_hint(raw, spec)}")
                continue
            if out_of_range(spec, values[name]):
                self.problems.append(f"{name} = {raw!r} ({where}): expected {range_text(spec)}{choice_hint(raw, spec)}")
        if not self.problems:
            config, chosen = choose(with_values(Config(), values), auto, facts or Facts())
            values |= {choice.key: choice.value for choice in chosen}
            for problem in checks.problems(config):
                if facts is None and set(problem.keys) & set(auto):
                    continue
                settings = ", ".join(
                    f"{name} = {_plain(values[name])!r} ({self.origin.get(name, 'default')})" for name in problem.keys
                )
                self.problems.append(f"{settings}: {problem.message}")
        if self.problems:
            raise ConfigError(_report(self.problems))
        return config, chosen


def _report(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  - {problem}" for problem in problems)


def _plain(value: Any) -> Any:
    """Tuples and OmegaConf nodes as plain lists and dictionaries."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    return list(value) if isinstance(value, tuple) else value


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _notices(config: Config, origin: Mapping[str, str]) -> list[str]:
    """One line for each key that differs from its default but does nothing, and for what is taken in another way."""
    lines, values = [], {spec.name: spec.default for spec in walk(config)}
    for spec in walk(config):
        if spec.no_longer and spec.default != all_keys()[spec.name].default:
            lines.append(f"{spec.name}={spec.default} ({origin[spec.name]}) changes nothing: {spec.no_longer}")
    for name, key, wanted in (
        (_STUDENT_DTYPE, "performance.precision", config.performance.precision),
        (_STUDENT_SHARDING, "parallelism.strategy", config.parallelism.strategy),
    ):
        if values[name] != all_keys()[name].default:
            effect = "is for the whole model" if wanted == "auto" else f"changes nothing: {key}={wanted} is set"
            lines.append(f"{name}={values[name]} ({origin[name]}) {effect}")
    if config.optim.lr > 0:
        lines.append(
            f"optim.lr={config.optim.lr:g} ({origin['optim.lr']}) is taken as it stands: "
            "optim.base_lr and optim.scaling_rule are unused"
        )
    return lines
