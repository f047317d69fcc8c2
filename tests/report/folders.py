"""Folders like those of runs, without training."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinocomp.config import load_config, to_yaml

PROTOTYPES = 128  # of the quickstart's heads


def line(iteration: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl, as a healthy run has them; a change is named with __ for the slash."""
    decay = math.exp(-iteration / 200)
    numbers = {
        "iteration": iteration,
        "loss/total": 6 + 3 * decay,
        "loss/dino_global": 1.3 + decay,
        "loss/ibot": 4.7 + 2 * decay,
        "grad_norm/backbone": 4 + 10 * decay,
        "teacher/feature_std": 0.9,
        "teacher/entropy_dino": 3.2,
        "teacher/prototypes_dino": 120.0,
        "lr": 1e-4 * decay,
        "weight_decay": 0.04,
        "bad_steps": 0,
        "bad_images": 0,
        "images_per_second": 200.0,
        "seconds_per_iteration": 0.5,
        "data_wait": 0.01,
        "memory_gb": 1.0,
    }
    return numbers | {name.replace("__", "/"): value for name, value in changes.items()}


def write_run(
    folder: Path,
    *,
    lines: list[dict[str, Any]] | None = None,
    knn: dict[int, float] | None = None,
    pixels: float | None = None,
    status: str | None = "finished",
    pictures: tuple[int, ...] = (),
    warnings: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    **facts: Any,
) -> Path:
    """A run of the quickstart's 1,000 iterations.

    Args:
        knn: accuracy by iteration.
        pixels: accuracy of raw pixels, measured at iteration 0.
        status: None for a run without run.json.
        pictures: iterations that have them.
        words: `key=value`, of its configuration.
        facts: more of run.json.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config("quickstart", words).config))
    lines = [line(i) for i in range(10, 1001, 10)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    knn = {0: 0.5, 500: 0.8, 1000: 0.85} if knn is None else knn
    evaluations = [
        {"iteration": i, "knn_top1": {"10": value, "20": value - 0.01}, "label_free": {"rankme": 20 + i / 100}}
        for i, value in knn.items()
    ]
    if pixels is not None:
        evaluations[0]["pixels_top1"] = {"10": pixels, "20": pixels - 0.01}
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(each) + "\n" for each in evaluations))
    (folder / "train.log").write_text(
        "".join(f"2026-01-02 03:04:{i % 60:02d},000 warning: {text}\n" for i, text in enumerate(warnings))
    )
    (folder / "teacher.safetensors").write_bytes(b"weights")
    if status:
        known = {
            "command": "composer dinocomp/train.py quickstart",
            "status": status,
            "started": "2026-01-02T03:00:00+00:00",
            "updated": "2026-01-02T03:10:00+00:00",
            "iteration": lines[-1]["iteration"] if lines else 0,
            "iterations": 1000,
            "world_size": 1,
            "parameters": {"backbone": 342240},
            "data": {"path": "digits", "images": 1438, "classes": 10, "labelled": True},
            "evaluation": {"train": "train", "train_images": 1438, "val": "val", "val_images": 359},
        }
        (folder / "run.json").write_text(json.dumps(known | facts))
    random = np.random.default_rng(0)
    for iteration in pictures:
        place = folder / "pictures" / f"iteration-{iteration:08d}"
        place.mkdir(parents=True)
        for kind in ("pca", "attention"):
            pixels = random.integers(0, 255, (20, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{kind}.png")
    return folder
