"""`dinocomp compare`: several runs on one page."""

import argparse
from pathlib import Path

TEXT = "write compare.html, several runs side by side, from the files in their folders"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="runs' folders, or copies of them")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("compare.html"),
        metavar="FILE",
        help="where to write it (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    from dinocomp.errors import DataError
    from dinocomp.report import read_run, render_comparison, write_page

    text = render_comparison([read_run(folder) for folder in arguments.runs])
    try:
        write_page(arguments.output, text)
    except OSError as error:
        raise DataError(f"the page cannot be written: {error}; give another place with --output FILE") from error
    print(arguments.output)
