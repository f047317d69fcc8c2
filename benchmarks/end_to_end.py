"""Whole runs on JPEG shards, and the same runs on one batch that is there already: what waiting for data costs.

    python -m benchmarks.end_to_end yamls/vits16.yaml train.num_workers=16 [recipes=[device_augment]] [--json FILE]

Composer's trainer trains as it does for users; images a second and the share of time spent waiting are those of
metrics.jsonl. Without a run's name: a tiny network on whole crops, for a CPU.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer.utils import dist, reproducibility
from torch.utils.data import DataLoader

from benchmarks.photographs import write_shards
from benchmarks.record import write
from dinocomp.build import build_loader, build_model, build_training, check_start, join_processes, on_gpu
from dinocomp.build.data import training_images
from dinocomp.config import Config, load_config
from dinocomp.data import Batch

_WINDOW = 5  # iterations of a line in metrics.jsonl
_WARM_UP = 2  # lines that do not count
_TINY = {
    "student.arch": "custom",
    "student.embed_dim": 96,
    "student.depth": 2,
    "student.num_heads": 3,
    "dino.head_n_prototypes": 1024,
    "dino.head_hidden_dim": 256,
    "dino.head_bottleneck_dim": 64,
    "train.batch_size_per_gpu": 16,
    "train.num_workers": 1,
}


class FixedBatch:
    """A loader's first batch, as often as the loader has batches; pinned where the loader pins."""

    def __init__(self, loader: DataLoader) -> None:
        self.batches = len(loader)
        self.batch_size = loader.batch_size
        self.batch: Batch = next(iter(loader))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.batches)


def speeds(config: Config, *, fixed: bool) -> dict[str, float]:
    """Trains, and gives the medians of what metrics.jsonl says after the warm-up: images/s, share of waiting."""
    reproducibility.seed_all(config.train.seed)
    start = check_start(config)
    start.output.mkdir(parents=True)
    model = build_model(config, dist.get_world_size())
    loader = build_loader(config, training_images(config), pin_memory=start.gpu)
    run = build_training(config, start, model, FixedBatch(loader) if fixed else loader)
    run.trainer.fit()
    run.trainer.close()
    lines = [json.loads(line) for line in (start.output / "metrics.jsonl").read_text().splitlines()]
    whole = [line for line in lines if line["iteration"] % _WINDOW == 0][_WARM_UP:]
    return {name: statistics.median(line[name] for line in whole) for name in ("images_per_second", "data_wait")}


def configuration(run: str | None, words: list[str], shards: Path, output: Path, windows: int) -> Config:
    """The run's, on these shards, for so many windows that count, without evaluation or checkpoints on the way."""
    keys = {
        "train.dataset_path": shards,
        "train.output_dir": output,
        "train.OFFICIAL_EPOCH_LENGTH": _WINDOW * (windows + _WARM_UP),
        "optim.epochs": 1,
        "optim.warmup_epochs": 0,
        "optim.freeze_last_layer_epochs": 0,
        "evaluation.eval_period_iterations": 0,
        "loggers.period_iterations": _WINDOW,
    }
    first, last = ([f"{key}={value}" for key, value in some.items()] for some in ({} if run else _TINY, keys))
    return load_config(run, [*first, *words, *last]).config


def main(words: list[str] | None = None) -> None:
    """Prints and writes rows of (loader or fixed batch), in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="[a path, or the name of a shipped run] [key=value ...]")
    parser.add_argument("--images", type=int, default=256, help="photographs of noise")
    parser.add_argument("--width", type=int, default=500, help="of them, pixels")
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--windows", type=int, default=8, help=f"of {_WINDOW} iterations each, that count")
    parser.add_argument("--repeats", type=int, default=2, help="of the pair of runs")
    parser.add_argument("--json", type=Path, help="file to write")
    chosen = parser.parse_args(words)
    run = chosen.words[0] if chosen.words and "=" not in chosen.words[0] else None
    changes = chosen.words[1:] if run else chosen.words
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), chosen.images, chosen.width, chosen.height)
        for repeat in range(chosen.repeats):
            for fixed in (False, True):
                name = "fixed batch" if fixed else "loader"
                config = configuration(run, changes, shards, Path(folder) / f"{name} {repeat}", chosen.windows)
                if not rows:
                    join_processes(on_gpu(config))
                rows.append({"batches": name, **speeds(config, fixed=fixed)})
                print(f"{name}: {rows[-1]['images_per_second']:.1f} images/s, data wait {rows[-1]['data_wait']:.1%}")
    real, fixed = (
        statistics.median(row["images_per_second"] for row in rows if row["batches"] == name)
        for name in ("loader", "fixed batch")
    )
    print(f"the loader's speed is {real / fixed:.1%} of the fixed batch's")
    if chosen.json:
        write(chosen.json, [*rows, {"batches": "loader / fixed batch", "images_per_second": real / fixed}])


if __name__ == "__main__":
    main(sys.argv[1:])
