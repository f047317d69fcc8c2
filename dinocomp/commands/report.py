"""`dinocomp report`: a run on one page."""

import argparse
from pathlib import Path

TEXT = "write report.html, a run on one page, from the files in its folder"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's train.output_dir, or a copy of it")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to write it (default: report.html in the run's folder)"
    )


def run(arguments: argparse.Namespace) -> None:
    from dinocomp.errors import DataError
    from dinocomp.report import write_report

    try:
        path = write_report(arguments.run, arguments.output)
    except OSError as error:
        raise DataError(f"the page cannot be written: {error}; give another place with --output FILE") from error
    print(path)
