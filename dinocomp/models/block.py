"""The pre-norm transformer block, with LayerScale and drop path as a subset of the batch."""

from collections.abc import Callable, Sequence

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


class Block(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))), over packed sequences.

    Args:
        dim: width of the tokens.
        init_values: start of LayerScale; 0 or None for none.
        drop_path: while training, the share of sequences for which a branch is not computed at all, which saves their
            time. `draw_kept` draws them; a forward pass draws nothing, so that it can be repeated.
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

    def draw_kept(self, sequences: Sequence[int], device: torch.device) -> list[Tensor | None]:
        """Draws what the two branches compute, anew for each branch and each group.

        Args:
            sequences: b, the number of them in each group.

        Returns:
            For each group int64 [2, s], for attention and FFN, s = max(int(b * (1 - drop_path)), 1); None for all of
            them, that is, where the block drops nothing or does not train.
        """
        if not self.training or self.drop_path == 0.0:
            return [None] * len(sequences)
        counts = [max(int(number * (1 - self.drop_path)), 1) for number in sequences]
        branches = [
            [torch.randperm(number, device=device)[:count] for number, count in zip(sequences, counts, strict=True)]
            for _ in range(2)
        ]
        return [torch.stack(pair) for pair in zip(*branches, strict=True)]

    def forward(self, x: Tensor, groups: Groups, kept: Sequence[Tensor | None] | None = None) -> Tensor:
        """[tokens, dim] -> [tokens, dim]. `kept`: for each group what `draw_kept` gave; None computes everything."""
        x = self._residual(x, groups, kept, 0, lambda y, packing: self.ls1(self.attn(self.norm1(y), packing)))
        return self._residual(x, groups, kept, 1, lambda y, packing: self.ls2(self.mlp(self.norm2(y))))

    def _residual(
        self,
        x: Tensor,
        groups: Groups,
        kept: Sequence[Tensor | None] | None,
        branch: int,
        compute: Callable[[Tensor, Groups], Tensor],
    ) -> Tensor:
        if kept is None or all(chosen is None for chosen in kept):
            return x + compute(x, groups)
        rows, scale, packing = kept_rows(groups, [None if pair is None else pair[branch] for pair in kept], x.device)
        return x.index_add(0, rows, (compute(x[rows], packing) * scale).to(x.dtype))
