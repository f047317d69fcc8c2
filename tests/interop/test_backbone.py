"""Backbones of others, against the libraries that they come from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinocomp.errors import WeightsError
from dinocomp.interop import load_teacher, open_backbone, save_teacher
from dinocomp.interop.formats import infer_architecture, published
from dinocomp.models import VisionTransformer

LAYOUTS = json.loads((Path(__file__).parents[1] / "golden/data/pretrained_layouts.json").read_text())


def randomized(net: torch.nn.Module) -> torch.nn.Module:
    """Weights that all matter: nothing is left at 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + 0.05)
    return net.eval()


def images(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_networks_are_recognised(name: str) -> None:
    """Names and shapes of all eight, to the last one."""
    weights = {n: torch.empty(shape, device="meta") for n, shape in LAYOUTS[name].items()}
    with torch.device("meta"):
        net = VisionTransformer(**infer_architecture(published(weights), name))
    assert {n: list(w.shape) for n, w in net.state_dict().items()} == LAYOUTS[name]
    assert net.num_register_tokens == (4 if "reg4" in name else 0)
    assert net.blocks[0].attn.num_heads == LAYOUTS[name]["cls_token"][-1] // 64


@pytest.mark.parametrize("registers", [0, 4])
def test_hugging_face_folders(tmp_path: Path, registers: int) -> None:
    """DINOv2 as transformers saves it is read without it, and gives the same tokens; SwiGLU with registers, too."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28, "patch_size": 14}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**size, num_register_tokens=registers, use_swiglu_ffn=True)
        theirs = randomized(transformers.Dinov2WithRegistersModel(config))
    else:
        theirs = randomized(transformers.Dinov2Model(transformers.Dinov2Config(**size)))
    theirs.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = theirs(images(28)).last_hidden_state  # [2, 1 + R + 4, 24]
    ours = open_backbone(tmp_path / "model")
    assert isinstance(ours, VisionTransformer) and not ours.training
    for net in (ours, open_backbone(f"hf:{tmp_path / 'model'}")):
        ((patches, cls),) = net.get_intermediate_layers(images(28))
        torch.testing.assert_close(cls, expected[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(patches, expected[:, 1 + registers :], atol=1e-5, rtol=1e-5)
        assert net.embed_dim == 24 and net.patch_size == 14


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"]
)
def test_timm_files(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    size = {"embed_dim": 64, "num_heads": 1, "mlp_ratio": 4} if "giant" in name else {}
    theirs = randomized(timm.create_model(name, img_size=28, depth=2, **size))
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    with torch.no_grad():
        expected = theirs.forward_features(images(28))
    ours = open_backbone(tmp_path / "w.safetensors")
    ((patches, cls),) = ours.get_intermediate_layers(images(28))
    torch.testing.assert_close(cls, expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches, expected[:, theirs.num_prefix_tokens :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_other_networks_of_timm(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    theirs = randomized(timm.create_model(name, num_classes=0))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = open_backbone(f"timm:{name}={tmp_path / 'w.pth'}")
    pixels = images(ours.view[1])
    with torch.no_grad():
        expected = theirs.forward_features(pixels)
    ((flat, cls),) = ours.get_intermediate_layers(pixels)
    ((grid, _),) = ours.get_intermediate_layers(pixels, reshape=True)
    assert grid.shape[-2:] == (pixels.shape[-1] // ours.patch_size,) * 2 and flat.shape[1] == grid[0, 0].numel()
    if name == "test_vit":
        torch.testing.assert_close(cls, expected[:, 0], atol=1e-5, rtol=1e-5)
        assert cls.shape == (2, ours.embed_dim) and len(ours.get_intermediate_layers(pixels, 3)) == 3
    else:
        torch.testing.assert_close(cls, expected.mean(dim=(2, 3)), atol=1e-5, rtol=1e-5)


def test_other_networks_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8
    )
    theirs = randomized(transformers.ViTModel(config, add_pooling_layer=False))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 32, "width": 32}})
    )
    ours = open_backbone(tmp_path)
    assert (*ours.mean, *ours.std) == (0.5,) * 3 + (0.25,) * 3 and ours.view == (32, 32)
    layers = ours.get_intermediate_layers(images(32), 2, reshape=True)
    with torch.no_grad():
        expected = theirs(images(32)).last_hidden_state
    torch.testing.assert_close(layers[-1][1], expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layers[-1][0].flatten(2).transpose(1, 2), expected[:, 1:], atol=1e-5, rtol=1e-5)
    assert len(layers) == 2 and layers[0][0].shape == (2, 24, 4, 4)


def test_a_run_s_own(tmp_path: Path) -> None:
    """Its folder, its teacher, and a checkpoint's folder and file, beside which a teacher lies."""
    architecture = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
    net = VisionTransformer(**architecture)
    checkpoint = tmp_path / "checkpoints" / "iteration-00000004"
    about = {"mean": (0.1,) * 3, "std": (0.2,) * 3, "view": (18, 16), "iteration": 4, "config": ""}
    for folder in (tmp_path, checkpoint):
        save_teacher(folder / "teacher.safetensors", {"backbone": net.state_dict()}, architecture=architecture, **about)
    (checkpoint / "checkpoint.pt").write_bytes(b"")
    for source in (tmp_path, tmp_path / "teacher.safetensors", checkpoint, checkpoint / "checkpoint.pt"):
        found = open_backbone(source)
        assert torch.equal(found.pos_embed, net.pos_embed) and found.view == [18, 16]
    assert torch.equal(load_teacher(tmp_path / "teacher.safetensors").pos_embed, net.pos_embed)


def test_what_is_no_backbone_is_said(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights at .*nowhere"):
        open_backbone(tmp_path / "nowhere")
    save_file({"layer1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="not known as a DINOv2 backbone: it has no cls_token"):
        open_backbone(tmp_path / "other.safetensors")
    net = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3)
    save_file(net.state_dict(), tmp_path / "narrow.safetensors")
    with pytest.raises(WeightsError, match="how many attention heads"):
        open_backbone(tmp_path / "narrow.safetensors")
    with pytest.raises(WeightsError, match="timm knows no network 'vit_smoll'"):
        open_backbone("timm:vit_smoll")
    with pytest.raises(WeightsError, match="transformers cannot load"):
        open_backbone(f"hf:{tmp_path}")


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dino')
    with pytest.raises(WeightsError, match=r"config.json cannot be read .* export it again"):
        open_backbone(tmp_path)


def test_a_network_without_a_token_for_each_patch_is_refused(tmp_path: Path) -> None:
    """ViTMAE masks most of them at random."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8
    )
    transformers.ViTMAEModel(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="a token for each patch"):
        open_backbone(tmp_path).get_intermediate_layers(images(32))
