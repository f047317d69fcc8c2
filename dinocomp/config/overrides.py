"""The command line: `key=value` words, and what to type instead of the reference's flags."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinocomp.config.files import did_you_mean
from dinocomp.errors import ConfigError

USAGE = "composer dinocomp/train.py YAML [recipes=[a,b]] [key=value ...]"

# The reference's flags: does a value follow, and what to type here ({} is that value).
_FLAGS: dict[str, tuple[bool, str]] = {
    "config-file": (True, "{}"),
    "output-dir": (True, "train.output_dir={}"),
    "save-frequency": (True, "checkpoint.save_frequency={}"),
    "max-to-keep": (True, "checkpoint.max_to_keep={}"),
    "no-resume": (False, "train.output_dir=A_NEW_FOLDER (a folder that holds a run is gone on with)"),
}


@dataclass
class Words:
    """Parsed command line words: raw values by dotted key (later words win), recipes, and what was wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    recipes: Any = ()
    problems: list[str] = field(default_factory=list)


def _unflag(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into those that stand and problems with flags; a flag takes its value with it."""
    kept, problems = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            problems.append(
                f"{USAGE}\nRuns and recipes: `dinocomp recipes`; keys: docs/config.md, or `dinocomp plan YAML --full`"
            )
            continue
        if not word.startswith("-") or word == "-":
            kept.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        takes_value, instead = _FLAGS.get(name.replace("_", "-"), (False, ""))
        if takes_value and not equals:
            value = rest.pop(0) if rest else "VALUE"
            word = f"{word} {value}"
        if instead.startswith("{}"):
            problems.append(
                f"{word}: name the YAML as the first word, without a flag: {USAGE.replace('YAML', value, 1)}"
            )
        elif instead:
            problems.append(f"{word}: type {instead.format(value)}")
        elif name in ("eval-only", "eval_only", "eval"):
            problems.append(
                f"{word}: there is nothing to dump; the teacher is written as teacher.safetensors while training"
            )
        elif "." in name and equals:
            problems.append(f"{word}: type {name}={value}")
        else:
            problems.append(f"{word}: there are no flags here; settings are key=value words ({USAGE})")
    return kept, problems


def parse(words: Sequence[str]) -> Words:
    """Read `key=value` words by YAML's grammar. Nothing is checked against the schema here; problems are collected."""
    kept, problems = _unflag(words)
    parsed = Words(problems=problems)
    for word in kept:
        name, equals, text = word.partition("=")
        if not equals or not name:
            parsed.problems.append(f"{word!r} on the command line is not of the form key=value (no spaces)")
            continue
        try:
            tree = OmegaConf.from_dotlist([f"value={text}"])
            value = OmegaConf.to_container(tree, resolve=False)["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            parsed.problems.append(f"{word!r} on the command line cannot be read as YAML: {str(error).splitlines()[0]}")
            continue
        if name == "recipes":
            parsed.recipes = [] if text == "" else value
            continue
        parsed.values[name] = value
        parsed.texts[name] = text
    return parsed


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split a training command's words into the YAML and the overrides.

    Raises:
        ConfigError: no YAML is named, or the words are flags (the message says what to type instead).
    """
    kept, problems = _unflag(arguments)
    if problems:
        raise ConfigError("\n".join(problems))
    if not kept or "=" in kept[0]:
        found = f" The first word is {kept[0]!r}." if kept else ""
        raise ConfigError(f"Name a YAML first.{found} Usage: {USAGE}")
    for word in kept[1:]:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not of the form key=value. Usage: {USAGE}{did_you_mean(word, ['recipes'])}")
    return kept[0], kept[1:]
