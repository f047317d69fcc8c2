"""The projection head from tokens to prototype logits."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinocomp.models.init import normal_


class WeightNormLinear(nn.Module):
    """A bias-free linear layer whose rows have a learnt length: W = weight_g * weight_v / |weight_v|.

    The names and shapes ([out, 1] and [out, in]) are those of ``torch.nn.utils.weight_norm``, which published heads
    use (Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868).
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear: U(-1/sqrt(in), 1/sqrt(in))

    def forward(self, x: Tensor) -> Tensor:
        # Sharded weights come in half precision, in which their norms would be rounded, too.
        v, g = self.weight_v.float(), self.weight_g.float()
        return F.linear(x, v * (g / v.norm(dim=1, keepdim=True)))


class DINOHead(nn.Module):
    """MLP to a bottleneck, L2 normalisation, then cosines with the prototypes: [rows, dim] -> [rows, prototypes].

    Args:
        in_dim: width of the tokens.
        out_dim: number of prototypes K.
        hidden_dim: width inside the MLP.
        bottleneck_dim: width d of the normalised vectors.
        nlayers: linear layers before the prototypes; 1 is a single linear layer to the bottleneck.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, hidden_dim: int = 2048, bottleneck_dim: int = 256, nlayers: int = 3
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.GELU()]
        layers.pop()
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)  # [rows, bottleneck]
        x = F.normalize(x.float(), dim=-1)  # [rows, bottleneck], in fp32 so that no short vector is rounded to 0
        return self.last_layer(x)
