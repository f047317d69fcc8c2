"""The documentation's tables, made from schema and shipped files: `python -m dinocomp.config.tables docs`."""

import sys
from pathlib import Path

from dinocomp.config.files import first_comment, shipped
from dinocomp.config.keys import Key, range_text, show, type_name, walk_sections
from dinocomp.config.load import all_keys
from dinocomp.config.schema import Config


def table_of_keys() -> str:
    """Every key with its type, default and meaning as a Markdown page, a table for each section."""
    groups: dict[str, list[Key]] = {name: [] for name, _ in walk_sections(Config())}
    top: list[Key] = []
    for spec in all_keys().values():
        groups.get(spec.name.rpartition(".")[0], top).append(spec)
    parts = [
        "# Every key\n\n"
        "Generated from `dinocomp/config/schema.py` by `python -m dinocomp.config.tables docs`. "
        "Defaults < YAML < recipes in order < `key=value` words of the command line. "
        "An official epoch is `train.OFFICIAL_EPOCH_LENGTH` iterations.\n"
    ]
    for name, meaning in walk_sections(Config()):
        if groups[name]:
            parts.append(f"## {name}: {meaning}\n\n{_key_table(groups[name])}")
    parts.append(f"## Top level\n\n{_key_table(top)}")
    return "\n".join(parts)


def table_of_recipes() -> str:
    """Shipped recipes and runs with their one-line meanings as a Markdown page."""
    parts = [
        "# Recipes and runs\n\nGenerated from the first line of each file by `python -m dinocomp.config.tables docs`.\n"
    ]
    titles = {"recipes": "## Recipes: `recipes=[NAME,...]`\n\n", "yamls": "## Runs: `yamls/NAME.yaml`\n\n"}
    for folder, title in titles.items():
        rows = [f"| `{name}` | {_cell(first_comment(path))} |" for name, path in shipped(folder).items()]
        parts.append(title + "| name | meaning |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _key_table(specs: list[Key]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for spec in specs:
        allowed = range_text(spec)
        meaning = spec.meaning + (f"; {allowed}" if allowed else "")
        if spec.no_longer:
            meaning += f". **Changes nothing here:** {spec.no_longer}"
        rows.append(f"| `{spec.name}` | {type_name(spec.annotation)} | `{show(spec.default)}` | {_cell(meaning)} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write(folder: Path) -> None:
    """Write both pages into `folder`."""
    (folder / "config.md").write_text(table_of_keys(), encoding="utf-8")
    (folder / "recipes.md").write_text(table_of_recipes(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
