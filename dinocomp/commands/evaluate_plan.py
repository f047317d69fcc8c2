"""What `dinocomp evaluate` is to do: the weights, the images and the settings, from the command line."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dinocomp.checkpoints.folder import TEACHER
from dinocomp.commands.view import check_patches, choose_view
from dinocomp.config import Config, derive, load_config
from dinocomp.data import Images, evaluation_pair, open_images
from dinocomp.errors import ConfigError, DataError, WeightsError
from dinocomp.evaluate.features import AUTOCAST
from dinocomp.evaluate.linear import LinearSettings, Seen
from dinocomp.evaluate.plan import LABELLED, PROTOCOLS, KnnSettings, LogregSettings, Plan
from dinocomp.evaluate.segmentation import SegmentationSettings
from dinocomp.interop import Backbone, open_backbone, read_iteration
from dinocomp.method.pixels import Normalize
from dinocomp.output import CONFIG, LOG

_LOGREG_UP_TO = 100_000  # training images; beyond, it takes hours unless it is asked for

Say = Callable[[str], None]


def make_plan(arguments: argparse.Namespace, gpu: bool, say: Say) -> tuple[Backbone, Plan]:
    """The backbone, on its device, and what to do with it. On several ranks all must call it.

    Raises:
        DinocompError: the weights, the images or what is asked for do not go together.
    """
    config = _config_of(arguments.weights)
    backbone = open_backbone(arguments.weights)
    asked = arguments.protocols
    train, val = _open_pair(arguments, config) if asked is None or set(asked) & set(LABELLED) else (None, None)
    masks = _masks(arguments)
    protocols = _choose(arguments, train, val, masks, say)
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    backbone.to(device)
    precision = ("bf16" if gpu else "fp32") if arguments.precision == "auto" else arguments.precision
    resize, crop = choose_view(backbone.view, arguments.resize, arguments.crop)
    if arguments.crop or masks:  # networks of other libraries may look at less than whole patches
        check_patches("--crop", crop, backbone.patch_size)
    _check_size(backbone, crop)
    workers = arguments.workers
    if workers is None:
        workers = min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

    def seen(resize: int) -> Seen:
        return Seen(
            resize=resize,
            crop=crop,
            normalize=Normalize(backbone.mean, backbone.std).to(device),
            batch_size=arguments.batch_size,
            num_workers=workers,
            autocast=AUTOCAST[precision],
        )

    flip = arguments.linear_flip
    if flip is None:
        flip = config.crops.horizontal_flip_probability if config else 0.5
    known = {} if arguments.linear_rates is None else {"learning_rates": arguments.linear_rates}
    return backbone, Plan(
        weights=arguments.weights,
        identity=_identity(arguments.weights),
        iteration=_iteration(arguments.weights),
        protocols=protocols,
        seen=seen(resize),
        seen_masks=seen(arguments.resize or crop),  # all of the shorter side
        precision=precision,
        train=train,
        val=val,
        masks=masks,
        limit_train=arguments.limit_train,
        limit_val=arguments.limit_val,
        keep_features=arguments.keep_features,
        knn=KnnSettings(_ks(arguments, train), arguments.temperature, arguments.shots, arguments.tries),
        k_asked=arguments.k is not None,
        linear=LinearSettings(
            epochs=arguments.linear_epochs,
            iterations=arguments.linear_iterations or 0,
            batch_size=arguments.linear_batch or 0,
            blocks=_blocks(arguments, backbone, crop, say) if "linear" in protocols else (1,),
            select_on=arguments.select_on,
            views=arguments.linear_views,
            crop_scale=arguments.linear_crop_scale,
            flip=flip,
            seed=arguments.seed,
            save_iterations=arguments.linear_save_iterations,
            **known,
        ),
        logreg=LogregSettings(arguments.c_values, seed=arguments.seed, max_iterations=arguments.logreg_iterations),
        segmentation=SegmentationSettings(
            iterations=arguments.segmentation_iterations,
            batch_size=arguments.segmentation_batch,
            learning_rate=arguments.segmentation_rate,
            seed=arguments.seed,
        ),
    )


def _open_pair(arguments: argparse.Namespace, config: Config | None) -> tuple[Images | None, Images | None]:
    """(to fit to, to score); a single labelled set is the first; (None, None) where there is none at all."""

    opening: dict[str, Any] = {"cache_dir": arguments.cache_dir}
    given = {"--train": arguments.train, "--val": arguments.val}
    pair: tuple = (None, None)
    if arguments.train and arguments.val:
        pair = (
            open_images(arguments.train, split="train", **opening),
            open_images(arguments.val, split="val", **opening),
        )
    elif arguments.train:
        pair = evaluation_pair(arguments.train, **opening) or (
            open_images(arguments.train, split="train", **opening),
            None,
        )
    elif arguments.val:
        pair = (open_images(arguments.val, split="val", **opening), None)
    elif config is not None:
        opening = {
            "cache_dir": arguments.cache_dir or config.data.cache_dir,
            "cache_limit": derive.cache_limit(config),
        }
        evaluation = config.evaluation
        pair = evaluation_pair(
            config.train.dataset_path, evaluation.train_dataset_path, evaluation.val_dataset_path, **opening
        ) or (None, None)
    for images in pair:
        if images is not None and not images.labelled:
            flag = next(
                (name for name, path in given.items() if path and images.path.startswith(path)), "--train, --val"
            )
            raise DataError(
                f"{images.path} has no labels; give {flag} a folder with class folders, or shards made of one"
            )
    return pair


def _choose(arguments: argparse.Namespace, train: Any, val: Any, masks: Any, say: Say) -> tuple[str, ...]:
    """The protocols to go through, in their order."""
    asked = arguments.protocols
    if asked is None:
        chosen = list(LABELLED) if val is not None else ["retrieval"] if train is not None else []
        size = 0 if train is None else min(len(train), arguments.limit_train or len(train))
        if "logreg" in chosen and size > _LOGREG_UP_TO:
            chosen.remove("logreg")
            say(
                f"note: logistic regression on {size} images takes hours on a CPU and is left out; --protocols "
                "knn,linear,logreg,retrieval asks for it (--limit-train makes it short)"
            )
        asked = (*chosen, *(["segmentation"] if masks else []))
        if not asked:
            raise DataError(
                "there are no labelled images to evaluate with: give --train PATH and --val PATH (class folders, "
                "shards of them, or digits), or --segmentation-train and --segmentation-val"
            )
    if "segmentation" in asked and masks is None:
        raise DataError("segmentation needs masks: give --segmentation-train and --segmentation-val, both IMAGES:MASKS")
    if train is None and set(asked) & set(LABELLED):
        raise DataError(
            f"{', '.join(set(asked) & set(LABELLED))}: there are no labelled images; give --train and --val"
        )
    alone = [name for name in asked if name in LABELLED and name != "retrieval"]
    if val is None and alone:
        raise DataError(
            f"{', '.join(alone)}: there is one labelled set, {train.path}, to fit to, and none to score; give --train "
            "and --val (retrieval alone does with one, each image searching the others)"
        )
    return tuple(name for name in PROTOCOLS if name in asked)


def _ks(arguments: argparse.Namespace, train: Any) -> tuple[int, ...]:
    if arguments.k is None:
        return KnnSettings.ks  # of which those are left out that are too many for the images that can be decoded
    if train is None:
        return arguments.k
    size = min(len(train), arguments.limit_train or len(train))
    if max(arguments.k) > size:
        raise DataError(f"--k {max(arguments.k)} is more than the {size} images of train; give smaller ones")
    return tuple(dict.fromkeys(arguments.k))


def _blocks(arguments: argparse.Namespace, backbone: Any, crop: int, say: Say) -> tuple[int, ...]:
    depth = len(backbone.blocks) if hasattr(backbone, "blocks") else None  # all others have four at least
    asked = arguments.linear_blocks
    if depth is not None and max(asked or (1,)) > depth:
        raise ConfigError(f"--linear-blocks {max(asked)}: the backbone has {depth} blocks")
    blocks = tuple(dict.fromkeys(asked or (min(n, depth or n) for n in (1, 4))))
    if asked is None and depth is not None and depth < 4:
        say(f"note: the backbone has {depth} blocks, so heads see the last {' or '.join(map(str, blocks))}")
    widths = {cls.shape[-1] for _, cls in _forward(backbone, crop, max(blocks))}
    if len(widths) == 1:
        return blocks
    if asked is not None:
        raise ConfigError(
            f"--linear-blocks {max(asked)}: the last stages of this backbone are of different widths "
            f"({', '.join(map(str, sorted(widths)))}); type --linear-blocks 1"
        )
    say("note: the last stages of this backbone are of different widths, so heads see the last one alone")
    return (1,)


def _check_size(backbone: Any, crop: int) -> None:
    """Refuses images that a network of another library does not take."""
    try:
        _forward(backbone, crop, 1)
    except torch.OutOfMemoryError:  # a RuntimeError that tells nothing of the size that the backbone was made for
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the backbone takes no images of {crop} x {crop} pixels ({error}); it was made for {backbone.view[1]}: "
            "leave --crop out, or give another one"
        ) from error


@torch.no_grad()
def _forward(backbone: Any, crop: int, blocks: int) -> list:
    image = torch.zeros(1, 3, crop, crop, device=next(backbone.parameters()).device)
    return backbone.get_intermediate_layers(image, blocks)


def _masks(arguments: argparse.Namespace) -> tuple[str, str] | None:
    pair = (arguments.segmentation_train, arguments.segmentation_val)
    if bool(pair[0]) != bool(pair[1]):
        absent = "--segmentation-val" if pair[0] else "--segmentation-train"
        raise DataError(f"{absent} is missing: segmentation is fitted to one set of masks and scored on another")
    return pair if pair[0] else None


def run_of(weights: str) -> Path | None:
    """The folder of the run that the weights are, or lie in, if there is one."""
    path = Path(weights).expanduser()
    if path.exists():
        for folder in (path, *path.absolute().parents[:3]):  # RUN/evaluation/iteration-N/teacher.safetensors
            if (folder / CONFIG).is_file() and (folder / LOG).is_file():
                return folder
    return None


def _config_of(weights: str) -> Config | None:
    """Of the run that the weights are from, if it is there."""
    run = run_of(weights)
    return None if run is None else load_config(str(run / CONFIG)).config


def _identity(weights: str) -> list:
    """What changes when other weights come to lie at the same place."""
    how, path = _place(weights)
    if path is None:
        return [weights]
    if path.is_file():
        files = [path]
    elif (path / TEACHER).is_file():
        files = [path / TEACHER]
    else:  # Hugging Face's folders and checkpoints; of the latter the endings are many
        files = sorted(file for file in path.iterdir() if file.is_file())
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [how, str(path.resolve()), *states]


def _place(weights: str) -> tuple[str, Path | None]:
    """What `open_backbone` makes of them, and the file or folder that it reads; None for published ones."""
    how, text = "", weights
    if weights.startswith("timm:"):
        how, _, text = weights.partition("=")
    elif weights.startswith("hf:"):
        how, text = "hf:", weights.removeprefix("hf:")
    path = Path(text).expanduser()
    return how, path if text and path.exists() else None


def _iteration(weights: str) -> int | None:
    path = Path(weights).expanduser()
    if (path / "teacher.safetensors").is_file():
        path = path / "teacher.safetensors"
    try:
        return read_iteration(path) if path.exists() else None
    except WeightsError:  # published ones are of no iteration
        return None
