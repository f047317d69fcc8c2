"""The reference's own training files load as they are and mean the same."""

from pathlib import Path

import pytest

from dinocomp.config import all_keys, load_config
from dinocomp.config.derive import peak_learning_rate, total_iterations

SHORT = """
# this corresponds to the default config
train:
  dataset_path: ImageNet:split=TRAIN
  batch_size_per_gpu: 64
student:
  block_chunks: 4
"""
LONG = """
dino:
  head_n_prototypes: 131072
  head_bottleneck_dim: 384
ibot:
  separate_head: true
  head_n_prototypes: 131072
train:
  batch_size_per_gpu: {batch}
  dataset_path: ImageNet22k
  centering: sinkhorn_knopp
student:
  arch: {arch}
  patch_size: 14
  drop_path_rate: 0.4
  ffn_layer: swiglufused
  block_chunks: 4
teacher:
  momentum_teacher: 0.994
optim:
  epochs: 500
  weight_decay_end: 0.2
  base_lr: 2.0e-04  # learning rate for a batch size of 1024
  warmup_epochs: 80
  layerwise_decay: 1.0
crops:
  local_crops_size: 98
"""
USERS = """
train:
  batch_size_per_gpu: 10
student:
  arch: vit_small
  patch_size: 16
  drop_path_rate: 0
optim:
  epochs: 200
evaluation:
  eval_period_iterations: 6250
"""
LONG_VALUES = {
    "dino.head_n_prototypes": 131072,
    "dino.head_bottleneck_dim": 384,
    "ibot.separate_head": True,
    "ibot.head_n_prototypes": 131072,
    "ibot.head_bottleneck_dim": 256,
    "train.dataset_path": "ImageNet22k",
    "train.centering": "sinkhorn_knopp",
    "student.patch_size": 14,
    "student.drop_path_rate": 0.4,
    "student.ffn_layer": "swiglufused",
    "student.block_chunks": 4,
    "teacher.momentum_teacher": 0.994,
    "optim.epochs": 500,
    "optim.weight_decay_end": 0.2,
    "optim.base_lr": 2e-4,
    "optim.warmup_epochs": 80,
    "optim.layerwise_decay": 1.0,
    "crops.local_crops_size": 98,
}
FILES = {
    "vitl16_short": (SHORT, {"student.block_chunks": 4, "student.arch": "vit_large", "train.batch_size_per_gpu": 64}),
    "vitl14": (
        LONG.format(batch=32, arch="vit_large"),
        LONG_VALUES | {"student.arch": "vit_large", "train.batch_size_per_gpu": 32},
    ),
    "vitg14": (
        LONG.format(batch=12, arch="vit_giant2"),
        LONG_VALUES | {"student.arch": "vit_giant2", "train.batch_size_per_gpu": 12},
    ),
    "vits16": (
        USERS,
        {
            "train.batch_size_per_gpu": 10,
            "student.arch": "vit_small",
            "student.drop_path_rate": 0.0,
            "optim.epochs": 200,
            "evaluation.eval_period_iterations": 6250,
        },
    ),
}

# ssl_default_config.yaml of the reference, key by key.
DEFAULTS = {
    "MODEL.WEIGHTS": "",
    "compute_precision.grad_scaler": True,
    "dino.loss_weight": 1.0,
    "dino.head_n_prototypes": 65536,
    "dino.head_bottleneck_dim": 256,
    "dino.head_nlayers": 3,
    "dino.head_hidden_dim": 2048,
    "dino.koleo_loss_weight": 0.1,
    "ibot.loss_weight": 1.0,
    "ibot.mask_sample_probability": 0.5,
    "ibot.mask_ratio_min_max": (0.1, 0.5),
    "ibot.separate_head": False,
    "ibot.head_n_prototypes": 65536,
    "ibot.head_bottleneck_dim": 256,
    "ibot.head_nlayers": 3,
    "ibot.head_hidden_dim": 2048,
    "train.batch_size_per_gpu": 64,
    "train.dataset_path": "ImageNet:split=TRAIN",
    "train.output_dir": ".",
    "train.saveckp_freq": 20,
    "train.seed": 0,
    "train.num_workers": 10,
    "train.OFFICIAL_EPOCH_LENGTH": 1250,
    "train.cache_dataset": True,
    "train.centering": "centering",
    "student.arch": "vit_large",
    "student.patch_size": 16,
    "student.drop_path_rate": 0.3,
    "student.layerscale": 1e-5,
    "student.drop_path_uniform": True,
    "student.pretrained_weights": "",
    "student.ffn_layer": "mlp",
    "student.block_chunks": 0,
    "student.qkv_bias": True,
    "student.proj_bias": True,
    "student.ffn_bias": True,
    "student.num_register_tokens": 0,
    "student.interpolate_antialias": False,
    "student.interpolate_offset": 0.1,
    "teacher.momentum_teacher": 0.992,
    "teacher.final_momentum_teacher": 1.0,
    "teacher.warmup_teacher_temp": 0.04,
    "teacher.teacher_temp": 0.07,
    "teacher.warmup_teacher_temp_epochs": 30,
    "optim.epochs": 100,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.base_lr": 0.004,
    "optim.lr": 0.0,
    "optim.warmup_epochs": 10,
    "optim.min_lr": 1e-6,
    "optim.clip_grad": 3.0,
    "optim.freeze_last_layer_epochs": 1,
    "optim.scaling_rule": "sqrt_wrt_1024",
    "optim.patch_embed_lr_mult": 0.2,
    "optim.layerwise_decay": 0.9,
    "optim.adamw_beta1": 0.9,
    "optim.adamw_beta2": 0.999,
    "crops.global_crops_scale": (0.32, 1.0),
    "crops.local_crops_number": 8,
    "crops.local_crops_scale": (0.05, 0.32),
    "crops.global_crops_size": 224,
    "crops.local_crops_size": 96,
    "evaluation.eval_period_iterations": 12500,
} | {
    f"compute_precision.{who}.{network}.{key}": value
    for who in ("teacher", "student")
    for network in ("backbone", "dino_head", "ibot_head")
    for key, value in {
        "sharding_strategy": "SHARD_GRAD_OP",
        "mixed_precision.param_dtype": "fp16",
        "mixed_precision.reduce_dtype": "fp32" if who == "student" and network != "backbone" else "fp16",
        "mixed_precision.buffer_dtype": "fp32",
    }.items()
}


def values(config: object, names: object) -> dict[str, object]:
    found = {}
    for name in names:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = value
    return found


def test_every_key_of_the_reference_keeps_its_name_and_default() -> None:
    assert {name: all_keys()[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", FILES)
def test_the_references_training_files_load_and_mean_the_same(name: str, tmp_path: Path) -> None:
    text, expected = FILES[name]
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    loaded = load_config(str(path))
    assert values(loaded.config, DEFAULTS) == DEFAULTS | expected
    chunked = "student.block_chunks" in expected
    assert [line.split("=")[0] for line in loaded.notices] == ["student.block_chunks"] * chunked


@pytest.mark.parametrize("name", FILES)
def test_the_shipped_files_of_the_same_name_mean_the_same(name: str) -> None:
    _, expected = FILES[name]
    loaded = load_config(name)
    assert values(loaded.config, DEFAULTS) == DEFAULTS | expected | {"student.block_chunks": 0}
    assert loaded.notices == []


def test_the_schedules_numbers_are_the_references() -> None:
    short, long = load_config("vitl16_short").config, load_config("vitl14").config
    assert peak_learning_rate(short, 32) == pytest.approx(5.657e-3, rel=1e-4)
    assert peak_learning_rate(long, 96) == pytest.approx(3.464e-4, rel=1e-4)
    assert (total_iterations(short), total_iterations(long)) == (125_000, 625_000)
    assert total_iterations(load_config("vits16").config) == 250_000
