"""The command line: `key=value` words, and what to type instead of flags and of words that are neither."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinocomp.config.keys import Key, walk
from dinocomp.config.remedies import likely_keys
from dinocomp.config.schema import Config
from dinocomp.errors import ConfigError
from dinocomp.hints import did_you_mean

USAGE = "composer dinocomp/train.py YAML [recipes=[a,b]] [key=value ...]"
HELP = (
    f"{USAGE}\nYAML: a path, or the name of a shipped run. Recipes: `dinocomp recipes`. "
    "Keys: docs/config.md, or `dinocomp plan YAML --full`."
)

# The reference's flags: does a value follow, and what to type here ({} is that value).
_FLAGS: dict[str, tuple[bool, str]] = {
    "config-file": (True, "{}"),
    "output-dir": (True, "train.output_dir={}"),
    "save-frequency": (True, "checkpoint.save_frequency={}"),
    "max-to-keep": (True, "checkpoint.max_to_keep={}"),
    "no-resume": (False, "train.output_dir=A_NEW_FOLDER (a folder that holds a run is gone on with)"),
}
# Flags that the launcher reads when they stand before the script.
_LAUNCHER = ("n", "nproc", "world_size", "base_rank", "node_rank", "master_addr", "master_port", "stdout", "stderr")


@dataclass
class Words:
    """Parsed command line words: raw values by dotted key (later words win), recipes, and what was wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    recipes: Any = ()
    problems: list[str] = field(default_factory=list)


def _unflag(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into those that stand and problems with flags; a flag takes its value with it."""
    kept, problems = [], []
    names = [spec.name for spec in walk(Config())]
    rest = list(words)
    while rest:
        word = rest.pop(0)
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
        elif name in _LAUNCHER:
            if not equals:
                value = rest.pop(0) if rest else "VALUE"
            flag = word.partition("=")[0]
            problems.append(
                f"{word}: a flag of composer, which goes before the script; type "
                f"composer {flag} {value} dinocomp/train.py YAML ..."
            )
        elif name in ("eval-only", "eval_only", "eval"):
            problems.append(
                f"{word}: there is nothing to dump; the teacher is written as teacher.safetensors while training"
            )
        else:
            key = name if name in names else next(iter(likely_keys(name, names)), "")
            if key and not equals:
                value = rest.pop(0) if rest and "=" not in rest[0] and not rest[0].startswith("-") else "VALUE"
            instead = (
                f"type {key}={value}" if key else f"there are no flags here; settings are key=value words ({USAGE})"
            )
            problems.append(f"{word}: {instead}")
    return kept, problems


def _no_setting(words: Sequence[str], place: int) -> str:
    """What to type instead of a word that is no `key=value`: mostly there is a space too many."""
    word, before = words[place], words[place - 1] if place else ""
    after, last = (*words[place + 1 :], "", "")[:2]
    names = [spec.name for spec in walk(Config())]
    name, colon, value = word.partition(":")
    if before.count("[") > before.count("]"):
        rest = "".join(words[place:]).partition("]")[0]
        return f"{before} {word}: a list has no spaces; type {before}{rest}]"
    if before.endswith("="):
        return f"{before} {word}: no spaces around the =; type {before}{word}"
    if after.startswith("="):
        value = after[1:] or last
        return f"{word} {after}: no spaces around the =; type {word}={value or 'VALUE'}"
    if word.endswith((".yaml", ".yml")):
        return f"{word}: a run has one YAML; lay another one over it with recipes=[{word}]"
    if name in names:
        return f"{word!r} is not of the form key=value; type {name}={value if colon and value else 'VALUE'}"
    return f"{word!r} is not of the form key=value. Usage: {USAGE}{did_you_mean(word, [*names, 'recipes'])}"


def parse(words: Sequence[str], keys: Mapping[str, Key]) -> Words:
    """Read `key=value` words by YAML's grammar, but text as it stands; problems are collected.

    On a command line nobody quotes twice. A folder may be called `2024` or `photos #2`, and nothing at all is ''.
    """
    kept, problems = _unflag(words)
    parsed = Words(problems=problems)
    for place, word in enumerate(kept):
        name, equals, text = word.partition("=")
        if not equals or not name:
            parsed.problems.append(f"{_no_setting(kept, place)} (command line)")
            continue
        is_text = name in keys and keys[name].annotation is str
        try:
            tree = OmegaConf.from_dotlist([f"value={text}"])
            value = OmegaConf.to_container(tree, resolve=False)["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            if not is_text or isinstance(error, OmegaConfBaseException):
                reason = str(error).splitlines()[0]
                parsed.problems.append(
                    f"{word!r} on the command line cannot be read as YAML: {reason}; brackets and quotes come in pairs"
                )
                continue
            value = text
        if name == "recipes":
            parsed.recipes = [] if text == "" else value
            continue
        if is_text and not isinstance(value, bool) and not (isinstance(value, str) and text[:1] in ("'", '"')):
            value = value if value is None and text else text  # null is refused where it is not a value
        parsed.values[name] = value
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
    for place, word in enumerate(kept):
        if place and ("=" not in word or word.startswith("=")):
            raise ConfigError(_no_setting(kept, place))
    return kept[0], kept[1:]
