"""Curves of several runs side by side, for docs/small-data.md: python docs/small_data.py OUT.png TITLE=RUN …

A column for each run; a row each for its k-NN accuracy, what was measured without labels (effective ranks as shares of
the features' width, and the neighbours that stay when crops change), its loss and its targets' entropy as shares of
log K (at 1 the student says nothing and the targets teach nothing), and the spread of its features (at 0 they are all
the same).
"""

import json
import math
import sys
from pathlib import Path

import yaml
from matplotlib.figure import Figure

FREE = {"neighbour_consistency": "tab:purple", "rankme": "tab:brown", "lidar": "tab:olive"}  # measure -> colour


def lines(path: Path) -> list[dict]:
    """The objects of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(runs: dict[str, Path]) -> Figure:
    """A figure of five rows, and a column for each run's folder."""
    figure = Figure(figsize=(2.9 * len(runs), 10), layout="constrained")
    axes = figure.subplots(5, len(runs), sharex="col", sharey="row", squeeze=False)
    for column, (title, run) in enumerate(runs.items()):
        knn, free, loss, entropy, spread = axes[:, column]
        metrics, evaluations = lines(run / "metrics.jsonl"), lines(run / "evaluation.jsonl")
        config = yaml.safe_load((run / "config.yaml").read_text())
        separate = config["ibot"]["separate_head"]
        tops = {name: math.log(config[name if separate else "dino"]["head_n_prototypes"]) for name in ("dino", "ibot")}
        at = [line["iteration"] for line in metrics]
        scored = [(line["iteration"], *line["knn_top1"].values()) for line in evaluations if line.get("knn_top1")]
        knn.plot([score[0] for score in scored], [100 * score[1] for score in scored], "o-", color="tab:blue")
        for line in evaluations:
            if line.get("pixels_top1"):
                pixels = 100 * next(iter(line["pixels_top1"].values()))
                knn.axhline(pixels, color="grey", linestyle="--", linewidth=1)
                knn.annotate("raw pixels", (0, pixels), fontsize=7, color="grey", va="bottom")
        knn.set_title(title, fontsize=10)
        measured = [(line["iteration"], line["label_free"]) for line in evaluations if line.get("label_free")]
        for name, colour in FREE.items():
            most = 1 if name == "neighbour_consistency" else config["student"]["embed_dim"]
            shown = {iteration: found[name] / most for iteration, found in measured if name in found}
            free.plot(shown.keys(), shown.values(), "o-", color=colour, label=name.replace("_", " "), markersize=3)
        if weight := config["dino"]["loss_weight"]:
            values = [line["loss/dino_global"] + line.get("loss/dino_local", 0.0) for line in metrics]
            loss.plot(at, [value / weight / tops["dino"] for value in values], color="tab:red")
        for name, colour in (("dino", "tab:red"), ("ibot", "tab:orange")):
            if config[name]["loss_weight"]:
                values = [line.get(f"teacher/entropy_{name}", math.nan) / tops[name] for line in metrics]
                entropy.plot(at, values, color=colour, label=f"{name} targets")
        spread.plot(at, [line["teacher/feature_std"] for line in metrics], color="tab:green")
        for axis in (free, loss, entropy, spread):
            axis.set_ylim(0, 1.1)
        loss.axhline(1.0, color="grey", linestyle=":", linewidth=1)
        spread.set_xlabel("iteration")
    names = ("k-NN, %", "without labels", "DINO loss / log K", "entropy / log K", "spread")
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name)
    axes[0, 0].set_ylim(0, 1.08 * axes[0, 0].get_ylim()[1])  # room for the line's name
    axes[1, 0].legend(fontsize=7)
    axes[3, 0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in word for word in sys.argv[2:]):
        sys.exit(__doc__)
    draw({title: Path(run) for title, _, run in (word.partition("=") for word in sys.argv[2:])}).savefig(
        sys.argv[1], dpi=90
    )
