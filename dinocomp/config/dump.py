"""A configuration as YAML that loads to the very same configuration."""

from typing import Any

import yaml

from dinocomp.config.keys import walk
from dinocomp.config.schema import Config


def to_yaml(config: Config, header: str = "") -> str:
    """Return every key as YAML, after `header` as comment lines. `load_config` of it gives an equal `Config`.

    Recipes have already been applied, so `recipes` is empty; interpolations have been resolved.
    """
    tree: dict[str, Any] = {}
    for spec in walk(config):
        *parents, leaf = spec.name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = _plain(spec.default)
    tree["recipes"] = []
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    return comment + yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    # A value that merely looks like an interpolation would be resolved when read again.
    return value.replace("${", "\\${") if isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):
    """Sections in block style, lists on one line, floats in a form that every YAML reader takes for a float."""


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")  # YAML 1.1 reads 1e-05 as a string
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # OmegaConf reads more words as numbers (1e-5) than the dumper knows of, so whatever starts like one is quoted.
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style="'" if value[:1] in set("+-.0123456789") else None
    )


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
_Dumper.add_representer(float, _float)
