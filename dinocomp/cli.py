"""The `dinocomp` command: convert images, plan a run, look at recipes."""

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from dinocomp.errors import DataError, DinocompError
from dinocomp.hints import nearest

_FLAGS = (
    *("--world-size", "--gpu-memory", "--full"),
    *("--workers", "--max-size", "--compression", "--strict", "--val-fraction", "--debug"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 images refused by `convert --strict`, 2 a mistake to mend."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    flags = [word for word in rest if word.startswith("-")] if arguments.command is _plan else rest
    close = nearest(flags[0].partition("=")[0], _FLAGS, 1) if flags else []
    if rest and (arguments.command is not _plan or close):
        parser.error(
            f"unrecognized arguments: {' '.join(rest)}."
            + (f" Did you mean {close[0]}?" if close else " `dinocomp COMMAND --help` lists what there is.")
        )
    if arguments.command is _plan:
        arguments.overrides += rest
    try:
        arguments.command(arguments)
    except DinocompError as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DataError) and getattr(arguments, "strict", False) else 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinocomp",
        description="DINOv2 training on Composer: what surrounds a run. To train: composer dinocomp/train.py YAML",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dinocomp {_version()}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        sub.set_defaults(command=function)
        return sub

    convert = command("convert", _convert, "write images to shards, once")
    convert.add_argument("src", metavar="SRC", help="image folder, ImageNet layout, tars, ImageNet:… string, or digits")
    convert.add_argument("dst", metavar="DST", help="folder for the shards")
    convert.add_argument("--workers", type=_positive, metavar="N", help="processes that write (default: one a core)")
    convert.add_argument(
        "--max-size", type=_positive, metavar="N", help="shrink images whose shorter side exceeds N px"
    )
    convert.add_argument("--compression", choices=("zstd",), help="compress shards")
    convert.add_argument("--strict", action="store_true", help="fail (exit 1) on an unreadable image, not leave it out")
    convert.add_argument("--val-fraction", type=_fraction, default=0.0, metavar="F", help="hold out this part as val")

    plan = command("plan", _plan, "say what a run would be, without training")
    plan.add_argument("yaml", metavar="YAML", help="a path, or the name of a shipped run")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="settings, and recipes=[a,b]")
    plan.add_argument("--world-size", type=_positive, default=1, metavar="N", help="training processes (default 1)")
    plan.add_argument(
        "--gpu-memory", type=_size, metavar="GB", help="memory of each GPU (GB): say whether the run fits, or what does"
    )
    plan.add_argument(
        "--full", action="store_true", help="list every key, not only those that differ from the defaults"
    )

    recipes = command("recipes", _recipes, "list recipes, or show one")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="recipe to show")
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    from dinocomp.data.convert import convert  # imports streaming, which the other commands do without

    for name in (arguments.src, arguments.dst):
        if "://" in name:
            raise DataError(
                f"{name}: images are converted from and to local folders. Convert to one, and copy that to the store "
                "(aws s3 cp --recursive FOLDER s3://bucket/path, and the like)"
            )
    src, dst = (Path(name).expanduser().resolve() for name in (arguments.src, arguments.dst))
    if src.is_dir() and src in (dst, *dst.parents):
        raise DataError(
            f"{arguments.dst} lies in {arguments.src}, and shards among the images would change what that folder is "
            f"taken for. Give a folder beside it, such as {arguments.src.rstrip('/')}-shards"
        )

    report = convert(
        arguments.src,
        arguments.dst,
        workers=arguments.workers,
        max_size=arguments.max_size,
        compression=arguments.compression,
        strict=arguments.strict,
        val_fraction=arguments.val_fraction,
    )
    print(report.summary())


def _plan(arguments: argparse.Namespace) -> None:
    from dinocomp.config import load_config, split_arguments
    from dinocomp.config.plan import describe

    loaded = load_config(*split_arguments([arguments.yaml, *arguments.overrides]))

    from dinocomp.build import count_parameters, plan_memory  # slow imports come after the settings are found right
    from dinocomp.data import count_images

    config = loaded.config
    dataset_size, note = None, ""
    try:
        dataset_size = count_images(config.train.dataset_path, config.data.cache_dir)
    except DinocompError as error:  # a plan is useful before the images are there
        note = str(error)
    print(
        describe(
            loaded,
            arguments.world_size,
            dataset_size,
            count_parameters(config),
            full=arguments.full,
            dataset_note=note,
            memory=plan_memory(
                config, arguments.world_size, None if arguments.gpu_memory is None else arguments.gpu_memory * 1e9
            ),
        ),
        end="",
    )


def _recipes(arguments: argparse.Namespace) -> None:
    from dinocomp.config.files import find, first_comment, shipped

    if arguments.name:
        path, _ = find(arguments.name, "recipes")
        print(path.read_text(encoding="utf-8"), end="")
        return
    known = shipped("recipes")
    width = max(map(len, known))
    for name, path in known.items():
        print(f"{name:<{width}}  {first_comment(path)}")


def _version() -> str:
    try:
        return metadata.version("dinocomp")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes above 0, such as 80")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
