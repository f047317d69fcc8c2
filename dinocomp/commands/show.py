"""`dinocomp show`: pictures of what a network makes of images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dinocomp.commands.types import positive
from dinocomp.commands.view import check_patches, choose_view
from dinocomp.errors import ConfigError
from dinocomp.hints import obstacle

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from dinocomp.data.few import Few
    from dinocomp.interop import Backbone
    from dinocomp.models import DINOHead

    Makers = dict[str, Callable[[], Image]]

TEXT = "draw what a network makes of images: PCA of patches, attention, neighbours, a map, prototypes"
_KINDS = ("pca", "attention", "neighbours", "embedding", "prototypes", "curves")
_LIMIT = 2_000_000  # bytes of a picture


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="RUN|WEIGHTS", help="a run's folder, a file of weights, or timm:NAME, hf:FOLDER and the like"
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGES",
        help="image files, folders, shards, or digits (of a run: its validation images, or those it trained on)",
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the pictures (RUN/pictures/show, else pictures)")
    parser.add_argument(
        "--pictures", type=_kinds, metavar="NAMES", help=f"of {','.join(_KINDS)}, with commas (all that can be)"
    )
    parser.add_argument("--size", type=positive, metavar="N", help="side at which patches are looked at (pixels)")
    parser.add_argument("--resize", type=positive, metavar="N", help="shorter side that images get (pixels)")
    parser.add_argument("--crop", type=positive, metavar="N", help="side of the middle that is then cut out (pixels)")
    parser.add_argument("--number", type=positive, default=500, metavar="N", help="images at most (500)")
    parser.add_argument(
        "--closely", type=positive, default=12, metavar="N", help="of them, looked at patch by patch (12)"
    )
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (a GPU if there is one)")


def _kinds(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        if name not in _KINDS:
            raise argparse.ArgumentTypeError(f"no picture {name!r}; there are {', '.join(_KINDS)}")
    return names


def run(arguments: argparse.Namespace) -> None:
    source = Path(arguments.source).expanduser()
    of_run = (source / "config.yaml").is_file()
    output = source / "pictures" / "show" if of_run else Path("pictures")
    if arguments.output:
        output = Path(arguments.output).expanduser()
    if reason := obstacle(output):
        raise ConfigError(f"pictures cannot be written to {output}: {reason}; give another folder with --output DIR")
    wanted = arguments.pictures or [name for name in _KINDS if of_run or name != "curves"]
    makers: Makers = {}
    why_not: dict[str, str] = {}
    if "curves" in wanted and of_run:
        makers["curves"] = lambda: _curves(source)
    elif "curves" in wanted:
        why_not["curves"] = f"{arguments.source} is no run's folder"
    if wanted != ["curves"]:
        found, reasons = _of_network(arguments, source if of_run else None, wanted)
        makers |= found
        why_not |= reasons
    for name in arguments.pictures or ():
        if name not in makers:
            raise ConfigError(f"--pictures {name} cannot be drawn: {why_not[name]}")
    from dinocomp.pictures.canvas import write_png

    for name in filter(wanted.__contains__, _KINDS):
        path = output / f"{name}.png"
        if name not in makers:
            print(f"left out: {name} ({why_not[name]})")
            continue
        try:
            write_png(path, makers[name](), _LIMIT)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}; make room, or give --output DIR") from error
        print(path)


def _curves(folder: Path) -> Image:
    from dinocomp.pictures.curves import curves_picture, read_lines

    return curves_picture(read_lines(folder / "metrics.jsonl"), read_lines(folder / "evaluation.jsonl"))


def _of_network(arguments: argparse.Namespace, folder: Path | None, wanted: list[str]) -> tuple[Makers, dict[str, str]]:
    """What draws each picture of a network, of a run in `folder` perhaps, and why some cannot be drawn."""
    if not folder and not arguments.images:
        raise ConfigError(
            f"no images to show to {arguments.source}: give image files, folders, shards, or digits behind it"
        )

    from dinocomp.checkpoints.folder import TEACHER
    from dinocomp.interop import open_backbone
    from dinocomp.models import VisionTransformer
    from dinocomp.pictures.canvas import WIDTH
    from dinocomp.pictures.looks import look_at, makers

    if folder and not (folder / TEACHER).is_file():
        raise ConfigError(
            f"{folder} has no {TEACHER} yet: a run writes it with its first checkpoint. Until then there are "
            "--pictures curves"
        )
    weights = str(folder / TEACHER) if folder else arguments.source
    device = _device(arguments.device)
    backbone = open_backbone(weights).to(device)
    view, size = _sizes(arguments, backbone)
    few = _images(arguments, folder)
    if few.bad:
        print(f"{len(few.bad)} image(s) cannot be decoded and are left out, the first: {few.bad[0]}")
    why_not: dict[str, str] = {}
    head, temperature, note = _head(weights) if "prototypes" in wanted else (None, 1.0, "")
    if head is None:
        why_not["prototypes"] = f"{weights} has no DINO head; a run's {TEACHER} has one"
    own = isinstance(backbone, VisionTransformer)
    if not own:
        why_not["attention"] = f"it is drawn of dinocomp's own networks, this one is a {type(backbone).__name__}"
    if len(few.pixels) < 2:
        why_not["neighbours"] = "there is one image alone"
    if len(few.pixels) < 3:
        why_not["embedding"] = "a map takes three images"
    looks = look_at(
        backbone,
        few.pixels,
        few.labels,
        few.classes,
        view=view,
        size=size,
        closely=min(arguments.closely, len(few.pixels)),
        with_attention=own and "attention" in wanted,
        head=None if head is None else head.to(device),
        temperature=temperature,
        note=note,
    )
    if not looks.finite:
        raise ConfigError(f"the features of {weights} are not finite: its training diverged; give other weights")
    return makers(looks, width=WIDTH), why_not


def _head(weights: str) -> tuple[DINOHead | None, float, str]:
    """A teacher's head, the temperature of its softmax, and what is to be said of it."""
    import yaml

    from dinocomp.config.schema import Teacher
    from dinocomp.interop.head import load_dino_head

    found = load_dino_head(weights)
    if found is None:
        return None, 1.0, ""
    config = yaml.safe_load(found[1]) or {}
    temperature = config.get("teacher", {}).get("teacher_temp", Teacher().teacher_temp)
    centred = config.get("train", {}).get("centering") == "centering"
    return found[0], temperature, "Without the running centre, which the file does not hold." if centred else ""


def _images(arguments: argparse.Namespace, folder: Path | None) -> Few:
    """Those that are named, or of a run the held-out ones, or those that it trains on."""
    from dinocomp.data.few import choose_images

    if arguments.images:
        return choose_images(arguments.images, arguments.number)
    from dinocomp.build.data import opening
    from dinocomp.config import load_config
    from dinocomp.data import evaluation_pair, open_images

    config = load_config(str(folder / "config.yaml")).config
    keys, how = config.evaluation, opening(config)
    pair = evaluation_pair(config.train.dataset_path, keys.train_dataset_path, keys.val_dataset_path, **how)
    images = pair[1] if pair else open_images(config.train.dataset_path, split="train", **how)
    return choose_images([images], arguments.number)


def _sizes(arguments: argparse.Namespace, backbone: Backbone) -> tuple[tuple[int, int], int]:
    """The view (resize, crop), and the side at which patches are looked at, all in pixels."""
    resize, crop = choose_view(backbone.view, arguments.resize, arguments.crop)
    size = arguments.size or crop
    for flag, pixels in (("--crop", crop), ("--size", size)):
        check_patches(flag, pixels, backbone.patch_size)
    return (resize, crop), size


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used ({reason}); type --device cpu") from error
    return device
