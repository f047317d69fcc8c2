"""The `dinocomp` command: convert images, plan a run, evaluate, use and export its weights, look at recipes."""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import metadata

from dinocomp.commands import compare, convert, embed, evaluate, export, plan, recipes, report, show
from dinocomp.errors import DataError, DinocompError
from dinocomp.hints import nearest

_COMMANDS = {
    "convert": convert,
    "evaluate": evaluate,
    "embed": embed,
    "export": export,
    "plan": plan,
    "recipes": recipes,
    "show": show,
    "report": report,
    "compare": compare,
}
_TAKE_WORDS = (plan,)  # whose rest are key=value words


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 images refused by `convert --strict`, 2 a mistake to mend."""
    parser, flags = _parser()
    arguments, rest = parser.parse_known_args(argv)
    words = arguments.command in _TAKE_WORDS
    unknown = [word for word in rest if word.startswith("-")] if words else rest
    close = nearest(unknown[0].partition("=")[0], flags, 1) if unknown else []
    if rest and (not words or close):
        parser.error(
            f"unrecognized arguments: {' '.join(rest)}."
            + (f" Did you mean {close[0]}?" if close else " `dinocomp COMMAND --help` lists what there is.")
        )
    if words:
        arguments.overrides += rest
    try:
        arguments.command.run(arguments)
    except DinocompError as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DataError) and getattr(arguments, "strict", False) else 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and every flag of every command."""
    parser = argparse.ArgumentParser(
        prog="dinocomp",
        description="DINOv2 training on Composer: what surrounds a run. To train: composer dinocomp/train.py YAML",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dinocomp {_version()}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    flags = ["--debug"]
    for name, command in _COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.TEXT, description=command.TEXT, allow_abbrev=False)
        command.add(sub)
        flags += re.findall(r"--[a-z-]+", sub.format_usage())
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        sub.set_defaults(command=command)
    return parser, flags


def _version() -> str:
    try:
        return metadata.version("dinocomp")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
