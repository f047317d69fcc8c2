"""Distillation: what the frozen teacher's file says of it, and what a student must have in common with it.

Of the file only the header is read, so that a plan takes no time and nothing here needs torch.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from dinocomp.config.derive import first_phase, head_sizes, prototypes
from dinocomp.config.schema import Config
from dinocomp.errors import WeightsError
from dinocomp.hints import missing

_HEADS = ("dino_head", "ibot_head")
_LAST = "last_layer.weight_v"  # [K, bottleneck]


@dataclass(frozen=True)
class FrozenTeacher:
    """A run's teacher.safetensors, by its header.

    Attributes:
        architecture: arguments of `VisionTransformer`.
        prototypes: K of each of its heads ("dino_head", "ibot_head").
        parameters: by network ("backbone", "dino_head", "ibot_head").
        mean, std: of the pixels that it expects.
        knows_patches: whether it was trained with iBOT, so that a head of it can teach patches.
    """

    path: Path
    architecture: Mapping[str, Any]
    prototypes: Mapping[str, int]
    parameters: Mapping[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    knows_patches: bool


def read_frozen_teacher(name: str) -> FrozenTeacher:
    """What the file of `teacher.distil_from` holds.

    Raises:
        WeightsError: it is missing, damaged, or no teacher of a run with its heads.
    """
    path = Path(name).expanduser()
    if "://" in name:
        raise WeightsError(
            f"teacher.distil_from={name}: the teacher is read from a file. Download it and give its path"
        )
    if path.is_dir() and (path / "teacher.safetensors").is_file():
        raise WeightsError(
            f"teacher.distil_from={name} is a folder; type teacher.distil_from={path}/teacher.safetensors"
        )
    if not path.is_file():
        reason = "this is a folder." if path.exists() else missing(path)
        raise WeightsError(f"teacher.distil_from={name}: {reason} Give a run's teacher.safetensors")
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            shapes = {n: file.get_slice(n).get_shape() for n in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        about, shapes = {}, {}
        if path.suffix == ".safetensors":
            raise WeightsError(f"teacher.distil_from={name} is no whole safetensors file ({error})") from error
    found = {head: shapes[f"{head}.{_LAST}"][0] for head in _HEADS if f"{head}.{_LAST}" in shapes}
    if "architecture" not in about or not found:
        raise WeightsError(
            f"teacher.distil_from={name} is no teacher.safetensors of a run with its heads. What a student is to "
            "predict are the prototypes of the teacher's heads, and a backbone alone (published weights, say) has "
            f"none. Train heads on it first: recipes=[from_pretrained] student.pretrained_weights={name} with "
            "optim.freeze_backbone_epochs as large as optim.epochs, see docs/distillation.md"
        )
    parameters = dict.fromkeys(("backbone", *found), 0)
    for tensor, shape in shapes.items():
        parameters[tensor.partition(".")[0]] += math.prod(shape)
    mean, std = (tuple(json.loads(about[key])) for key in ("mean", "std"))
    knows_patches = (yaml.safe_load(about.get("config", "")) or {}).get("ibot", {}).get("loss_weight", 1) > 0
    return FrozenTeacher(path, json.loads(about["architecture"]), found, parameters, mean, std, knows_patches)


def frozen_teacher(config: Config) -> FrozenTeacher | None:
    """The frozen teacher that a configuration names, seen to go with it; None where nothing is distilled.

    Raises:
        WeightsError: as `read_frozen_teacher`, or naming all settings that do not go with the file.
    """
    if not config.teacher.distil_from:
        return None
    teacher = read_frozen_teacher(config.teacher.distil_from)
    if found := list(_misfits(config, teacher)):
        raise WeightsError(f"teacher.distil_from={config.teacher.distil_from}: " + "; ".join(found))
    return teacher


def prototypes_of(config: Config, teacher: FrozenTeacher) -> dict[str, int]:
    """The teacher's prototypes by loss that is on ("dino", "ibot"); patches take its iBOT head, if it has one."""
    by_loss = {"dino": ("dino_head",), "ibot": ("ibot_head", "dino_head")}
    heads = {loss: next((h for h in by_loss[loss] if h in teacher.prototypes), None) for loss in prototypes(config)}
    return {loss: teacher.prototypes[head] for loss, head in heads.items() if head}


def follow(config: Config, given: Collection[str]) -> tuple[Config, list[str]]:
    """The student's heads as the frozen teacher's file has them, where the configuration leaves them open.

    Args:
        given: keys that were set, to more than `auto`.

    Returns:
        the configuration, and the keys that have been taken from the file.

    Raises:
        WeightsError: as `read_frozen_teacher`.
    """
    ours = {"dino.head_n_prototypes", "ibot.separate_head", "ibot.head_n_prototypes"} - set(given)
    if not config.teacher.distil_from or not ours:
        return config, []
    teacher = read_frozen_teacher(config.teacher.distil_from)
    changed = {"ibot.separate_head": "ibot_head" in teacher.prototypes}
    for section, head in (("dino", "dino_head"), ("ibot", "ibot_head")):
        if head in teacher.prototypes:
            changed[f"{section}.head_n_prototypes"] = teacher.prototypes[head]
    taken = []
    for name in sorted(ours & set(changed)):
        section, key = name.split(".")
        part = getattr(config, section)
        if getattr(part, key) != changed[name]:
            config = replace(config, **{section: replace(part, **{key: changed[name]})})
            taken.append(name)
    return config, taken


def _misfits(config: Config, teacher: FrozenTeacher) -> Iterator[str]:
    """What is wrong, and what to type."""
    theirs, heads = prototypes_of(config, teacher), head_sizes(config)
    for loss, ours in prototypes(config).items():
        section = "ibot" if loss == "ibot" and "ibot_head" in heads else "dino"
        if loss not in theirs:
            yield f"it has no head for {loss}; type {loss}.loss_weight=0"
        elif theirs[loss] != ours:
            yield (
                f"its head for {loss} has {theirs[loss]} prototypes, the student's {ours}; "
                f"type {section}.head_n_prototypes={theirs[loss]}"
                + (" ibot.separate_head=true" if loss == "ibot" and section == "dino" and "dino" in theirs else "")
            )
    if config.ibot.loss_weight and not teacher.knows_patches:
        yield "it was trained with ibot.loss_weight=0, and its head never saw a patch; type ibot.loss_weight=0"
    if (channels := teacher.architecture.get("in_chans", 3)) != 3:
        yield f"it sees {channels} channels, and images have 3"
    patch, ours = teacher.architecture["patch_size"], config.student.patch_size
    phase = first_phase(config)
    sides = {"crops.global_crops_size": config.crops.global_crops_size}
    if phase:
        sides["curriculum.global_crops_size"] = phase[1].crops.global_crops_size
    if config.ibot.loss_weight and patch != ours:
        yield (
            f"its patches have {patch} px, the student's {ours}, and iBOT compares them one by one; type "
            f"student.patch_size={patch} (with crops of whole patches), or ibot.loss_weight=0"
        )
    for name, side in sides.items():
        if side % patch:
            yield f"its patches of {patch} px do not tile {side} px; type {name}={max(side // patch, 1) * patch}"
    for name in ("mean", "std"):
        if not all(map(math.isclose, getattr(teacher, name), getattr(config.crops, name))):
            numbers = ",".join(f"{number:g}" for number in getattr(teacher, name))
            yield f"it was trained with another crops.{name}; type crops.{name}=[{numbers}]"
