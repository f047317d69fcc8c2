"""A run small enough for a test."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dinocomp.checkpoints.folder import STATE
from dinocomp.checkpoints.manifest import folder_name

ROOT = Path(__file__).parents[1]

TINY = {
    "train.dataset_path": "digits",
    "train.batch_size_per_gpu": 8,
    "train.num_workers": 0,
    "train.OFFICIAL_EPOCH_LENGTH": 4,
    "train.device": "cpu",
    "student.arch": "custom",
    "student.embed_dim": 24,
    "student.depth": 2,
    "student.num_heads": 3,
    "student.patch_size": 4,
    "student.drop_path_rate": 0.3,
    "dino.head_n_prototypes": 32,
    "dino.head_hidden_dim": 32,
    "dino.head_bottleneck_dim": 16,
    "ibot.head_n_prototypes": 24,
    "ibot.head_hidden_dim": 32,
    "ibot.head_bottleneck_dim": 16,
    "crops.global_crops_size": 16,
    "crops.local_crops_size": 8,
    "crops.local_crops_number": 2,
    "optim.epochs": 3,
    "optim.warmup_epochs": 1,
    "teacher.warmup_teacher_temp_epochs": 1,
    "evaluation.eval_period_iterations": 100,
    "evaluation.knn_k": "[5]",
    "evaluation.budget": 1,
    "evaluation.pictures": "false",
    "loggers.report": "false",
    "checkpoint.save_frequency": 1,
    "loggers.period_iterations": 1,
}

# Smaller crops up to the 7th of a tiny run's 12 iterations, of 3 x 3 patches.
CURRICULUM = {
    "curriculum__fraction": 0.6,
    "curriculum__global_crops_size": 12,
    "curriculum__local_crops_size": 8,
}


def words(output: Path, **changes) -> list[str]:
    """`key=value` words of a run of 12 iterations on digits; a change is named like its key, with __ for the dot."""
    keys = TINY | {"train.output_dir": output} | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in keys.items()]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for `condition`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it has not come true")
        time.sleep(0.01)


def yaml_of_nothing(folder: Path) -> str:
    """A YAML that changes nothing, for runs that are all words."""
    path = folder / "run.yaml"
    path.write_text("train:\n  seed: 0\n")
    return str(path)


def metrics(output: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def load_checkpoint(output: Path, iteration: int) -> dict:
    """What Composer saved of a run."""
    path = output / "checkpoints" / folder_name(iteration) / STATE
    return torch.load(path, map_location="cpu", weights_only=False)


def weights(output: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of the model and the optimizer in a checkpoint, and the random states, by place."""
    found = {}

    def walk(node: object, place: str) -> None:
        if isinstance(node, torch.Tensor):
            found[place] = node
        elif isinstance(node, dict | list):
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                walk(value, f"{place}/{key}")

    saved = load_checkpoint(output, iteration)
    walk({"model": saved["state"]["model"], "optimizers": saved["state"]["optimizers"], "rng": saved["rng"]}, "")
    return found


def small_folder(folder: Path, number: int = 40) -> Path:
    """`number` of the digits as PNG files."""
    folder.mkdir()
    for i, image in enumerate(load_digits().images[:number]):
        Image.fromarray((image * 15).astype("uint8")).save(folder / f"{i:03d}.png")
    return folder


def launch(
    *arguments: str, processes: int = 1, flags: tuple[str, ...] = (), script: str = "dinocomp/train.py"
) -> subprocess.CompletedProcess:
    """`composer -n processes [flags] script ...` from a checkout."""
    launcher = Path(sys.executable).with_name("composer")
    command = [launcher, "-n", str(processes), *flags, script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)


def random_states() -> tuple:
    """Where the three global generators stand."""
    kind, key, position, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), kind, key.tobytes(), position, rest, random.getstate()
