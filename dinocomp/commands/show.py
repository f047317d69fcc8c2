"""`dinocomp show`: pictures of what a network makes of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dinocomp.checkpoints.folder import TEACHER
from dinocomp.commands.types import positive
from dinocomp.errors import ConfigError
from dinocomp.hints import missing, obstacle

if TYPE_CHECKING:
    import torch

    from dinocomp.data.few import Few

TEXT = "draw what a network makes of images: PCA of patches, attention, neighbours, a map, prototypes"
_KINDS = ("pca", "attention", "neighbours", "embedding", "prototypes", "curves")
_LIMIT = 2_000_000  # bytes of a picture


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN|WEIGHTS", help="a run's folder, or a file of weights")
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGES",
        help="image files, folders, shards, or digits (of a run: its validation images, or those it trained on)",
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the pictures (RUN/pictures/show, else pictures)")
    parser.add_argument(
        "--pictures",
        type=_kinds,
        metavar="NAMES",
        help=f"which, with commas (default all that can be): {','.join(_KINDS)}",
    )
    parser.add_argument("--size", type=positive, metavar="N", help="side at which patches are looked at, in pixels")
    parser.add_argument(
        "--resize", type=positive, metavar="N", help="shorter side that images are resized to, in pixels"
    )
    parser.add_argument("--crop", type=positive, metavar="N", help="side of the middle that is then cut out, in pixels")
    parser.add_argument("--number", type=positive, default=500, metavar="N", help="images at most (default 500)")
    parser.add_argument(
        "--closely", type=positive, default=12, metavar="N", help="of them, looked at patch by patch (default 12)"
    )
    parser.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (default: a GPU if there is one)"
    )


def _kinds(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in _KINDS:
            raise argparse.ArgumentTypeError(f"no picture {name!r}; there are {', '.join(_KINDS)}")
    if not names:
        raise argparse.ArgumentTypeError(f"no names; there are {', '.join(_KINDS)}")
    return names


def run(arguments: argparse.Namespace) -> None:
    source = Path(arguments.source).expanduser()
    if not source.exists():
        raise ConfigError(
            f"{missing(source)} Give a run's folder or a file of weights, such as RUN/teacher.safetensors"
        )
    of_run = (source / "config.yaml").is_file()
    output = Path(arguments.output).expanduser() if arguments.output else source / "pictures/show" if of_run else None
    output = output or Path("pictures")
    if reason := obstacle(output):
        raise ConfigError(f"pictures cannot be written to {output}: {reason}; give another folder with --output DIR")
    wanted, left_out = arguments.pictures or list(_KINDS), {}
    makers = {}
    if "curves" in wanted:
        if of_run:
            makers["curves"] = lambda: _curves(source)
        else:
            left_out["curves"] = f"{source} is no run's folder"
    if set(wanted) - {"curves"}:
        found, reasons = _looks(arguments, source, wanted, of_run)
        makers |= found
        left_out |= reasons
    impossible = [name for name in arguments.pictures or () if name not in makers]
    if impossible:
        raise ConfigError(f"--pictures {impossible[0]} cannot be drawn: {left_out[impossible[0]]}")
    from dinocomp.pictures.canvas import write_png

    for name in _KINDS:
        if name in wanted and name in makers:
            path = output / f"{name}.png"
            try:
                write_png(path, makers[name](), _LIMIT)
            except OSError as error:
                raise ConfigError(f"{path} cannot be written: {error}; make room, or give --output DIR") from error
            print(path)
        elif name in wanted and (of_run or name != "curves"):
            print(f"left out: {name} ({left_out[name]})")


def _curves(folder: Path):
    from dinocomp.pictures.curves import curves_picture, read_lines

    return curves_picture(read_lines(folder / "metrics.jsonl"), read_lines(folder / "evaluation.jsonl"))


def _looks(arguments: argparse.Namespace, source: Path, wanted: list[str], of_run: bool) -> tuple[dict, dict[str, str]]:
    """What draws each picture of the network, and why some cannot be drawn."""
    if not of_run and not arguments.images:
        raise ConfigError(f"no images to show to {source}: give image files, folders, shards, or digits behind it")
    weights = source / "teacher.safetensors" if of_run else source

    from dinocomp.interop import open_backbone
    from dinocomp.models import VisionTransformer
    from dinocomp.pictures.canvas import WIDTH
    from dinocomp.pictures.looks import look_at, makers

    device = _device(arguments.device)
    backbone = open_backbone(weights).to(device)
    view, size = _sizes(arguments, backbone)
    few = _images(arguments, source)
    if few.bad:
        print(f"{len(few.bad)} image(s) cannot be decoded and are left out: {few.bad[0]}")
    left_out: dict[str, str] = {}
    head, temperature, note = None, 1.0, ""
    if "prototypes" in wanted:
        head, temperature, note = _head(weights)
        if head is None:
            left_out["prototypes"] = f"{weights} has no DINO head; a run's teacher.safetensors has"
    own = isinstance(backbone, VisionTransformer)
    if not own:
        left_out["attention"] = f"it is drawn of dinocomp's own networks, this one is a {type(backbone).__name__}"
    if len(few.pixels) < 2:
        left_out["neighbours"] = "there is one image alone"
    if len(few.pixels) < 3:
        left_out["embedding"] = "a map takes three images"
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
        raise ConfigError(f"the features of {weights} are not finite: it is of a run that diverged; give other weights")
    return makers(looks, width=WIDTH), left_out


def _head(weights: Path):
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


def _images(arguments: argparse.Namespace, source: Path) -> Few:
    """Those that are named, or of a run the held-out ones, or those that it trains on."""
    from dinocomp.data.few import choose_images

    if arguments.images:
        return choose_images(arguments.images, arguments.number)
    from dinocomp.build.data import opening
    from dinocomp.config import load_config
    from dinocomp.data import evaluation_pair, open_images

    config = load_config(str(source / "config.yaml")).config
    keys, how = config.evaluation, opening(config)
    pair = evaluation_pair(config.train.dataset_path, keys.train_dataset_path, keys.val_dataset_path, **how)
    images = pair[1] if pair else open_images(config.train.dataset_path, split="train", **how)
    return choose_images([images], arguments.number)


def _sizes(arguments: argparse.Namespace, backbone) -> tuple[tuple[int, int], int]:
    """The view (resize, crop), and the side at which patches are looked at, all in pixels."""
    resize, crop = backbone.view
    if arguments.crop:
        resize, crop = round(resize * arguments.crop / crop), arguments.crop
    resize = arguments.resize or resize
    size, patch = arguments.size or crop, backbone.patch_size
    for key, pixels in (("--crop", crop), ("--size", size)):
        if pixels % patch:
            below = pixels // patch * patch
            fitting = " or ".join(str(n) for n in (below, below + patch) if n)
            raise ConfigError(f"{key} {pixels} is no whole number of patches of {patch} pixels; type {key} {fitting}")
    if resize < crop:
        raise ConfigError(f"--resize {resize} is smaller than the crop of {crop} pixels; type --resize {crop} or more")
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
