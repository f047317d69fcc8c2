"""What is known of how weights came about: from the teacher's file, and the run's folder around it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dinocomp.interop.backbone import teacher_of
from dinocomp.interop.teacher import read_about
from dinocomp.report.record import CONFIG, FACTS, RunRecord, read_run

_ABOVE = 3  # folders between a run's and a teacher's: evaluation/iteration-N/teacher.safetensors


@dataclass(frozen=True)
class Facts:
    """Of the weights that are exported; all but `source` may be unknown.

    Attributes:
        source: their name, for people.
        iteration: finished steps.
        config: the run's configuration as YAML.
        data, images: where the training data were, and how many.
        images_per_step: over all processes.
        steps: of the whole run.
        knn: top-1 accuracy by the number of neighbours, measured after `knn_iteration` steps.
        evaluated: images that were searched and that were scored.
    """

    source: str
    iteration: int | None = None
    config: str = ""
    data: str = ""
    images: int | None = None
    images_per_step: int | None = None
    steps: int | None = None
    knn: dict[str, float] = field(default_factory=dict)
    knn_iteration: int | None = None
    evaluated: tuple[int | None, int | None] = (None, None)


def facts_of(source: str) -> Facts:
    """What is known of a source of `open_backbone`."""
    path = Path(source).expanduser()
    teacher = teacher_of(path)
    if teacher is None:
        return Facts(path.name or source)
    about = read_about(teacher)
    iteration = int(about["iteration"])
    record = _run_around(teacher)
    settings = _settings(about["config"])
    name = f"{record.name}/{teacher.resolve().relative_to(record.folder)}" if record else teacher.name
    train = settings.get("train", {})
    data, evaluation = (record.part("data"), record.part("evaluation")) if record else ({}, {})
    world_size = record.facts.get("world_size") if record else None
    per_process = train.get("batch_size_per_gpu")
    knn, when = _knn(record, iteration) if record else ({}, None)
    return Facts(
        name,
        iteration,
        about["config"],
        data.get("path") or train.get("dataset_path", ""),
        data.get("images"),
        per_process * world_size if per_process and world_size else None,
        (record.iterations if record else 0) or None,
        knn,
        when,
        (evaluation.get("train_images"), evaluation.get("val_images")),
    )


def _settings(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _run_around(teacher: Path) -> RunRecord | None:
    for folder in list(teacher.resolve().parents)[:_ABOVE]:
        if any((folder / name).is_file() for name in (FACTS, CONFIG)):
            return read_run(folder)
    return None


def _knn(record: RunRecord, iteration: int) -> tuple[dict[str, float], int | None]:
    """The newest accuracy that is not of later weights."""
    table = record.evaluations
    columns = [name for name in table if name.startswith("knn_top1/")]
    for row in reversed(range(len(table.get("iteration", ())))):
        when = int(table["iteration"][row])
        found = {name.partition("/")[2]: float(table[name][row]) for name in columns if np.isfinite(table[name][row])}
        if when <= iteration and found:
            return found, when
    return {}, None


def architecture_in_words(architecture: dict[str, Any], parameters: int) -> str:
    """One line about the network."""
    about = architecture
    registers = f", {about['num_register_tokens']} registers" if about["num_register_tokens"] else ""
    return (
        f"vision transformer, width {about['embed_dim']}, {about['depth']} blocks, {about['num_heads']} heads, patches "
        f"of {about['patch_size']} px{registers}, FFN {about['ffn_layer']}; {parameters / 1e6:.3g} M parameters; "
        f"trained at {about['img_size']} px"
    )
