"""The pre-norm transformer block, with LayerScale and drop path as a subset of the batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinocomp.models.attention import Attention, Groups
from dinocomp.models.ffn import build_ffn


class LayerScale(nn.Module):
    """Scales each channel by a learnt factor (Touvron et al. 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.init_value = init_value
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def kept_rows(groups: Groups, rate: float, device: torch.device) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Draws, for each group, the sequences that a residual branch computes.

    Of b sequences, s = max(int(b * (1 - rate)), 1) are kept; the branch's output is scaled by b / s to keep its mean.

    Returns:
        rows: [kept tokens], positions of their tokens in the packed tensor.
        scale: [kept tokens, 1], b / s of each token's group.
        groups: the packing of the kept tokens.
    """
    rows, scales, kept, offset = [], [], [], 0
    for sequences, tokens in groups:
        count = max(int(sequences * (1 - rate)), 1)
        chosen = torch.randperm(sequences, device=device)[:count]  # [s]
        rows.append((offset + chosen[:, None] * tokens + torch.arange(tokens, device=device)).flatten())  # [s * N]
        scales.append(torch.full((count * tokens, 1), sequences / count, device=device))
        kept.append((count, tokens))
        offset += sequences * tokens
    return torch.cat(rows), torch.cat(scales), kept


class Block(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))), over packed sequences.

    Args:
        dim: width of the tokens.
        init_values: start of LayerScale; 0 or None for none.
        drop_path: while training, the share of sequences for which a branch is not computed at all. Drawn anew for
            each branch and each crop size, so it saves the time of what it drops.
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
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, kernel=kernel)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = build_ffn(ffn_layer, dim, int(dim * mlp_ratio), bias=ffn_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """[tokens, dim] -> [tokens, dim]."""
        x = self._residual(x, groups, lambda y, kept: self.ls1(self.attn(self.norm1(y), kept)))
        return self._residual(x, groups, lambda y, kept: self.ls2(self.mlp(self.norm2(y))))

    def _residual(self, x: Tensor, groups: Groups, branch: Callable[[Tensor, Groups], Tensor]) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return x + branch(x, groups)
        rows, scale, kept = kept_rows(groups, self.drop_path, x.device)
        return x.index_add(0, rows, (branch(x[rows], kept) * scale).to(x.dtype))
