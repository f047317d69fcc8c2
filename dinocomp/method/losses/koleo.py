"""KoLeo: spreads the features of a batch evenly."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinocomp.distributed import all_gather


def koleo_loss(x: Tensor) -> Tensor:
    """-mean_j log(distance of x_j to its nearest neighbour), on the unit sphere (Sablayrolles et al. 2019, equation 4).

    The epsilons keep it finite for identical rows and for a single row, which is its own neighbour.

    Args:
        x: [B, D], class tokens of one view.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        return _log_distances(x, _neighbours(x, x, first=0)).mean()


@torch.no_grad()
def koleo_gradient(x: Tensor, *, all_ranks: bool) -> tuple[Tensor, Tensor]:
    """The loss of more rows than one backward pass sees, and what these rows are to be moved by.

    Args:
        x: [n, D], class tokens of one view: of all micro-batches, say.
        all_ranks: whether neighbours are looked for among the rows of all ranks, n on each.

    Returns:
        loss: over the rows of all ranks, or of this one.
        gradient: [n, D], of that loss, times the number of ranks it is over, for ranks' gradients are averaged.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        rows, rank, ranks = (x, 0, 1) if not all_ranks else all_gather(x)  # [N, D]
        first = rank * len(x)
        neighbours = _neighbours(x, rows, first)  # [n]
        if all_ranks:
            neighbours = all_gather(neighbours)[0]  # [N]
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            loss = _log_distances(rows, neighbours).mean()
            (gradient,) = torch.autograd.grad(loss, rows)  # [N, D]: a row is also moved as another one's neighbour
        return loss.detach(), ranks * gradient[first : first + len(x)]


def with_gradient(loss: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    """A scalar of the value `loss`, whose gradient by `x` is `gradient`."""
    return loss + ((x - x.detach()) * gradient).sum()


def _neighbours(x: Tensor, rows: Tensor, first: int) -> Tensor:
    """Which of `rows` [N, D] is nearest to each x_j [n, D], itself left out, which is row `first + j`: [n]."""
    with torch.no_grad():
        similarity = F.normalize(x, dim=-1, eps=1e-8) @ F.normalize(rows, dim=-1, eps=1e-8).T  # [n, N]
        similarity.diagonal(first).fill_(-1)
        return similarity.argmax(dim=1)


def _log_distances(x: Tensor, neighbour: Tensor) -> Tensor:
    """-log |x_j - x_neighbour(j)| of the normalised rows: [N, D], [N] -> [N]."""
    x = F.normalize(x, dim=-1, eps=1e-8)  # [N, D]
    distance = (x - x[neighbour] + 1e-8).norm(dim=-1)  # [N]
    return -(distance + 1e-8).log()
