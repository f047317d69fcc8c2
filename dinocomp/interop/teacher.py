"""The teacher as one plain file: weights by their published names, and what it takes to use them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dinocomp.errors import WeightsError
from dinocomp.models import VisionTransformer

FORMAT = "dinocomp-teacher-1"


def save_teacher(
    path: Path,
    networks: Mapping[str, nn.Module],
    *,
    architecture: Mapping[str, Any],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    iteration: int,
    config: str,
) -> None:
    """Writes networks to a safetensors file, whole or not at all.

    Args:
        networks: by name: backbone, dino_head, ibot_head. Their weights get the name as a prefix (``backbone.``).
        architecture: arguments of `VisionTransformer`.
        mean, std: of the pixels that the backbone expects, by channel, in [0, 1].
        iteration: finished optimizer steps.
        config: the run's configuration as YAML.
    """
    tensors = {
        f"{prefix}.{name}": weight.detach().cpu().contiguous()
        for prefix, net in networks.items()
        for name, weight in net.state_dict().items()
    }
    about = {
        "format": FORMAT,
        "architecture": json.dumps(dict(architecture)),
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
        "iteration": str(iteration),
        "config": config,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata=about)
    partial.replace(path)


def read_teacher(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata of a file that `save_teacher` wrote.

    Raises:
        WeightsError: the file is missing, damaged or of another kind.
    """
    if not Path(path).is_file():
        raise WeightsError(f"no teacher file at {path}; a run writes OUTPUT/teacher.safetensors with each checkpoint")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise WeightsError(f"{path} is no whole safetensors file ({error}); export it again") from error
    if about.get("format") != FORMAT:
        raise WeightsError(
            f"{path} holds weights, but was not written by a dinocomp run (no '{FORMAT}' in its metadata); "
            "to start training from it, pass it as student.pretrained_weights"
        )
    return tensors, about


def load_teacher(path: str | Path) -> VisionTransformer:
    """The backbone of a run's teacher, ready to use.

    It is in eval mode, and carries the `mean` and `std` (lists, by channel) that its images are to be normalised with:
    (pixels / 255 - mean) / std.

    Args:
        path: a ``teacher.safetensors``.

    Raises:
        WeightsError: the file is missing, damaged or of another kind.
    """
    tensors, about = read_teacher(path)
    backbone = VisionTransformer(**json.loads(about["architecture"]))
    prefix = "backbone."
    backbone.load_state_dict({n.removeprefix(prefix): w for n, w in tensors.items() if n.startswith(prefix)})
    backbone.mean, backbone.std = json.loads(about["mean"]), json.loads(about["std"])
    return backbone.eval()
