"""From a configuration to objects, where a whole run says too little."""

from pathlib import Path

import pytest
import torch
from composer.loggers import TensorboardLogger

from dinocomp import build
from dinocomp.config import load_config
from dinocomp.data import CropSettings, MaskSettings
from dinocomp.errors import ConfigError
from dinocomp.optim import Multipliers

from .helpers import TINY


def config(**changes):
    keys = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(None, [f"{name}={value}" for name, value in keys.items()]).config


def test_parameter_counts_of_shipped_runs() -> None:
    """In millions, as the reference counts them; nothing is allocated for a ViT-g."""
    for yaml, backbone, head in (("vitl16_short", 303.35, 23.66), ("vitl14", 303.66, 57.55)):
        counts = build.count_parameters(load_config(yaml).config)
        assert counts["backbone"] / 1e6 == pytest.approx(backbone, abs=0.01)
        assert counts["dino_head"] / 1e6 == pytest.approx(head, abs=0.01)
    giant = build.count_parameters(load_config("vitg14").config)
    assert giant["backbone"] > 1.1e9 and giant["ibot_head"] / 1e6 == pytest.approx(41.56, abs=0.01)


def test_teacher_starts_as_the_student_without_drop_path() -> None:
    model = build.build_model(config(ibot__separate_head="true"))
    for name, student in model.networks("student").items():
        teacher = model.networks("teacher")[name]
        for weight, copy in zip(student.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(weight, copy) and weight is not copy
    assert {block.drop_path for block in model.networks("student")["backbone"].blocks} == {0.3}
    assert {block.drop_path for block in model.networks("teacher")["backbone"].blocks} == {0.0}


def test_optimizer_holds_the_student_once() -> None:
    settings = config()
    model = build.build_model(settings)
    optimizer, multipliers = build.build_optimizer(settings, model)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for n, p in model.named_parameters() if n.startswith("student_")}
    assert len(held) == len({id(p) for p in held})
    assert len(multipliers) == len(optimizer.param_groups) and Multipliers(1.0, 1.0, True) in multipliers
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_a_missing_logger_package_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**arguments: object) -> None:
        raise ImportError("No module named 'tensorboard'")

    assert build.build_loggers(config(), tmp_path) == []
    monkeypatch.setattr("dinocomp.build.loggers.TensorboardLogger", missing)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tensorboard\]'"):
        build.build_loggers(config(loggers__tensorboard="true"), tmp_path)


def test_a_logger_is_on_by_one_key(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (logger,) = build.build_loggers(config(loggers__tensorboard="true"), tmp_path)
    assert isinstance(logger, TensorboardLogger)


def test_gpu_asked_for_and_none_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train\.device=cpu"):
        build.on_gpu(config(train__device="gpu"))
    assert not build.on_gpu(config(train__device="auto"))


def test_settings_of_the_data_room_have_the_schemas_defaults() -> None:
    """They are written twice, so that the room can be used by itself; here they are held together."""
    default = load_config(None).config
    assert build.crop_settings(default) == CropSettings()
    masks = build.mask_settings(default)
    assert masks == MaskSettings(grid=masks.grid) and masks.grid == (14, 14)
