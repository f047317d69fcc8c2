"""The end-to-end benchmark, on almost nothing: what it does, not how fast."""

import json
from pathlib import Path

import pytest

from benchmarks import end_to_end

from ..helpers import TINY

pytestmark = pytest.mark.usefixtures("one_cache")


def test_a_pair_of_runs(tmp_path: Path) -> None:
    """On the loader and on a fixed batch; the latter is never waited for."""
    own = {"train.dataset_path", "optim.warmup_epochs", "optim.epochs"}
    words = [f"{name}={value}" for name, value in TINY.items() if name not in own]
    path = tmp_path / "found.json"
    few = "--images 8 --width 40 --height 30 --windows 1 --repeats 1 --json"
    end_to_end.main([*words, "performance.device_augment=true", *few.split(), str(path)])
    real, fixed, ratio = json.loads(path.read_text())["rows"]
    assert (real["batches"], fixed["batches"]) == ("loader", "fixed batch")
    assert fixed["data_wait"] < real["data_wait"] < 1
    assert ratio["images_per_second"] == pytest.approx(real["images_per_second"] / fixed["images_per_second"])
