"""Activation checkpointing: what a block keeps for backward, what it computes again, and where it keeps it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")

_PRODUCTS = ("mm", "addmm", "bmm")
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",  # what xFormers calls where it has no kernel of its own
    "_efficient_attention_forward",
)


@cache
def _saved_operators() -> frozenset[Any]:
    # By name, because no torch has all of them.
    packets = (getattr(torch.ops.aten, name, None) for name in (*_PRODUCTS, *_ATTENTION))
    return frozenset(packet.default for packet in packets if packet is not None)


def _saves(operator: Any) -> bool:
    # xFormers' kernels, its FlashAttention among them, are operators of xformers, xformers_flash, xformers_flash3, ...,
    # torch's varlen attention is one of torch_attn.
    return operator in _saved_operators() or getattr(operator, "namespace", "").startswith(("xformers", "torch_attn"))


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _saves(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def run(body: Callable[..., Tensor], x: Tensor, *args: Any, mode: str, offload: bool) -> Tensor:
    """`body(x, *args)`, with less kept for backward. Values and gradients are those of the plain call.

    Args:
        body: a function that draws no random numbers: it runs a second time in backward.
        mode: none keeps all that backward reads; selective keeps results of matrix products and attention, and computes
            the rest again (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 5, keep more: all but
            attention); full keeps `x` alone (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
        offload: keep in the machine's memory what autograd keeps: all (none) or `x` (selective, full). What selective
            keeps besides stays on the device.
    """
    with save_on_cpu(pin_memory=x.is_cuda) if offload else nullcontext():
        if mode == "none":
            return body(x, *args)
        choice = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
        return checkpoint(body, x, *args, use_reentrant=False, preserve_rng_state=False, **choice)
