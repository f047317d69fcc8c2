"""The networks against the reference's numbers."""

from pathlib import Path

import torch

from dinocomp.interop.names import published_name
from dinocomp.models import DINOHead, VisionTransformer

from .conftest import Recording, assert_close, read


def network(recording: Recording) -> VisionTransformer:
    """The network that a recording describes, with its weights."""
    settings = {name: value for name, value in recording.meta.items() if name != "block_chunks"}
    model = VisionTransformer(**settings)
    model.load_state_dict({published_name(name): w for name, w in recording.under("weights.").items()})
    return model.eval()


@torch.no_grad()
def test_backbone(backbone_file: Path) -> None:
    recording = read(backbone_file)
    model, tensors = network(recording), recording.tensors
    masks = tensors["in.masks"]
    outputs = {
        "native": model(tensors["in.native"]),
        "masked": model(tensors["in.native"], masks),
        "other_size": model(tensors["in.other_size"]),
    }
    for case, tokens in outputs.items():
        named = {
            "x_norm_clstoken": tokens.cls,
            "x_norm_regtokens": tokens.registers,
            "x_norm_patchtokens": tokens.patches,
            "x_prenorm": tokens.prenorm,
        }
        for name, ours in named.items():
            assert_close(ours, tensors[f"out.{case}.{name}"], 1e-5, f"{case}.{name}")

    for i, (patches, cls) in enumerate(model.get_intermediate_layers(tensors["in.native"], n=2)):
        assert_close(patches, tensors[f"out.layers.{i}.patch"], 1e-5, f"layers.{i}.patch")
        assert_close(cls, tensors[f"out.layers.{i}.cls"], 1e-5, f"layers.{i}.cls")

    packed_global, packed_local = model([tensors["in.native"], tensors["in.local"]], [masks, None])
    assert_close(packed_global.patches, tensors["out.pair.global_patch"], 1e-5, "pair.global_patch")
    assert_close(packed_local.cls, tensors["out.pair.local_cls"], 1e-5, "pair.local_cls")


def test_head(head_file: Path) -> None:
    recording = read(head_file)
    head = DINOHead(**recording.meta)
    head.load_state_dict(recording.under("weights."))
    x = recording.tensors["in.x"].requires_grad_()
    y = head(x)
    (y * recording.tensors["in.cotangent"]).sum().backward()
    assert_close(y, recording.tensors["out.y"], 1e-5, "y")
    assert_close(x.grad, recording.tensors["out.grad_x"], 1e-4, "grad_x")
    for name, parameter in head.named_parameters():
        assert_close(parameter.grad, recording.tensors[f"out.grad.{name}"], 1e-4, f"grad.{name}")
