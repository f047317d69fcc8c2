"""Self-attention over packed sequences: crops of several sizes in one tensor, each crop attending to itself alone."""

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# One entry a crop tensor: (number of sequences, tokens in each). Tokens lie packed in that order.
Groups = Sequence[tuple[int, int]]


@cache
def xformers_available() -> bool:
    """Whether xFormers' attention can be imported (it has CUDA kernels only)."""
    try:
        import xformers.ops  # noqa: F401
    except Exception:  # a wheel built for another torch or CUDA fails in many ways, none of which we can use it after
        return False
    return True


@cache
def varlen_available() -> bool:
    """Whether this torch has attention over sequences of several lengths (FlashAttention; from 2.10 on)."""
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:
        return False
    return True


@lru_cache(maxsize=256)  # a drop path rate that rises with depth has other packings in each block
def _block_diagonal(groups: tuple[tuple[int, int], ...], device: torch.device):
    # Built once for each pair of crop sizes and batch size: it copies sequence offsets to the device.
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [tokens for sequences, tokens in groups for _ in range(sequences)]
    return BlockDiagonalMask.from_seqlens(lengths, device=device)


def sequence_starts(groups: Groups, device: torch.device) -> Tensor:
    """Where each sequence of a packed batch begins, and where the last one ends: int32 [sequences + 1]."""
    starts, end = [], 0
    for sequences, tokens in groups:
        starts.append(torch.arange(sequences, dtype=torch.int32, device=device) * tokens + end)
        end += sequences * tokens
    return torch.cat([*starts, torch.full((1,), end, dtype=torch.int32, device=device)])


def packed_attention(qkv: Tensor, groups: Groups, kernel: str = "auto") -> Tensor:
    """Scaled dot-product attention inside each sequence of a packed batch.

    Args:
        qkv: [tokens, 3, heads, head_dim], query, key and value of the sequences of all groups one after the other.
        groups: (sequences, tokens a sequence) of each group; the products add up to `tokens`.
        kernel: ``xformers`` (one call over all lengths; CUDA only, cannot be compiled), ``varlen`` (the same by torch;
            CUDA in half precision only), ``sdpa`` (one call a group), or ``auto``: xFormers on CUDA where it is
            installed, head_dim is a multiple of 8, which its kernels need, and nothing is being compiled; else SDPA.

    Returns:
        [tokens, heads, head_dim].
    """
    if kernel == "auto":
        suits = qkv.is_cuda and qkv.shape[-1] % 8 == 0 and not torch.compiler.is_compiling()
        kernel = "xformers" if suits and xformers_available() else "sdpa"
    return _KERNELS[kernel](qkv, groups)


def _xformers(qkv: Tensor, groups: Groups) -> Tensor:
    from xformers.ops import memory_efficient_attention, unbind

    # Its `unbind` makes one gradient of three that lie side by side, as its kernels write them, without a copy.
    q, k, v = unbind(qkv[None], 2)  # [1, T, heads, head_dim]
    return memory_efficient_attention(q, k, v, attn_bias=_block_diagonal(tuple(groups), qkv.device))[0]


def _varlen(qkv: Tensor, groups: Groups) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = sequence_starts(groups, qkv.device), max(tokens for _, tokens in groups)
    return varlen_attn(*qkv.unbind(1), starts, starts, longest, longest)


def _sdpa(qkv: Tensor, groups: Groups) -> Tensor:
    out = []
    sizes = [sequences * tokens for sequences, tokens in groups]
    for (sequences, tokens), part in zip(groups, qkv.split(sizes), strict=True):
        q, k, v = part.unflatten(0, (sequences, tokens)).permute(2, 0, 3, 1, 4)  # [S, heads, N, head_dim] each
        attended = F.scaled_dot_product_attention(q, k, v)  # [S, heads, N, head_dim]
        out.append(attended.transpose(1, 2).flatten(0, 1))  # [S * N, heads, head_dim]
    return torch.cat(out) if len(out) > 1 else out[0]


_KERNELS = {"xformers": _xformers, "varlen": _varlen, "sdpa": _sdpa}


class QKVLinear(nn.Linear):
    """Query, key and value in one projection, [..., dim] -> [..., 3 * dim], that leaves the keys' bias out.

    A key's bias adds the same number to all scores of a query, which softmax takes away again: it cannot change the
    output, and its gradient is 0. Computed, that gradient is rounding noise, which Adam would scale up to whole steps.
    The parameter stays, because published weights have it.
    """

    def __init__(self, dim: int, *, bias: bool = True) -> None:
        super().__init__(dim, 3 * dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.linear(x, self.weight)
        query, key, value = self.bias.chunk(3)
        return F.linear(x, self.weight, torch.cat([query, torch.zeros_like(key), value]))


class Attention(nn.Module):
    """Multi-head self-attention with a fused query-key-value projection.

    Args:
        dim: width of the tokens; a multiple of `num_heads`.
        kernel: see `packed_attention`.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, proj_bias: bool = True, kernel: str = "auto"
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kernel = kernel
        self.qkv = QKVLinear(dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """[tokens, dim] -> [tokens, dim]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [T, 3, heads, head_dim]
        out = packed_attention(qkv, groups, kernel=self.kernel)  # [T, heads, head_dim]
        return self.proj(out.flatten(1))
