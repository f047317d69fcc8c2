"""The multipliers of every parameter against the reference's."""

import json
import re
from pathlib import Path

import pytest

from dinocomp.optim import multipliers


def test_multipliers(golden_dir: Path) -> None:
    path = golden_dir / "param_groups.json"
    if not path.exists():
        pytest.skip(f"no {path.name} in {golden_dir}")
    for title, rows in json.loads(path.read_text()).items():
        settings = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", title)}
        blocks = [int(m[1]) for name, *_ in rows if (m := re.match(r"blocks\.(?:\d+\.)?(\d+)\.", name))]
        for name, lr, weight_decay, is_last_layer in rows:
            ours = multipliers(
                name,
                max(blocks, default=-1) + 1,
                layerwise_decay=settings["decay"],
                patch_embed_lr_mult=settings.get("patch_embed", 1.0),
            )
            assert ours.lr == pytest.approx(lr, rel=1e-12), (title, name)
            assert (ours.weight_decay, ours.is_last_layer) == (weight_decay, is_last_layer), (title, name)
