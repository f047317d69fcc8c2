"""KoLeo: spreads the features of a batch evenly."""

import torch
import torch.nn.functional as F
from torch import Tensor


def koleo_loss(x: Tensor) -> Tensor:
    """-mean_j log(distance of x_j to its nearest neighbour), on the unit sphere (Sablayrolles et al. 2019, equation 4).

    The epsilons keep it finite for identical rows and for a single row, which is its own neighbour.

    Args:
        x: [B, D], class tokens of one view.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=1e-8)  # [B, D]
        with torch.no_grad():
            similarity = x @ x.T  # [B, B]
            neighbour = similarity.fill_diagonal_(-1).argmax(dim=1)  # [B]
        distance = (x - x[neighbour] + 1e-8).norm(dim=-1)  # [B]
        return -(distance + 1e-8).log().mean()
