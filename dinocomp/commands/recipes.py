"""`dinocomp recipes`: what can be stacked on a run."""

import argparse

TEXT = "list recipes, or show one"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe to show")


def run(arguments: argparse.Namespace) -> None:
    from dinocomp.config.files import find, first_comment, shipped

    if arguments.name:
        path, _ = find(arguments.name, "recipes")
        print(path.read_text(encoding="utf-8"), end="")
        return
    known = shipped("recipes")
    width = max(map(len, known))
    for name, path in known.items():
        print(f"{name:<{width}}  {first_comment(path)}")
