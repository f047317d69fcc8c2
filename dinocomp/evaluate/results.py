"""What is known of some weights: a file that grows with each protocol, and a table of it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinocomp.evaluate.confusion import confusion_matrix, to_csv, worst_classes

RESULTS, CONFUSION = "results.json", "confusion.csv"
_ON_MASKS = "segmentation"  # the protocol that has images of its own
_OF_IMAGES = ("train", "train_images", "val", "val_images")


def fingerprint(*parts: Any) -> str:
    """A mark of everything that a result is a function of."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Results:
    """`results.json` in `folder`, and predictions beside it. For rank 0.

    What an earlier call has found of the same weights and images stays, whichever protocols this one is for.

    Args:
        facts: what else the file is to say.
        weights, images: marks of what is measured; `images` are the labelled ones, None where there are none.

    Attributes:
        content: of the file: `facts`, and ``protocols`` (name -> measurements, ``headline``, ``settings``,
            ``made_with``, ``of``); ``confusion``; ``features`` (``seconds`` that they took, of
            so many ``images``); and ``table``, what people want to see of it.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], *, weights: str, images: str | None) -> None:
        self.folder = folder
        self.weights, self.images = weights, images
        try:
            earlier = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or cut short: all is measured again
            earlier = {}
        protocols = {name: result for name, result in earlier.get("protocols", {}).items() if self._is_of(name, result)}
        labelled = any(name != _ON_MASKS for name in protocols)
        if images is None and labelled:
            facts |= {name: earlier[name] for name in _OF_IMAGES if name in earlier}
        kept = {name: earlier[name] for name in ("confusion", "features") if labelled and name in earlier}
        self.content: dict[str, Any] = facts | {"protocols": protocols} | kept

    def _is_of(self, name: str, result: dict[str, Any]) -> bool:
        """Whether an earlier result is of the same weights and images."""
        weights, images = result.get("of", (None, None))
        return weights == self.weights and (name == _ON_MASKS or self.images in (None, images))

    def keep(self, made_with: dict[str, str]) -> list[str]:
        """Drops earlier results with other settings of the protocols given; gives those that are done."""
        protocols = self.content["protocols"]
        done = [name for name, mark in made_with.items() if protocols.get(name, {}).get("made_with") == mark]
        for name in made_with:
            if name not in done:
                protocols.pop(name, None)
        if self.content.get("confusion", {}).get("protocol") not in self.content["protocols"]:
            self.content.pop("confusion", None)
        return done

    def put(self, name: str, result: dict[str, Any], labels: Tensor | None = None, predicted: Tensor | None = None):
        """Adds a protocol and writes the file, whole or not at all; also its predictions, int64 [m], if it has any."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if predicted is not None:
            path = self._predictions(name)
            path.parent.mkdir(exist_ok=True)
            with path.with_suffix(".partial").open("wb") as file:
                np.save(file, torch.stack([labels, predicted]).numpy())  # [2, m]
            path.with_suffix(".partial").replace(path)
        self.content["protocols"][name] = result | {"of": [self.weights, None if name == _ON_MASKS else self.images]}
        self.content["protocols"] = dict(sorted(self.content["protocols"].items()))
        self.write()

    def add_confusion(self, names: Sequence[str]) -> None:
        """Adds the worst classes by the protocol with the best top-1 accuracy, and writes all confusions.

        Args:
            names: of the classes, by label.
        """
        scored = {
            name: result["headline"]["value"]
            for name, result in self.content["protocols"].items()
            if self._predictions(name).is_file() and "top1" in result
        }
        if not scored:
            return
        best = max(scored, key=scored.get)
        labels, predicted = torch.from_numpy(np.load(self._predictions(best)))
        matrix = confusion_matrix(labels, predicted, len(names))
        self.content["confusion"] = {"protocol": best, "worst_classes": worst_classes(matrix, names)}
        partial = self.folder / f"{CONFUSION}.partial"
        partial.write_text(to_csv(matrix, names), encoding="utf-8")
        partial.replace(self.folder / CONFUSION)
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.content["table"] = table_rows(self.content["protocols"])
        partial = self.folder / f"{RESULTS}.partial"
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.folder / RESULTS)

    def _predictions(self, name: str) -> Path:
        return self.folder / "predictions" / f"{name}.npy"


def table(content: dict[str, Any]) -> str:
    """The results for people, as lines."""
    iteration = f" (iteration {content['iteration']})" if content.get("iteration") is not None else ""
    lines = [f"{content['weights']}{iteration}"]
    for split in ("train", "val"):
        if content.get(split):
            lines.append(f"{split}: {content[split]}, {content[f'{split}_images']} images")
    rows = table_rows(content["protocols"])
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines.append("")
    for name, measure, value in rows:
        lines.append(f"{name:<{widths[0]}}  {measure:<{widths[1]}}  {value:>{widths[2]}}".rstrip())
    if confusion := content.get("confusion"):
        lines += ["", f"classes that are recognised least often ({confusion['protocol']}):"]
        width = max((len(row["class"]) for row in confusion["worst_classes"]), default=0)
        for row in confusion["worst_classes"]:
            others = ", ".join(f"{o['class']} ({o['share']:.1%})" for o in row["taken_for"])
            lines.append(f"  {row['class']:<{width}}  {row['recall']:6.1%} of {row['images']}, taken for {others}")
        if not confusion["worst_classes"]:
            lines.append("  none: all are recognised always")
    return "\n".join(lines)


def table_rows(protocols: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(protocol, measure, value) of what people want to see; the protocol in the first row of each alone."""
    return [row for name, result in protocols.items() for row in _rows(name, result)]


def _rows(name: str, result: dict[str, Any]) -> list[tuple[str, str, str]]:
    if name == "knn":
        rows = [(f"top-1, top-5 (k={k})", f"{v:.1%}, {result['top5'][k]:.1%}") for k, v in result["top1"].items()]
        for shots, of_k in result.get("few_shot", {}).items():
            for k, value in of_k.items():
                measure = f"top-1 ({shots} of each class, k={k}, {value['tries']} tries)"
                rows.append((measure, f"{value['mean']:.1%} ± {value['std']:.1%}"))
    elif name == "linear":
        head = result["chosen"]
        seen = f"last {head['blocks']} block(s){', mean patch' if head['avgpool'] else ''}"
        rows = [
            (f"top-1, top-5 ({seen}, learning rate {head['learning_rate']:g})", _two(result)),
            (f"  head selected on {result['selected_on']}", ""),
        ]
    elif name == "logreg":
        rows = [(f"top-1, top-5 (C={result['C']:.3g}{'' if result['converged'] else ', not converged'})", _two(result))]
    elif name == "retrieval":
        kind = "leave-one-out" if result["leave_one_out"] else "val searches train"
        rows = [(f"mAP ({kind})", f"{result['map']:.1%}")]
        rows += [(f"recall@{k}", f"{value:.1%}") for k, value in result["recall"].items()]
    else:
        rows = [
            (f"mIoU ({result['classes']} classes)", f"{result['miou']:.1%}"),
            ("pixel accuracy", f"{result['pixel_accuracy']:.1%}"),
        ]
    return [(name if i == 0 else "", *row) for i, row in enumerate(rows)]


def _two(result: dict[str, Any]) -> str:
    return f"{result['top1']:.1%}, {result['top5']:.1%}"
