"""The schedules against the reference's numbers."""

from pathlib import Path

import pytest

from dinocomp.schedules import Schedules

from .conftest import read


def test_schedules(schedules_file: Path) -> None:
    recording = read(schedules_file)
    meta = recording.meta
    epoch = meta["OFFICIAL_EPOCH_LENGTH"]
    schedules = Schedules(
        total=meta["epochs"] * epoch,
        lr=meta["lr"],
        min_lr=meta["min_lr"],
        warmup=meta["warmup_epochs"] * epoch,
        freeze_last_layer=meta["freeze_last_layer_epochs"] * epoch,
        weight_decay=meta["weight_decay"],
        weight_decay_end=meta["weight_decay_end"],
        momentum=meta["momentum_teacher"],
        momentum_end=meta["final_momentum_teacher"],
        teacher_temp=meta["teacher_temp"],
        warmup_teacher_temp=meta["warmup_teacher_temp"],
        teacher_temp_warmup=meta["warmup_teacher_temp_epochs"] * epoch,
    )
    names = {"teacher_momentum": "momentum"}
    for name, reference in recording.tensors.items():
        ours = [getattr(schedules.at(i), names.get(name, name)) for i in range(len(reference))]
        assert ours == pytest.approx(reference.tolist(), rel=1e-9, abs=1e-15), name
