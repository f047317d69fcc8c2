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

Table = tuple[tuple[str, str], ...]

# (theirs, ours): how a name begins, {i} for a block's number; of several the first counts. Read both ways. Hugging
# Face has query, key and value apart, which here are called so until they are joined.
_HUGGING_FACE: Table = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.{i}.attention.output.dense.", "blocks.{i}.attn.proj."),
    ("encoder.layer.{i}.attention.attention.", "blocks.{i}.attn."),
    ("encoder.layer.{i}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
    ("encoder.layer.{i}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma"),
    ("encoder.layer.{i}.mlp.weights_in.", "blocks.{i}.mlp.w12."),
    ("encoder.layer.{i}.mlp.weights_out.", "blocks.{i}.mlp.w3."),
    ("encoder.layer.{i}.", "blocks.{i}."),
    ("layernorm.", "norm."),
)
_TIMM: Table = (("reg_token", "register_tokens"),)
_TIMM_SWIGLU: Table = (("blocks.{i}.mlp.fc1.", "blocks.{i}.mlp.w12."), ("blocks.{i}.mlp.fc2.", "blocks.{i}.mlp.w3."))
_PARTS = ("query", "key", "value")


def _rename(name: str, table: Table, *, back: bool = False) -> str:
    """`name` by the table's second names, or `back` from those to its first; one that is not in it stays."""
    for pair in table:
        old, new = reversed(pair) if back else pair
        if match := re.match(re.escape(old).replace(r"\{i\}", r"(\d+)"), name):
            return new.replace("{i}", match[1] if match.groups() else "") + name[match.end() :]
    return name


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
        name = _rename(re.sub(r"^dinov2(_with_registers)?\.", "", name), _HUGGING_FACE)
        if tensor.numel() and not name.startswith(_NOT_OF_THE_BACKBONE):  # there may be no registers, in a tensor
            found[name] = tensor
    for name in [name for name in found if ".attn.query." in name]:
        parts = [found.pop(name.replace("query", part), None) for part in _PARTS]
        if any(part is None for part in parts):
            raise WeightsError(f"{name} has no key or value beside it; export the weights again")
        found[name.replace("query", "qkv")] = torch.cat(parts)
    return found


def to_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's weights, given by published names, by those of `Dinov2Model` or `Dinov2WithRegistersModel`.

    The inverse of what `published` does. These networks have LayerScale and all biases but, perhaps, that of query, key
    and value: where ours has none, theirs are 1 and 0, which is the same function.
    """
    found = {}
    for name, tensor in with_all_parts(tensors).items():
        parts = zip(_PARTS, tensor.chunk(3), strict=True) if ".attn.qkv." in name else [("qkv", tensor)]
        found |= {_rename(name.replace("qkv", part), _HUGGING_FACE, back=True): value for part, value in parts}
    return found


def with_all_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function with LayerScale of 1 and biases of 0 where there are none (but for query, key and value)."""
    found, width = dict(tensors), tensors["norm.weight"]
    for name, tensor in tensors.items():
        if name.endswith(("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight", "mlp.w12.weight", "mlp.w3.weight")):
            found.setdefault(name.replace("weight", "bias"), tensor.new_zeros(len(tensor)))
        if name.endswith(("norm1.weight", "norm2.weight")):
            found.setdefault(re.sub(r"norm(.)\.weight", r"ls\1.gamma", name), torch.ones_like(width))
    return found


def _is_packed(name: str, found: Mapping[str, Tensor]) -> bool:
    """Whether this first layer gives twice what the second takes: gate and value of SwiGLU."""
    second = found.get(name.replace("fc1", "fc2"))
    return second is not None and found[name].shape[0] == 2 * second.shape[1]


def _of_timm(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for registers and SwiGLU, and its way with positions; published weights stay as they are."""
    packed = any(n.endswith("mlp.fc1.weight") and _is_packed(n, found) for n in found)
    table = _TIMM + (_TIMM_SWIGLU if packed else ())
    renamed = {_rename(name, table): tensor for name, tensor in found.items()}
    pos = renamed.get("pos_embed")
    # Where there is one for each patch of a square alone, the class token's has been added to the token itself.
    if pos is not None and math.isqrt(pos.shape[1]) ** 2 == pos.shape[1]:
        renamed["pos_embed"] = torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)
    return renamed


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's weights, given by published names, by those of timm's `vit_*_dinov2`, registers or not.

    The inverse of what `published` does, but that timm has no mask token, and, with registers, keeps the class token's
    position in the token. Biases that timm has and ours has not are 0.
    """
    found = {n: t for n, t in with_all_parts(tensors).items() if ".gamma" not in n or n in tensors}
    del found["mask_token"]
    if "register_tokens" in found:
        pos = found["pos_embed"]  # [1, 1 + N, D]
        found |= {"cls_token": found["cls_token"] + pos[:, :1], "pos_embed": pos[:, 1:]}
    return {_rename(name, _TIMM + _TIMM_SWIGLU, back=True): tensor.contiguous() for name, tensor in found.items()}


def infer_architecture(tensors: Mapping[str, Tensor], source: str, num_heads: int | None = None) -> dict[str, Any]:
    """Arguments of `VisionTransformer` that weights by published names are of.

    Position embeddings are resampled as the published networks were trained: with registers antialiased and by size,
    without by the offset 0.1.

    Args:
        tensors: by published names.
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
        "mlp_ratio": ratio_of(hidden, width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "proj_bias": "blocks.0.attn.proj.bias" in tensors,
        "ffn_bias": any(f"blocks.0.mlp.{name}.bias" in tensors for name in ("fc1", "w12")),
        "ffn_layer": "swiglu" if swiglu else "mlp" if hidden else "identity",
        "init_values": 1.0 if "blocks.0.ls1.gamma" in tensors else None,
        "num_register_tokens": registers,
        "interpolate_offset": 0.0 if registers else 0.1,
        "interpolate_antialias": bool(registers),
    }


def ratio_of(hidden: int, width: int) -> float:
    """A number r with int(width * r) == hidden, a plain one where there is one."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
