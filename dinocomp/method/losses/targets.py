"""From teacher logits to target distributions: centring or Sinkhorn-Knopp, over the batch of all ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinocomp.distributed import all_reduce


class Centering(nn.Module):
    """softmax((z - c) / temperature), with c the running mean of the logits (Caron et al. 2021, section 3.1).

    A batch's logits go into the centre when `step` is called, once an optimizer step, so that the targets of a step all
    see the same centre.

    Args:
        num_prototypes: K.
        momentum: share of the old centre that is kept at each step.
    """

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self._sum: Tensor | None = None  # [1, K], of the rows seen since the last step, on this rank
        self._count: Tensor | None = None  # their number

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
        """Targets of teacher logits.

        Args:
            logits: [rows, K].
            temperature: of the teacher.
            valid: [rows] bool; a False row is padding: it has a target, but does not move the centre.

        Returns:
            [rows, K], each row sums to 1, fp32.
        """
        logits = logits.float()
        weight = logits.new_ones(len(logits)) if valid is None else valid.to(logits.dtype)  # [rows]
        # Not as a matrix product, which a GPU would do in half precision or TF32.
        batch_sum, batch_count = (logits * weight[:, None]).sum(dim=0, keepdim=True), weight.sum()  # [1, K], []
        self._sum = batch_sum if self._sum is None else self._sum + batch_sum
        self._count = batch_count if self._count is None else self._count + batch_count
        return F.softmax((logits - self.center) / temperature, dim=-1)

    @torch.no_grad()
    def step(self) -> None:
        """Moves the centre by the mean of what `forward` saw since the last step, over all ranks' rows alike."""
        if self._sum is None:
            return
        total = all_reduce(torch.cat([self._sum[0], self._count[None]]))  # [K + 1]
        # A batch without a single masked patch says nothing of where the centre is.
        mean = total[:-1] / total[-1].clamp_min(1)  # [K]
        weight = (1 - self.momentum) * (total[-1] > 0)
        self.center.lerp_(mean[None], weight)
        self.forget()

    def forget(self) -> None:
        """Drops what `forward` saw since the last step."""
        self._sum = self._count = None


class SinkhornKnopp(nn.Module):
    """Targets that use every prototype equally over the batch of all ranks (Caron et al. 2020, SwAV, section 3).

    exp(z / temperature) is scaled in turn so that each prototype has mass 1 / K and each row 1 / R. The scaling is kept
    as two vectors, one factor a row and one a prototype, so the [rows, K] matrix is read and not rewritten; each row is
    first divided by its largest entry, which the factors make up for, so that no logit is too large or too small.

    Args:
        iterations: of the alternating scaling; 3 in the paper.
    """

    def __init__(self, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
        """Targets of teacher logits [rows, K]; rows whose `valid` [rows] is False take no part and get zeros.

        Returns:
            [rows, K], each valid row sums to 1, fp32.
        """
        with torch.autocast(logits.device.type, enabled=False):  # it would multiply in half precision
            logits = logits.float() / temperature
            num_rows, num_prototypes = logits.shape
            valid = logits.new_ones(num_rows) if valid is None else valid.to(logits.dtype)  # [R]
            least = 1e-20  # bounds the factors, so that none of their products overflows or vanishes
            lowest = torch.finfo(logits.dtype).min
            row_max = logits.amax(dim=1) if num_rows else logits.new_zeros(0)  # [R]
            q = torch.exp(logits - row_max[:, None])  # [R, K], 1 at the largest of a row
            row_max = row_max.masked_fill(valid == 0, lowest)  # padding has no say in the largest
            largest = torch.cat([row_max, row_max.new_full((1,), lowest)]).amax()  # a rank may have no row at all
            row = valid * torch.exp(row_max - all_reduce(largest, "max"))  # [R]
            rows = all_reduce(valid.sum())  # [], of all ranks
            for _ in range(self.iterations):
                column = 1 / (num_prototypes * all_reduce(q.T @ row)).clamp_min(least)  # [K]
                row = valid / (rows * (q @ column)).clamp_min(least)  # [R]
            return q * column * (valid / (q @ column))[:, None]

    def step(self) -> None:
        """Sinkhorn-Knopp keeps nothing from batch to batch."""

    def forget(self) -> None:
        """As `step`."""


def build_targets(name: str, num_prototypes: int, *, momentum: float, iterations: int) -> Centering | SinkhornKnopp:
    """`centering` or `sinkhorn_knopp` by name."""
    if name == "centering":
        return Centering(num_prototypes, momentum)
    if name == "sinkhorn_knopp":
        return SinkhornKnopp(iterations)
    raise ValueError(f"no way to make targets called '{name}'; there are centering and sinkhorn_knopp")
