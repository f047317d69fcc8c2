"""Backbones as others name them, and what their shapes say of the network."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinocomp.errors import WeightsError
from dinocomp.interop.names import published_name

_HEAD_DIM = 64  # of every published DINOv2
_NOT_OF_THE_BACKBONE = ("dino_head.", "ibot_head.", "head.", "fc_norm.", "classifier.")

# Hugging Face's names, in the order in which they are replaced.
_HUGGING_FACE = (
    (r"^dinov2(_with_registers)?\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)


def published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's weights by their published names, whoever wrote them.

    Understood are published files, the reference's training checkpoints (prefixes, chunks of blocks, heads beside the
    backbone), dinocomp's own, Hugging Face's `Dinov2Model` and `Dinov2WithRegistersModel`, and timm's
    `vit_*_dinov2`. What is none of them comes back as it is.
    """
    for prefix in ("teacher_backbone.net.", "backbone."):
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            break
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors):
        return _of_hugging_face(tensors)
    found = {published_name(name): tensor for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in found.items() if not name.startswith(_NOT_OF_THE_BACKBONE)}
    return _of_timm(found)


def _of_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        if not name.startswith(_NOT_OF_THE_BACKBONE):
            found[name] = tensor
    for name in [name for name in found if ".attn.query." in name]:
        parts = [found.pop(name.replace("query", part), None) for part in ("query", "key", "value")]
        if any(part is None for part in parts):
            raise WeightsError(f"{name} has no key or value beside it; export the weights again")
        found[name.replace("query", "qkv")] = torch.cat(parts)
    return found


def _is_packed(name: str, found: Mapping[str, Tensor]) -> bool:
    """Whether this first layer gives twice what the second takes: gate and value of SwiGLU."""
    second = found.get(name.replace("fc1", "fc2"))
    return second is not None and found[name].shape[0] == 2 * second.shape[1]


def _of_timm(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for registers and SwiGLU, and its way with positions; published weights stay as they are."""
    renamed = {}
    packed = {n.rpartition("fc1")[0] for n in found if n.endswith("mlp.fc1.weight") and _is_packed(n, found)}
    for name, tensor in found.items():
        layer = re.match(r"(blocks\.\d+\.mlp\.)(fc[12])", name)
        if layer and layer[1] in packed:
            name = name.replace("fc1", "w12").replace("fc2", "w3")
        renamed[{"reg_token": "register_tokens"}.get(name, name)] = tensor
    pos = renamed.get("pos_embed")
    # Where there is one for each patch of a square alone, the class token's has been added to the token itself.
    if pos is not None and math.isqrt(pos.shape[1]) ** 2 == pos.shape[1]:
        renamed["pos_embed"] = torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)
    return renamed


def infer_architecture(tensors: Mapping[str, Tensor], source: str, num_heads: int | None = None) -> dict[str, Any]:
    """Arguments of `VisionTransformer` that weights by published names are of.

    Position embeddings are resampled as the published networks were trained: with registers antialiased and by size,
    without by the offset 0.1.

    Args:
        source: for messages.
        num_heads: where it is known; shapes do not tell, and then heads of 64 channels are taken.

    Raises:
        WeightsError: these are no weights of a DINOv2 backbone, or the number of heads cannot be known.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")
    if missing := [name for name in needed if name not in tensors]:
        raise WeightsError(
            f"{source} is not known as a DINOv2 backbone: it has no {', '.join(missing)} (it has "
            f"{', '.join(sorted(tensors)[:4])}, …). Give weights of DINOv2 (published, Hugging Face, timm or a run's), "
            "or name another network as timm:NAME or hf:FOLDER"
        )
    width, channels, patch_size = (tensors["patch_embed.proj.weight"].shape[i] for i in (0, 1, 2))
    side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    if num_heads is None and width % _HEAD_DIM:
        raise WeightsError(
            f"{source} does not say how many attention heads it has, and its width of {width} is no multiple of "
            f"{_HEAD_DIM}. Give the run's teacher.safetensors, or a Hugging Face folder with its config.json"
        )
    swiglu = "blocks.0.mlp.w12.weight" in tensors
    if swiglu:
        hidden = tensors["blocks.0.mlp.w3.weight"].shape[1] * 3 // 2
    else:
        hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in tensors else 0
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": width,
        "depth": 1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))),
        "num_heads": num_heads or width // _HEAD_DIM,
        "mlp_ratio": (hidden + 0.5) / width,  # the half against rounding down
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "proj_bias": "blocks.0.attn.proj.bias" in tensors,
        "ffn_bias": any(f"blocks.0.mlp.{name}.bias" in tensors for name in ("fc1", "w12")),
        "ffn_layer": "swiglu" if swiglu else "mlp" if hidden else "identity",
        "init_values": 1.0 if "blocks.0.ls1.gamma" in tensors else None,
        "num_register_tokens": registers,
        "interpolate_offset": 0.0 if registers else 0.1,
        "interpolate_antialias": bool(registers),
    }
