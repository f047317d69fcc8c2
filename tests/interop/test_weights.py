"""Weights to start from."""

import os
from pathlib import Path

import pytest
import torch

from dinocomp.errors import WeightsError
from dinocomp.interop import load_backbone
from dinocomp.interop.names import published_name
from dinocomp.models import VisionTransformer


def tiny(**settings) -> VisionTransformer:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return VisionTransformer(**size | settings)


def test_names() -> None:
    assert published_name("backbone.blocks.3.23.attn.qkv.weight") == "blocks.23.attn.qkv.weight"
    assert published_name("module.backbone.blocks.1.norm1.bias") == "blocks.1.norm1.bias"
    assert published_name("blocks.5.mlp.fc1._orig_mod.weight") == "blocks.5.mlp.fc1.weight"
    assert published_name("patch_embed.proj.weight") == "patch_embed.proj.weight"


@pytest.mark.parametrize("layout", ["published", "reference teacher", "nested model"])
def test_published_and_reference_files(layout: str, tmp_path: Path) -> None:
    source, net = tiny(), tiny()
    weights = source.state_dict()
    if layout == "reference teacher":  # chunked, prefixed, with a head beside it
        weights = {"backbone." + n.replace("blocks.", "blocks.0."): w for n, w in weights.items()}
        weights = {"teacher": weights | {"dino_head.mlp.0.bias": torch.zeros(3)}}
    elif layout == "nested model":
        weights = {"model": weights}
    torch.save(weights, tmp_path / "w.pth")
    load_backbone(net, tmp_path / "w.pth")
    assert all(torch.equal(w, source.state_dict()[n]) for n, w in net.state_dict().items())


def test_position_embeddings_of_another_size(tmp_path: Path) -> None:
    source, net = tiny(img_size=48), tiny()
    with torch.no_grad():
        source.pos_embed[:, 1:] = torch.linspace(0, 1, 6).repeat(6)[None, :, None]  # a ramp from left to right
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_backbone(net, tmp_path / "w.pth")
    rows = net.pos_embed[0, 1:, 0].detach().view(4, 4)
    torch.testing.assert_close(rows, rows[:1].expand(4, 4))
    assert (rows[0].diff() > 0.1).all()
    assert torch.equal(net.pos_embed[:, 0], source.pos_embed[:, 0])


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = tiny(num_register_tokens=4).state_dict()
    weights["norm.weight"] = torch.ones(5)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as error:
        load_backbone(tiny(), tmp_path / "w.pth")
    assert "not in the network: register_tokens" in str(error.value)
    assert "norm.weight is [5], the network's is [24]" in str(error.value)


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_with_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    torch.save({"model": tiny().state_dict(), "extra": _Bomb(str(tmp_path / "ran"))}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="could run code"):
        load_backbone(tiny(), tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no file of weights"):
        load_backbone(tiny(), tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"not weights at all")
    with pytest.raises(WeightsError):
        load_backbone(tiny(), tmp_path / "w.pth")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="no named tensors"):
        load_backbone(tiny(), tmp_path / "w.pth")
