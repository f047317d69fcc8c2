"""`dinocomp convert`: images to shards."""

import argparse
from pathlib import Path

from dinocomp.commands.types import fraction, positive
from dinocomp.errors import DataError

TEXT = "write images to shards, once"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="image folder, ImageNet layout, tars, ImageNet:… string, or digits")
    parser.add_argument("dst", metavar="DST", help="folder for the shards")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes that write (default: one a core)")
    parser.add_argument("--max-size", type=positive, metavar="N", help="shrink images whose shorter side exceeds N px")
    parser.add_argument("--compression", choices=("zstd",), help="compress shards")
    parser.add_argument("--strict", action="store_true", help="fail (exit 1) on an unreadable image, not leave it out")
    parser.add_argument("--val-fraction", type=fraction, default=0.0, metavar="F", help="hold out this part as val")


def run(arguments: argparse.Namespace) -> None:
    from dinocomp.data.convert import convert  # imports streaming, which other commands do without

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
