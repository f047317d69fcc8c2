"""The heads of a run's teacher, and the whole of it, to learn from."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dinocomp.interop.teacher import FORMAT, read_teacher
from dinocomp.models import DINOHead, VisionTransformer

_PREFIX = "dino_head."


def load_dino_head(path: str | Path) -> tuple[DINOHead, str] | None:
    """The head in eval mode, and the run's configuration as YAML; None where a file of weights has no such head.

    Args:
        path: a file, of whatever kind.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            names = [name for name in file.keys() if name.startswith(_PREFIX)]  # noqa: SIM118 (not a mapping)
            tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError):
        return None
    if about.get("format") != FORMAT or not tensors:
        return None
    return _head(tensors, json.loads(about["architecture"])["embed_dim"]), about["config"]


def load_target(path: str | Path, *, kernel: str = "auto") -> dict[str, nn.Module]:
    """A run's teacher, backbone and heads, by name, in eval mode and without gradients.

    Args:
        path: a ``teacher.safetensors``.
        kernel: of its attention; see `VisionTransformer`.

    Raises:
        WeightsError: as `read_teacher`.
    """
    tensors, about = read_teacher(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        network, _, weight = name.partition(".")
        parts.setdefault(network, {})[weight] = tensor
    backbone = VisionTransformer(**json.loads(about["architecture"]), kernel=kernel)
    backbone.load_state_dict(parts.pop("backbone"))
    heads = {name: _head(part, backbone.embed_dim) for name, part in sorted(parts.items())}
    return {"backbone": backbone.eval().requires_grad_(False), **heads}


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(Path(path).expanduser(), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _head(tensors: Mapping[str, Tensor], embed_dim: int) -> DINOHead:
    linear = [name for name in tensors if name.startswith("mlp.") and name.endswith("weight")]
    prototypes, bottleneck = tensors["last_layer.weight_v"].shape
    first = tensors[linear[0]]  # [hidden, D], or [bottleneck, D] of a single layer
    head = DINOHead(embed_dim, prototypes, hidden_dim=first.shape[0], bottleneck_dim=bottleneck, nlayers=len(linear))
    head.load_state_dict(tensors)
    return head.eval().requires_grad_(False)
