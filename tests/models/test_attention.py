"""Attention inside the sequences of a packed batch, by each kernel."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinocomp.models import attention
from dinocomp.models.attention import _block_diagonal, packed_attention, sequence_starts

GROUPS = ((2, 3), (3, 4))  # sequences, tokens in each
NEEDS_XFORMERS = pytest.mark.skipif(not attention.xformers_available(), reason="xFormers cannot be imported")
OWNER = torch.repeat_interleave(torch.arange(5), torch.tensor([3, 3, 4, 4, 4]))


def dense(qkv: Tensor, owner: Tensor = OWNER) -> Tensor:
    """One attention over all tokens, in which pairs of different sequences are masked out."""
    q, k, v = qkv.permute(1, 2, 0, 3)  # [heads, T, head_dim] each
    return F.scaled_dot_product_attention(q, k, v, attn_mask=owner[:, None] == owner).transpose(0, 1)


def test_packed_attention_is_attention_with_a_block_mask() -> None:
    qkv = torch.randn(18, 3, 2, 8)
    torch.testing.assert_close(packed_attention(qkv, GROUPS), dense(qkv))
    torch.testing.assert_close(packed_attention(qkv[:6], GROUPS[:1]), dense(qkv[:6], OWNER[:6]))


@NEEDS_XFORMERS
def test_xformers_mask_keeps_sequences_apart() -> None:
    """The kernel needs a GPU; what it is told to mask out does not."""
    bias = _block_diagonal(GROUPS, torch.device("cpu")).materialize((18, 18))
    assert torch.equal(bias == 0, OWNER[:, None] == OWNER)


@NEEDS_XFORMERS
def test_xformers_is_given_queries_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel that runs here in the place of its own; its `unbind` and mask are the real ones."""
    from xformers import ops

    def kernel(q: Tensor, k: Tensor, v: Tensor, attn_bias: object) -> Tensor:
        mask = attn_bias.materialize((18, 18))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    monkeypatch.setattr(ops, "memory_efficient_attention", kernel)
    qkv = torch.randn(18, 3, 2, 8, requires_grad=True)
    ours, expected = packed_attention(qkv, GROUPS, "xformers"), dense(qkv)
    torch.testing.assert_close(ours, expected)
    by_ours, by_dense = (torch.autograd.grad(out.square().sum(), qkv) for out in (ours, expected))
    torch.testing.assert_close(by_ours, by_dense)


def test_varlen_is_given_where_sequences_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention sequence by sequence in the place of the kernel, which older versions of torch do not have."""
    assert sequence_starts(GROUPS, torch.device("cpu")).tolist() == [0, 3, 6, 10, 14, 18]

    def kernel(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, of_keys: Tensor, longest: int, of_key: int) -> Tensor:
        assert starts.dtype == torch.int32 and torch.equal(starts, of_keys) and longest == of_key == 4
        lengths = starts.diff().tolist()
        parts = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in some)).transpose(0, 1)
            for some in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        ]
        return torch.cat(parts)

    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = kernel
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    attention.varlen_available.cache_clear()
    assert attention.varlen_available()
    attention.varlen_available.cache_clear()
    qkv = torch.randn(18, 3, 2, 8)
    torch.testing.assert_close(packed_attention(qkv, GROUPS, "varlen"), dense(qkv))
