"""Weights for other patches and other image sizes."""

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dinocomp.errors import WeightsError
from dinocomp.interop import load_backbone, save_teacher
from dinocomp.interop.adapt import adapt, resample_patch_embed, resample_pos_embed
from dinocomp.models import VisionTransformer


def tiny(**settings) -> VisionTransformer:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    return VisionTransformer(**size | settings)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_projection_for_larger_patches_gives_the_same_tokens() -> None:
    weight, patches = normal(5, 3, 14, 14), normal(7, 3, 14, 14)
    larger = F.interpolate(patches, (16, 16), mode="bicubic", antialias=True)
    tokens = patches.flatten(1) @ weight.flatten(1).T
    torch.testing.assert_close(larger.flatten(1) @ resample_patch_embed(weight, 16).flatten(1).T, tokens)


@pytest.mark.parametrize("patch_size", [7, 14, 16, 28])
def test_against_timm(patch_size: int) -> None:
    timm = pytest.importorskip("timm.layers")
    weight = normal(6, 3, 14, 14).float()
    theirs = timm.resample_patch_embed(weight, [patch_size, patch_size])
    torch.testing.assert_close(resample_patch_embed(weight, patch_size), theirs, atol=1e-4, rtol=1e-4)


def test_smooth_positions_survive_518_to_224() -> None:
    """37 x 37 positions on 16 x 16 and 14 x 14 grids, as the same smooth functions of place sampled there."""

    def waves(side: int) -> torch.Tensor:  # [1, 1 + side^2, 3]
        place = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(place, place, indexing="ij")
        grid = torch.stack([(3 * x).sin(), (2 * x - 4 * y).cos(), x * y], dim=-1).flatten(0, 1)
        return torch.cat([torch.full((1, 3), 9.0), grid])[None]

    for side in (16, 14, 37, 50):
        found = resample_pos_embed(waves(37), side)
        assert (found - waves(side)).abs().max() < 0.02, side
        assert torch.equal(found[:, 0], waves(37)[:, 0])


def test_what_was_loaded_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny(img_size=42, patch_size=14)
    weights = {name: tensor for name, tensor in source.state_dict().items() if name != "mask_token"}
    torch.save(weights, tmp_path / "w.pth")
    net = tiny()
    with caplog.at_level(logging.INFO, "dinocomp"):
        load_backbone(net, tmp_path / "w.pth")
    (said,) = caplog.messages
    assert f"{len(weights)} tensors; resampled: position embeddings from 3 x 3 to 4 x 4 patches" in said
    assert "patch projection from 14 to 8 px" in said and said.endswith("fresh: mask_token")
    assert torch.equal(net.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert not net.mask_token.any()

    caplog.clear()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "dinocomp"):
        load_backbone(tiny(), tmp_path / "w.pth")
    assert caplog.messages[0].endswith(f"{len(net.state_dict())} tensors, all as they are")


def test_nothing_else_is_bent() -> None:
    net = tiny()
    tensors = tiny(embed_dim=48).state_dict() | {"pos_embed": torch.zeros(1, 8, 24)}  # no square grid
    assert adapt(tensors, net).tensors["pos_embed"].shape == (1, 8, 24)
    assert adapt(tensors, net).tensors["norm.weight"].shape == (48,)


@pytest.mark.parametrize("registers", [0, 4])
def test_training_starts_from_a_hugging_face_folder(tmp_path: Path, registers: int) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    kind = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    config = kind.config_class(**size, **({"num_register_tokens": 4} if registers else {}))
    theirs = kind(config)
    theirs.save_pretrained(tmp_path)
    net = tiny(init_values=1.0, num_register_tokens=registers)
    load_backbone(net, tmp_path)
    ours, images = net.eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(images).cls, theirs.eval()(images).last_hidden_state[:, 0], atol=1e-5, rtol=1e-5
        )
    with pytest.raises(WeightsError, match="register_tokens"):
        load_backbone(tiny(init_values=1.0, num_register_tokens=4 - registers), tmp_path)


@pytest.mark.parametrize("kind", ["teacher", "hugging face"])
def test_another_number_of_heads_is_refused(tmp_path: Path, kind: str) -> None:
    """It fits the shapes and would compute something else."""
    net = tiny(num_heads=2)
    if kind == "teacher":
        path = tmp_path / "teacher.safetensors"
        about = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "view": (36, 32), "iteration": 1, "config": ""}
        architecture = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
        save_teacher(path, {"backbone": net.state_dict()}, architecture=architecture, **about)
    else:
        path = tmp_path
        (path / "config.json").write_text('{"num_attention_heads": 2}')
        save_file(net.state_dict(), path / "model.safetensors")
    with pytest.raises(WeightsError, match="with 2 attention heads, the configured one has 3"):
        load_backbone(tiny(), path)
    load_backbone(tiny(num_heads=2), path)
