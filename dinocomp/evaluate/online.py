"""What a run measures of its teacher while it trains, and the file that keeps it."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dinocomp.data import CropSettings, Images
from dinocomp.distributed import on_rank_0
from dinocomp.evaluate.choose import Chosen
from dinocomp.evaluate.features import Features, extract_features, gather_features
from dinocomp.evaluate.knn import knn_accuracy
from dinocomp.evaluate.label_free import extract_views, label_free_measures

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledPair:
    """Images whose labels are known, and images to guess them for."""

    train: Chosen
    val: Chosen


@dataclass(frozen=True)
class Evaluated:
    """What was found of the teacher of one iteration.

    Attributes:
        knn: k -> top-1 accuracy.
        label_free: name -> value, see `label_free_measures`.
        seconds: that it took, pictures included, raw pixels not.
        pixels: k -> top-1 accuracy of raw pixels, see `Thumbnails`; at iteration 0, where they were measured.
    """

    iteration: int
    knn: Mapping[int, float] = field(default_factory=dict)
    label_free: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    pixels: Mapping[int, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """What teachers are compared by: the accuracy of the first k; -1 where there is none."""
        return next(iter(self.knn.values()), -1.0)


def scores_of(found: Mapping[int, Evaluated], k: int) -> list[tuple[int, float]]:
    """Iterations and the teacher's accuracies with k neighbours, in order; processes may have asked for other k."""
    return [(i, evaluated.knn[k]) for i, evaluated in sorted(found.items()) if k in evaluated.knn]


def pixels_of(found: Mapping[int, Evaluated], k: int) -> float | None:
    """The accuracy of raw pixels with k neighbours; None where it was not measured."""
    return next((evaluated.pixels[k] for evaluated in found.values() if k in evaluated.pixels), None)


def measure_knn(
    backbone: torch.nn.Module,
    *,
    pair: LabelledPair,
    resize: int,
    crop: int,
    ks: Sequence[int],
    temperature: float,
    **loading: Any,
) -> dict[int, float]:
    """k-NN accuracy on a labelled pair, on all ranks together; see `extract_features` and `knn_accuracy`."""

    def features(images: Chosen) -> Features:
        return extract_features(backbone, images, resize=resize, crop=crop, **loading)

    return knn_accuracy(
        gather_features(features(pair.train), len(pair.train)),  # of this rank's share no copy stays
        features(pair.val),
        ks=ks,
        temperature=temperature,
        device=next(backbone.parameters()).device,
    )


def measure_label_free(
    backbone: torch.nn.Module,
    *,
    images: Images,
    count: int,
    views: int,
    settings: CropSettings,
    resize: int,
    **loading: Any,
) -> dict[str, float]:
    """Label-free measures on a fixed draw of images, on all ranks together; see `extract_views`."""
    found = extract_views(
        backbone, images, count=count, views=views, settings=settings, resize=resize, **loading
    )  # [n, 1 + V, D]
    if len(found) < 2:
        log.warning("label-free measures need two images at least; %d could be decoded", len(found))
        return {}
    if not torch.isfinite(found).all():
        log.warning("no label-free measures: the teacher's features are not finite")
        return {}
    return on_rank_0(lambda: label_free_measures(found))


def write_evaluations(path: Path, found: Mapping[int, Evaluated]) -> None:
    """One JSON object a line, whole or not at all."""
    lines = []
    for _, evaluated in sorted(found.items()):
        line: dict[str, Any] = {"iteration": evaluated.iteration}
        if evaluated.knn:
            line["knn_top1"] = dict(evaluated.knn)
        if evaluated.pixels:
            line["pixels_top1"] = dict(evaluated.pixels)
        if evaluated.label_free:
            line["label_free"] = dict(evaluated.label_free)
        lines.append(json.dumps(line | {"seconds": round(evaluated.seconds, 2)}) + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines))
    partial.replace(path)


def read_evaluations(path: Path) -> dict[int, Evaluated]:
    """What `write_evaluations` wrote, by iteration; nothing where there is no file."""
    found = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # a line that somebody or a full disk cut short: it is measured again
            continue
        knn, pixels = (
            {int(k): value for k, value in line.get(name, {}).items()} for name in ("knn_top1", "pixels_top1")
        )
        found[line["iteration"]] = Evaluated(
            line["iteration"], knn, line.get("label_free", {}), line.get("seconds", 0.0), pixels
        )
    return found
