"""The pre-norm transformer block, with LayerScale and drop path as a subset of the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinocomp.models.attention import Attention, Groups
from dinocomp.models.ffn import build_ffn
from dinocomp.models.recompute import MODES, run


class LayerScale(nn.Module):
    """Scales each channel by a learnt factor (Touvron et al. 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.init_value = init_value
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def kept_rows(groups: Groups, kept: Sequence[Tensor | None], device: torch.device) -> tuple[Tensor, Tensor, Groups]:
    """Where the sequences that a residual branch computes lie in a packed batch.

    Of b sequences s are computed; the branch's output is scaled by b / s to keep its mean.

    Args:
        kept: for each group, int64 [s], its sequences that are computed, or None for all.

    Returns:
        rows: [kept tokens], positions of their tokens in the packed tensor.
        scale: [kept tokens, 1], b / s of each token's group.
        groups: the packing of the kept tokens.
    """
    rows, scales, packing, offset = [], [], [], 0
    for (sequences, tokens), chosen in zip(groups, kept, strict=True):
        chosen = torch.arange(sequences, device=device) if chosen is None else chosen  # [s]
        count = len(chosen)
        rows.append((offset + chosen[:, None] * tokens + torch.arange(tokens, device=device)).flatten())  # [s * N]
        scales.append(torch.full((count * tokens, 1), sequences / count, device=device))
        packing.append((count, tokens))
        offset += sequences * tokens
    return torch.cat(rows), torch.cat(scales), packing


class AddRows(torch.autograd.Function):
    """x.index_add(0, rows, y) of rows that differ, but only they are kept for backward, all that the gradients need.

    Torch's own keeps y [kept tokens, dim], too: a sixth of what a block keeps in bf16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        if torch.compiler.is_compiling():  # one kernel that stores each row once, where adding would be atomic
            return x.index_copy(0, rows, x.index_select(0, rows) + y)
        return x.index_add(0, rows, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (rows,) = ctx.saved_tensors
        return grad, None, grad.index_select(0, rows)


class TakeRows(torch.autograd.Function):
    """x[rows] of rows that differ, so that gradients are stored, where torch would sort rows to add them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, rows, grad), None


class Block(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))), over packed sequences.

    Args:
        dim: width of the tokens.
        init_values: start of LayerScale; 0 or None for none.
        drop_path: while training, the share of sequences for which a branch is not computed at all, which saves their
            time. They are drawn outside, so that a forward pass can be compiled, and repeated.
        recompute, offload: while training, what is kept for backward, and where; `mode` and `offload` of
            `recompute.run`. Inside the block, so that a block is the unit of sharding with or without it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        ffn_layer: str = "mlp",
        init_values: float | None = None,
        drop_path: float = 0.0,
        kernel: str = "auto",
        recompute: str = "none",
        offload: bool = False,
    ) -> None:
        super().__init__()
        if recompute not in MODES:
            raise ValueError(f"no recomputation called '{recompute}'; there are {', '.join(MODES)}")
        self.drop_path = drop_path
        self.recompute = recompute
        self.offload = offload
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, kernel=kernel)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = build_ffn(ffn_layer, dim, int(dim * mlp_ratio), bias=ffn_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def count_kept(self, sequences: int) -> int | None:
        """How many of so many sequences a branch computes; None where it is all of them, and nothing is to be drawn."""
        if not self.training or self.drop_path == 0.0:
            return None
        return max(int(sequences * (1 - self.drop_path)), 1)

    def forward(
        self,
        x: Tensor,
        groups: Groups,
        kept: Sequence[Tensor | None] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """[tokens, dim] -> [tokens, dim], or [rows, dim] of those that are wanted.

        Args:
            kept: for each group int64 [2, s], the sequences that attention and FFN compute, or None for all of them.
            wanted: int64 [rows], positions of the tokens whose output is asked for, each once; their attention looks at
                all tokens, the FFN is computed for them alone. None for all.
        """
        lighter = self.recompute != "none" or self.offload
        if lighter and self.training and torch.is_grad_enabled():
            return run(self._compute, x, groups, kept, wanted, mode=self.recompute, offload=self.offload)
        return self._compute(x, groups, kept, wanted)

    def _compute(
        self, x: Tensor, groups: Groups, kept: Sequence[Tensor | None] | None, wanted: Tensor | None
    ) -> Tensor:
        def attention(y: Tensor) -> Tensor:
            return self.ls1(self.attn(self.norm1(y), packing))

        def ffn(y: Tensor) -> Tensor:
            return self.ls2(self.mlp(self.norm2(y)))

        of_attention, of_ffn, packing = None, None, groups  # all tokens
        if kept is not None and any(chosen is not None for chosen in kept):
            (*of_attention, packing), (*of_ffn, _) = (
                kept_rows(groups, [None if pair is None else pair[branch] for pair in kept], x.device)
                for branch in range(2)
            )
        x = _add(x, attention, of_attention)
        if wanted is None:
            return _add(x, ffn, of_ffn)
        asked = TakeRows.apply(x, wanted)  # [rows, dim]
        if of_ffn is None:
            return asked + ffn(asked)
        rows, scale = of_ffn
        factor = scale.new_zeros(len(x), 1).index_copy(0, rows, scale)[wanted]  # [rows, 1], 0 where FFN is dropped
        return asked + (ffn(asked) * factor).to(asked.dtype)


def _add(x: Tensor, branch: Callable[[Tensor], Tensor], kept: Sequence[Tensor] | None) -> Tensor:
    """x + branch(x), of all tokens, or of some rows [kept tokens], scaled by [kept tokens, 1]."""
    if kept is None:
        return x + branch(x)
    rows, scale = kept
    return AddRows.apply(x, rows, (branch(TakeRows.apply(x, rows)) * scale).to(x.dtype))
