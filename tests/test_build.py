"""From a configuration to objects, where a whole run says too little."""

from pathlib import Path

import pytest
import torch
from composer.loggers import TensorboardLogger

from dinocomp import build
from dinocomp.build import build_model
from dinocomp.build.parallel import choose_strategy
from dinocomp.config import derive, load_config
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
    assert len(multipliers) == len(optimizer.param_groups) and Multipliers(1.0, 1.0, True, False) in multipliers
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


def strategy_of(*words: str, world_size: int = 2, gpu_gigabytes: int | None = 80, whole: float = 6.5) -> str:
    config = load_config(None, [*words]).config
    gpu_bytes = None if gpu_gigabytes is None else gpu_gigabytes * 10**9
    return derive.strategy(config, world_size, gpu_bytes, int(whole * 10**9))


def test_a_strategy_is_found() -> None:
    """Networks are sharded where they are asked to be, or where whole ones are large for a GPU."""
    backbone = "compute_precision.student.backbone.sharding_strategy"
    assert strategy_of() == "ddp" and strategy_of(whole=30) == "fsdp2" and strategy_of(gpu_gigabytes=16) == "fsdp2"
    assert strategy_of(world_size=1, whole=200) == strategy_of("parallelism.strategy=fsdp", world_size=1) == "single"
    assert strategy_of(gpu_gigabytes=None, whole=200) == "ddp", "on CPUs"
    assert strategy_of(f"{backbone}=NO_SHARD", whole=200) == "ddp" and strategy_of(f"{backbone}=FULL_SHARD") == "fsdp2"
    assert strategy_of(f"{backbone}=FULL_SHARD", "parallelism.strategy=ddp") == "ddp"
    assert strategy_of("train.microbatch_size=auto", whole=200) == "fsdp", "Composer's search needs it"


@pytest.mark.parametrize(
    ("word", "what", "remedy"),
    [
        ("parallelism.strategy=fsdp2", "parallelism.strategy=fsdp2 needs GPUs", "Type parallelism.strategy=ddp"),
        ("parallelism.strategy=fsdp", "parallelism.strategy=fsdp needs GPUs", "Type parallelism.strategy=ddp"),
        ("parallelism.strategy=single", "but 2 processes were started", "Type composer -n 1"),
        ("train.microbatch_size=auto", "this run has none", "Type a number of images"),
    ],
)
def test_what_two_cpu_processes_cannot_do(word: str, what: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composer.utils.dist.get_world_size", lambda: 2)
    with pytest.raises(ConfigError) as error:
        choose_strategy(load_config(None, [word]).config, gpu=False)
    assert what in str(error.value) and remedy in str(error.value)


@pytest.mark.parametrize("word", ["train.centering=sinkhorn_knopp", "dino.koleo_distributed=true"])
def test_a_search_on_several_processes_has_limits(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that exchange numbers within a pass would meet Composer's own exchange there."""
    monkeypatch.setattr("composer.utils.dist.get_world_size", lambda: 2)
    searching = load_config(None, ["train.microbatch_size=auto", word]).config
    with pytest.raises(ConfigError, match=f"several processes with {word}.*Type a number of images"):
        choose_strategy(searching, gpu=True)


def test_networks_for_another_ranks_weights_take_no_memory() -> None:
    model = build_model(load_config("vitg14").config, 8, empty=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    names = {name for name, _ in model.named_parameters()}
    assert {"student_backbone.net.cls_token", "teacher_ibot_head.net.last_layer.weight_v"} < names
