"""What spreads class tokens in KoLeo's place, measured for docs/small-data-log.md and no part of dinocomp.

    python -m benchmarks.rivals kde benchmarks/small_data/digits.yaml recipes=[small_data] train.output_dir=out

trains as `dinocomp.train` does, with the rival times `dino.koleo_loss_weight`. One process, whole batches.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dinocomp import train
from dinocomp.method import dinov2


def kde(x: Tensor, kappa: float = 4.0) -> Tensor:
    """mean_i log mean_j exp(kappa cos(x_i, x_j)): minus the entropy by a von Mises-Fisher kernel density estimate, but
    for constants (Wang and Isola 2020, whose t is kappa / 2; Zimmermann et al. 2024, *Virchow2*).

    Args:
        x: [B, D], class tokens of one view.
    """
    z = F.normalize(x.float(), dim=-1)
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.T)[others].view(len(z), -1)  # [B, B - 1]
    return (kappa * (similarity - 1)).exp().mean(1).log().mean()


def coding_rate(x: Tensor, epsilon: float = 0.5) -> Tensor:
    """-log det(I + D / (B epsilon^2) Z Z^T) of the normalised rows, for each of the smaller of B and D, times 2 (Yu et
    al. 2020, *Maximal coding rate reduction*; Wu et al. 2025, *SimDINO*). x: as `kde`."""
    z = F.normalize(x.float(), dim=-1)
    rows, dim = z.shape
    gram = torch.eye(rows, device=z.device) + dim / (rows * epsilon**2) * z @ z.T
    return -2 * torch.logdet(gram) / min(rows, dim)


def sigreg(x: Tensor, directions: int = 256) -> Tensor:
    """Epps and Pulley's statistic of how far the rows' projections on random directions are from a normal distribution
    (Balestriero and LeCun 2025, *LeJEPA*). x: as `kde`."""
    x = x.float()
    projected = x @ F.normalize(torch.randn(x.shape[1], directions, device=x.device), dim=0)  # [B, directions]
    at = torch.linspace(-5, 5, 17, device=x.device)  # [T]
    normal = (-at.square() / 2).exp()  # its characteristic function, and the weight
    angles = projected[..., None] * at  # [B, directions, T]
    error = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
    return len(x) * torch.trapezoid(error * normal, at, dim=-1).mean()


RIVALS: dict[str, Callable[[Tensor], Tensor]] = {"kde": kde, "coding_rate": coding_rate, "sigreg": sigreg}


if __name__ == "__main__":
    dinov2.koleo_loss = RIVALS[sys.argv[1]]
    sys.exit(train.main(sys.argv[2:]))
