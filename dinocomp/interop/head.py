"""The DINO head of a run's teacher."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dinocomp.interop.teacher import FORMAT
from dinocomp.models import DINOHead

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
    linear = [name for name in tensors if name.startswith("mlp.") and name.endswith("weight")]
    prototypes, bottleneck = tensors["last_layer.weight_v"].shape
    first = tensors[linear[0]]  # [hidden, D], or [bottleneck, D] of a single layer
    head = DINOHead(
        json.loads(about["architecture"])["embed_dim"],
        prototypes,
        hidden_dim=first.shape[0],
        bottleneck_dim=bottleneck,
        nlayers=len(linear),
    )
    head.load_state_dict(tensors)
    return head.eval().requires_grad_(False), about["config"]
