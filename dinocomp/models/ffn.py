"""Feed-forward layers of a transformer block: MLP and SwiGLU."""

import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, GELU, linear: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """SiLU-gated linear unit (Shazeer 2020, https://arxiv.org/abs/2002.05202): [..., dim] -> [..., dim].

    The inner width is two thirds of `hidden_dim`, rounded up to a multiple of 8, so that it costs what an MLP of
    `hidden_dim` costs. `w12` holds gate and value packed in this order.
    """

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        inner = (hidden_dim * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * inner, bias=bias)
        self.w3 = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)  # [..., inner] each
        return self.w3(F.silu(gate) * value)


def build_ffn(name: str, dim: int, hidden_dim: int, *, bias: bool = True) -> nn.Module:
    """The feed-forward layer called `name`: mlp, swiglu (also spelt swiglufused), identity.

    Raises:
        ValueError: there is no layer of that name.
    """
    if name == "mlp":
        return Mlp(dim, hidden_dim, bias=bias)
    if name in ("swiglu", "swiglufused"):
        return SwiGLU(dim, hidden_dim, bias=bias)
    if name == "identity":
        return nn.Identity()
    raise ValueError(f"no feed-forward layer '{name}'; there are mlp, swiglu, swiglufused, identity")
