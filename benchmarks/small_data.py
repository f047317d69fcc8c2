"""What makes DINOv2 learn from few images: one change at a time, several seeds, as a table.

    python -m benchmarks.small_data digits --seeds 0 1 2 --record docs/small-data.jsonl
    python -m benchmarks.small_data emoji --data /data/emoji --seeds 0 1 2 --record docs/small-data.jsonl
    python -m benchmarks.small_data emoji --data /data/emoji --times 6 --record docs/small-data.jsonl
    python -m benchmarks.small_data --record docs/small-data.jsonl --table

Each row is a run of `benchmarks/small_data/SET.yaml`, which holds what makes it small (network, crop and batch sizes,
length) and is otherwise the reference's recipe, with the words of the row. What is recorded already is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.record import cpu_model

_HERE = Path(__file__).parent
_EPOCHS, _EVERY = 10, 125  # official epochs, and iterations from one evaluation to the next, in each set's YAML
SETS = ("digits", "emoji", "fashion", "cifar10")

# What each row adds to the set's YAML: the reference's way, ours, then ours with one thing changed.
_OURS = "recipes=[small_data]"
_AUTO_CROPS = "crops.global_crops_size=auto crops.local_crops_size=auto"
_TINY = "student.embed_dim=192 student.depth=12 student.num_heads=3"  # ViT-Ti
_SMALL = "student.embed_dim=384 student.depth=12 student.num_heads=6"  # ViT-S
ROWS = {
    "reference": "",
    "reference, sinkhorn": "recipes=[sinkhorn]",
    "small_data": _OURS,
    "pos_embed_std 0.02": f"{_OURS} student.pos_embed_std=0.02",
    "linear_init normal_0.02": f"{_OURS} student.linear_init=normal_0.02",
    "both": f"{_OURS} student.pos_embed_std=0.02 student.linear_init=normal_0.02",
    "momentum 0.9": f"{_OURS} teacher.momentum_teacher=0.9",
    "layerscale 1e-5": f"{_OURS} student.layerscale=1e-5",
    "centering": f"{_OURS} train.centering=centering",
    "KoLeo 0.1": f"{_OURS} dino.koleo_loss_weight=0.1",
    "KoLeo 1": f"{_OURS} dino.koleo_loss_weight=1",
    "no KoLeo": f"{_OURS} dino.koleo_loss_weight=0",
    "4,096 prototypes": f"{_OURS} dino.head_n_prototypes=4096",
    "reference's crops and colours": f"{_OURS} crops.global_crops_scale=[0.32,1.0] crops.local_crops_scale=[0.05,0.32]"
    " crops.color_jitter_probability=0.8 crops.grayscale_probability=0.2 crops.blur_probability=[0.0,0.9,0.5]"
    " crops.solarize_probability=0.2",
    "reference's decays and drop path": f"{_OURS} optim.layerwise_decay=0.9 optim.patch_embed_lr_mult=0.2"
    " optim.weight_decay_end=0.4 student.drop_path_rate=0.3",
    "crops as auto": f"{_OURS} {_AUTO_CROPS}",
    "crops as auto, no blur": f"{_OURS} {_AUTO_CROPS} student.pos_embed_blur=0",
    "crops as auto, patches of 16": f"{_OURS} {_AUTO_CROPS} student.patch_size=16",
    "patches of 4": f"{_OURS} student.patch_size=4",
    "patches of 4, no blur": f"{_OURS} student.patch_size=4 student.pos_embed_blur=0",
    "no DINO": f"{_OURS} dino.loss_weight=0",
    "no iBOT": f"{_OURS} ibot.loss_weight=0",
    "KoLeo alone": f"{_OURS} dino.loss_weight=0 ibot.loss_weight=0",
    "milder crops": f"{_OURS} crops.global_crops_scale=[0.7,1.0] crops.local_crops_scale=[0.3,0.7]",
    "batch of 32, twice as long": f"{_OURS} train.batch_size_per_gpu=32 optim.epochs=20",
    "reference, ViT-Ti": _TINY,
    "small_data, ViT-Ti": f"{_OURS} {_TINY}",
    "small_data, ViT-S at the rate of 256 images": f"{_OURS} {_SMALL} optim.base_lr=0.004",  # twice that of 64
}
# Rows that say something of some sets alone: others have no larger images, or are cut into small patches anyway.
ONLY = {row: ("emoji",) for row in ROWS if row.startswith("crops as auto")}
ONLY |= {row: ("emoji", "cifar10") for row in ROWS if row.startswith("patches of 4")}
# What a set needs whatever the row: no colours where there are none, and smaller crops than images, so that a run takes
# two minutes on one core.
NEEDS = {
    "digits": "crops.color_jitter_probability=0",
    "emoji": "crops.global_crops_size=32 crops.local_crops_size=16",
    "fashion": "crops.color_jitter_probability=0",
    "cifar10": "",
}


def train(
    name: str, row: str, seed: int, data: str, images: int | None, times: int, more: Sequence[str]
) -> dict[str, Any]:
    """One run on one core, and what it was worth: k-NN accuracies of the first k by iteration.

    Args:
        images: how many `data` holds, where it is a part of the set; only recorded.
        times: how many times as long as the set's YAML (or the row) says; evaluated as often.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    words = [
        *NEEDS[name].split(),
        *lengthened(ROWS[row].split(), times),
        *([f"train.dataset_path={data}"] if data else []),
        *more,
        f"train.seed={seed}",
    ]
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dinocomp.train", str(_HERE / "small_data" / f"{name}.yaml"), *words]
        start = time.monotonic()
        done = subprocess.run(
            [*command, f"train.output_dir={folder}/run"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{name}, {row}, seed {seed}: {(done.stderr or done.stdout)[-1000:]}")
        lines = [json.loads(line) for line in Path(folder, "run", "evaluation.jsonl").read_text().splitlines()]
    accuracy = {str(line["iteration"]): next(iter(line["knn_top1"].values())) for line in lines}
    pixels = next((next(iter(line["pixels_top1"].values())) for line in lines if line.get("pixels_top1")), None)
    return {
        "set": name,
        "row": row,
        "images": images,
        "times": times,
        "words": ROWS[row],
        "more": list(more),
        "seed": seed,
        "knn": accuracy,
        "pixels": pixels,
        "seconds": round(time.monotonic() - start),
        "cpu": cpu_model(),
    }


def lengthened(words: Sequence[str], times: int) -> list[str]:
    """The words of a run, and those that make it longer."""
    if times == 1:
        return list(words)
    epochs = int(dict(word.split("=", 1) for word in words).get("optim.epochs", _EPOCHS))
    return [
        *(word for word in words if not word.startswith("optim.epochs=")),
        f"optim.epochs={times * epochs}",
        f"evaluation.eval_period_iterations={times * _EVERY}",
    ]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table for each set and length: accuracy at the start, half-way and at the end, its spread over seeds,
    and how far it has ever been below its best until then.

    Raises:
        ValueError: runs of a row were evaluated at different iterations.
    """
    return "\n".join(
        _table(name, times, [record for record in records if (record["set"], record["times"]) == (name, times)])
        for name in dict.fromkeys(record["set"] for record in records)
        for times in sorted({record["times"] for record in records if record["set"] == name})
    )


def _table(name: str, times: int, records: Sequence[Mapping[str, Any]]) -> str:
    """The table of one set and length."""
    known = [record["pixels"] for record in records if record["pixels"] is not None]
    lines = [
        f"**{name}**"
        + (f", {times} times as long" if times > 1 else "")
        + (f"; raw pixels {100 * known[0]:.1f} %" if known else "")
        + "\n",
        "| row | start | half-way | end | seeds | largest fall |",
        "|---|---|---|---|---|---|",
    ]
    parts = sorted({record["images"] for record in records if record["images"]})
    for row, images in product(ROWS, [*parts, None]):
        runs = [record["knn"] for record in records if (record["row"], record["images"]) == (row, images)]
        if not runs:
            continue
        if any(run.keys() != runs[0].keys() for run in runs):
            raise ValueError(f"{name}, {row}: runs were evaluated at different iterations")
        scores = [[100 * score for score in run.values()] for run in runs]
        ends = [run[-1] for run in scores]
        fall = max(best - score for run in scores for best, score in zip(accumulate(run, max), run, strict=True))
        cells = [mean(run[at] for run in scores) for at in (0, (len(scores[0]) - 1) // 2, -1)]
        spread = f"{min(ends):.1f}..{max(ends):.1f} ({len(ends)})" if len(ends) > 1 else "one"
        shown = " | ".join(f"{cell:.1f}" for cell in cells)
        label = f"{row}, of {images:,} images" if images else row
        lines.append(f"| {label} | {shown} | {spread} | {fall:.1f} |")
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """What was recorded, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", choices=SETS)
    parser.add_argument("--data", default="", metavar="PATH", help="the set's images (digits need none)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, metavar="N", help="how many --data holds, where it is a part of the set")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="how many times as long each run is")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on one core")
    parser.add_argument("--record", type=Path, required=True, metavar="FILE", help="each run adds a line of JSON")
    parser.add_argument("--table", action="store_true", help="print what is recorded, run nothing")
    parser.add_argument("more", nargs="*", metavar="key=value", help="for every run")
    given = parser.parse_intermixed_args()
    if given.table:
        print(table(read(given.record)))
        return
    if given.set is None:
        parser.error("name a set, or type --table")
    rows = given.rows or [row for row in ROWS if given.set in ONLY.get(row, SETS)]
    found = read(given.record)
    alike = [record for record in found if (record["set"], record["images"]) == (given.set, given.images)]
    if other := [record["more"] for record in alike if record["more"] != given.more]:
        parser.error(
            f"{given.record} holds runs with other settings ({' '.join(other[0]) or 'none'}): give another file"
        )
    recorded = {(record["row"], record["seed"]) for record in alike if record["times"] == given.times}
    wanted = [(row, seed) for seed in given.seeds for row in rows if (row, seed) not in recorded]

    def run(job: tuple[str, int]) -> None:
        found = train(given.set, *job, given.data, given.images, given.times, given.more)
        with given.record.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{given.set} {job[0]}, seed {job[1]}: {100 * list(found['knn'].values())[-1]:.1f} %", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(run, wanted))


if __name__ == "__main__":
    main()
