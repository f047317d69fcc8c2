"""The facts of a run, for its page."""

import platform
from typing import Any

import composer
import torch
from composer.utils import dist

from dinocomp import __version__
from dinocomp.build.model import count_parameters
from dinocomp.build.start import Start
from dinocomp.config import Config, derive
from dinocomp.data import Images
from dinocomp.evaluate.online import LabelledPair


def run_facts(
    config: Config, start: Start, images: Images, pair: LabelledPair | None, command: str = ""
) -> dict[str, Any]:
    """What `run.json` says of the run from its start to its end.

    Args:
        images: what is trained on.
        pair: what is evaluated on.
        command: that the run was started with.
    """
    return {
        "command": command,
        "iterations": derive.total_iterations(config),
        "world_size": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if start.gpu else "cpu",
        "precision": start.precision,
        "strategy": start.strategy,
        "parameters": count_parameters(config),
        "data": {
            "path": images.path,
            "images": len(images),
            "classes": len(images.classes),
            "labelled": images.labelled,
        },
        "evaluation": pair
        and {
            "train": pair.train.path,
            "train_images": len(pair.train),
            "val": pair.val.path,
            "val_images": len(pair.val),
        },
        "versions": {
            "dinocomp": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "composer": composer.__version__,
        },
    }
