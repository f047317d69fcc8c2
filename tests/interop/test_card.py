"""The model card of an export, filled from a run."""

import json
from pathlib import Path

import yaml

from dinocomp.config import load_config, to_yaml
from dinocomp.interop.export import export
from tests.helpers import words
from tests.interop.exported import make_teacher


def make_run(folder: Path) -> None:
    """A run's folder with a teacher after 250 of 1,000 steps."""
    config = to_yaml(load_config(None, words(folder, optim__epochs=250)).config)
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    facts = {
        "status": "running",
        "world_size": 4,
        "iterations": 1000,
        "data": {"path": "/data/photos", "images": 12345, "classes": 0, "labelled": False},
        "evaluation": {"train_images": 1438, "val_images": 359},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    lines = [{"iteration": i, "knn_top1": {"10": 0.5 + i / 1000, "20": 0.4}} for i in (0, 200, 400)]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_teacher(folder / "teacher.safetensors", config)
    make_teacher(folder / "evaluation" / "iteration-00000250" / "teacher.safetensors", config)


def test_a_run_fills_it(tmp_path: Path) -> None:
    make_run(tmp_path / "photos")
    export(str(tmp_path / "photos"), "hf", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] is None and head["library_name"] == "transformers"
    assert "license: # FILL IN before publishing" in card and "Licence: not stated" in card
    assert "# photos/teacher.safetensors\n" in card
    assert "| training images | data/photos (12,345 images) |" in card
    assert "| training steps | 250 of 1,000, of 32 images each |" in card
    accuracy = "70.0 % (k = 10), 40.0 % (k = 20); 1,438 images searched, 359 scored; measured after 200 steps"
    assert f"| k-NN accuracy of its class tokens | {accuracy} |" in card
    assert "width 24, 2 blocks, 3 heads, patches of 14 px, FFN mlp" in card and "trained at 56 px" in card
    assert "head_n_prototypes: 32" in card and "Relat" not in card and "(patches)" in card
    assert "shorter side to 64 pixels (bicubic, antialiased), middle 56 x 56" in card
    assert "mean 0.5, 0.4, 0.3 and std 0.2, 0.25, 0.3" in card


def test_a_teacher_deeper_in_a_run_and_one_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "photos")
    inner = Path("evaluation", "iteration-00000250", "teacher.safetensors")
    export(str(tmp_path / "photos" / inner), "hub", tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"# photos/{inner}\n" in card and "(12,345 images)" in card
    (tmp_path / "alone").mkdir()
    (tmp_path / "photos" / inner).rename(tmp_path / "alone" / "teacher.safetensors")
    export(str(tmp_path / "alone" / "teacher.safetensors"), "hub", tmp_path / "b")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| training images | digits |" in card and "| training steps | 250 |" in card, "its own metadata say so"
    assert "not measured while training" in card


def test_weights_of_others(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher.safetensors")
    export(str(tmp_path / "teacher.safetensors"), "safetensors", tmp_path / "first")
    export(str(tmp_path / "first" / "backbone.safetensors"), "hub", tmp_path / "second")
    card = (tmp_path / "second" / "README.md").read_text()
    assert "# backbone.safetensors\n" in card and "| training steps | not known |" in card
    assert "Configuration of the run" not in card
