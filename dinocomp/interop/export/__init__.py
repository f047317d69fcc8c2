"""Weights out: files that load with nothing but the target library."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

import dinocomp
from dinocomp.errors import WeightsError
from dinocomp.hints import obstacle
from dinocomp.interop.backbone import open_backbone
from dinocomp.interop.export.card import write_card
from dinocomp.interop.export.differences import differences, in_words
from dinocomp.interop.export.facts import facts_of
from dinocomp.interop.export.graphs import write_onnx, write_torch
from dinocomp.interop.export.hub import write_hub, write_safetensors
from dinocomp.interop.export.hugging_face import write_hugging_face
from dinocomp.interop.export.parts import Subject, Written, subject_of
from dinocomp.interop.export.timm import write_timm

_TARGETS: dict[str, Callable[[Subject, Path], Written]] = {
    "hub": write_hub,
    "hf": write_hugging_face,
    "timm": write_timm,
    "onnx": write_onnx,
    "safetensors": write_safetensors,
    "torch": write_torch,
}
OF_ONE_SIZE = ("onnx", "torch")


def export(source: str, target: str, folder: str | Path, size: int | None = None) -> str:
    """Writes a backbone for another library, with its preprocessing and a model card, whole or not at all.

    Args:
        source: of `open_backbone`; a network of dinocomp's.
        target: hub, hf, timm, onnx, safetensors or torch.
        folder: must not hold anything.
        size: side in pixels of the images, for onnx and torch; by default that of training.

    Returns:
        What differs from the network at other image sizes, in words; "" where that cannot be.

    Raises:
        WeightsError: there is no such backbone, the target cannot say what it is, or the folder cannot be written.
    """
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    if size and target not in OF_ONE_SIZE:
        raise WeightsError(f"--to {target} takes images of any size; leave out --size, which is for onnx and torch")
    if folder.is_dir() and any(folder.iterdir()):
        raise WeightsError(f"{folder} is not empty; give another folder, or empty it")
    if reason := obstacle(folder):
        raise WeightsError(f"{folder} cannot be written: {reason}; give another folder")
    subject = subject_of(open_backbone(source), source, size)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        written = _TARGETS[target](subject, partial)
        found = differences(subject, written.resampling) if written.resampling else []
        card = write_card(subject, written, facts_of(source), found, dinocomp.__version__)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be written: {error}; make room, or give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return in_words(written.resampling, found) if written.resampling else ""
