"""The teacher as one plain file: weights by their published names, and what it takes to use them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinocomp.errors import WeightsError
from dinocomp.models import VisionTransformer

FORMAT = "dinocomp-teacher-1"


def save_teacher(
    path: Path,
    networks: Mapping[str, Mapping[str, Tensor]],
    *,
    architecture: Mapping[str, Any],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    view: tuple[int, int],
    iteration: int,
    config: str,
    distilled_from: str = "",
) -> None:
    """Writes networks to a safetensors file, whole or not at all.

    Args:
        networks: the weights of each by name (backbone, dino_head, ibot_head), which becomes their prefix
            (``backbone.``).
        architecture: arguments of `VisionTransformer`.
        mean, std: of the pixels that the backbone expects, by channel, in [0, 1].
        view: `resize` and `crop` of `evaluation_view`, in pixels.
        iteration: finished optimizer steps.
        config: the run's configuration as YAML.
        distilled_from: fingerprint of the file that it was distilled from; '' for none.
    """
    tensors = {
        f"{prefix}.{name}": weight.detach().cpu().contiguous()
        for prefix, weights in networks.items()
        for name, weight in weights.items()
    }
    about = {
        "format": FORMAT,
        "architecture": json.dumps(dict(architecture)),
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
        "view": json.dumps(list(view)),
        "iteration": str(iteration),
        "config": config,
    }
    if distilled_from:
        about["distilled_from"] = distilled_from
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata=about)
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)  # safetensors writes for the owner alone
    partial.replace(path)


def read_teacher(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata of a file that `save_teacher` wrote.

    Raises:
        WeightsError: the file is missing, damaged or of another kind.
    """
    about = read_about(path)
    try:
        return load_file(path), about
    except SafetensorError as error:
        raise WeightsError(f"{path} is no whole safetensors file ({error}); export it again") from error


def read_about(path: str | Path) -> dict[str, str]:
    """The metadata alone.

    Raises:
        WeightsError: as `read_teacher`.
    """
    if not Path(path).is_file():
        raise WeightsError(f"no teacher file at {path}; a run writes OUTPUT/teacher.safetensors with each checkpoint")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{path} is no whole safetensors file ({error}); export it again") from error
    if about.get("format") != FORMAT:
        raise WeightsError(
            f"{path} holds weights, but was not written by a dinocomp run (no '{FORMAT}' in its metadata); "
            "to start training from it, pass it as student.pretrained_weights"
        )
    return about


def load_teacher(path: str | Path) -> VisionTransformer:
    """The backbone of a run's teacher, in eval mode, wanting no gradients (see `load`, which adds its preprocessing).

    It carries `mean` and `std` (lists, by channel), with which its images are normalised as
    (pixels / 255 - mean) / std, and `view` (pixels to resize and to crop to).

    Args:
        path: a ``teacher.safetensors``.

    Raises:
        WeightsError: the file is missing, damaged or of another kind.
    """
    tensors, about = read_teacher(path)
    backbone = VisionTransformer(**json.loads(about["architecture"]))
    prefix = "backbone."
    backbone.load_state_dict({n.removeprefix(prefix): w for n, w in tensors.items() if n.startswith(prefix)})
    backbone.mean, backbone.std, backbone.view = (json.loads(about[name]) for name in ("mean", "std", "view"))
    return backbone.eval().requires_grad_(False)
