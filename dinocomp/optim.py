"""Parameter groups: who learns how fast, and who decays."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn


class Multipliers(NamedTuple):
    """How a parameter's learning rate and weight decay follow the schedules."""

    lr: float
    weight_decay: float
    is_last_layer: bool
    is_backbone: bool  # where backbones have a schedule of their own


def multipliers(
    name: str, num_blocks: int, *, layerwise_decay: float = 1.0, patch_embed_lr_mult: float = 1.0
) -> Multipliers:
    """The multipliers of the parameter called `name` in a network of `num_blocks` blocks (0: a head).

    Learning rates fall by `layerwise_decay` with each layer away from the output: embeddings are layer 0, block i is
    layer i + 1, anything else is layer `num_blocks` + 1 and undiminished. Biases, norms and LayerScale do not decay.
    """
    layer = num_blocks + 1
    if num_blocks:
        if re.match(r"(cls_token|pos_embed|mask_token|register_tokens|patch_embed)", name):
            layer = 0
        elif block := re.match(r"blocks\.(?:\d+\.)?(\d+)\.", name):
            layer = int(block[1]) + 1
    lr = layerwise_decay ** (num_blocks + 1 - layer)
    if name.startswith("patch_embed."):
        lr *= patch_embed_lr_mult
    decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    return Multipliers(lr, float(decays), "last_layer" in name, bool(num_blocks))


def parameter_groups(
    networks: Iterable[nn.Module], *, layerwise_decay: float, patch_embed_lr_mult: float, backbone_apart: bool = False
) -> Mapping[Multipliers, list[nn.Parameter]]:
    """The trainable parameters of `networks`, gathered by their multipliers.

    A network with `blocks` is a backbone, any other a head. The multipliers are kept beside the optimizer rather than
    in its ``param_groups``, because loading a checkpoint overwrites what is in there.

    Args:
        layerwise_decay, patch_embed_lr_mult: see `multipliers`.
        backbone_apart: no group has weights of a backbone and of a head.

    Returns:
        multipliers -> parameters, in the order of the optimizer's groups.
    """
    groups: dict[Multipliers, list[nn.Parameter]] = {}
    for network in networks:
        num_blocks = len(network.blocks) if hasattr(network, "blocks") else 0
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                key = multipliers(
                    name, num_blocks, layerwise_decay=layerwise_decay, patch_embed_lr_mult=patch_embed_lr_mult
                )
                key = key._replace(is_backbone=key.is_backbone and backbone_apart)
                groups.setdefault(key, []).append(parameter)
    return groups


def begin_averages(optimizer: torch.optim.AdamW) -> None:
    """Gives the optimizer what it would begin with at a parameter's first gradient, of those that had none yet.

    A checkpoint is only loaded by an optimizer that knows all its parameters.
    """
    for group in optimizer.param_groups:
        on_device = group["fused"] or group["capturable"]
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                step = torch.zeros((), device=parameter.device if on_device else None)
                averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": step, **averages}
