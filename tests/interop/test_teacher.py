"""A run's teacher as a plain file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinocomp.build import backbone_arguments, build_networks
from dinocomp.config import load_config
from dinocomp.errors import WeightsError
from dinocomp.interop import load_teacher, read_teacher, save_teacher

TINY = [
    "student.arch=custom",
    "student.embed_dim=24",
    "student.depth=2",
    "student.num_heads=3",
    "student.patch_size=8",
    "student.ffn_layer=swiglu",
    "student.num_register_tokens=2",
    "crops.global_crops_size=32",
    "crops.local_crops_size=16",
    "dino.head_n_prototypes=64",
    "dino.head_hidden_dim=32",
    "dino.head_bottleneck_dim=16",
]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    config = load_config(None, TINY).config
    networks = build_networks(config)
    path = tmp_path / "teacher.safetensors"
    save_teacher(
        path,
        {"backbone": networks.backbone.state_dict(), "dino_head": networks.dino_head.state_dict()},
        architecture=backbone_arguments(config),
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        view=(36, 32),
        iteration=7,
        config="a: 1",
    )
    return path, networks.backbone.eval()


def test_round_trip(saved: tuple[Path, torch.nn.Module]) -> None:
    path, backbone = saved
    loaded = load_teacher(path)
    image = torch.randn(2, 3, 32, 48)
    assert torch.equal(loaded(image).prenorm, backbone(image).prenorm)
    assert loaded.mean == [0.1, 0.2, 0.3] and loaded.std == [0.4, 0.5, 0.6] and not loaded.training
    tensors, about = read_teacher(path)
    assert about["iteration"] == "7" and about["config"] == "a: 1"
    assert {name.split(".")[0] for name in tensors} == {"backbone", "dino_head"}
    assert not list(path.parent.glob(".*")), "no partial file stays"
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode, "readable to whom other files are"
    assert not loaded(image).cls.requires_grad


def test_mistakes(saved: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    path, _ = saved
    with pytest.raises(WeightsError, match="no teacher file at"):
        load_teacher(tmp_path / "nowhere.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="no whole safetensors file"):
        load_teacher(path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"student\.pretrained_weights"):
        load_teacher(tmp_path / "other.safetensors")
