"""From teacher logits to target distributions: centring or Sinkhorn-Knopp, over the batch of all ranks."""

from collections.abc import Callable, Iterable

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

    looks_ahead = False  # a target depends on its own logits and the centre, which stands still within a step

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self._sum: Tensor | None = None  # [1, K], of the rows seen since the last step, on this rank
        self._count: Tensor | None = None  # their number

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float, valid: Tensor | None = None, columns: None = None) -> Tensor:
        """Targets of teacher logits.

        Args:
            logits: [rows, K].
            temperature: of the teacher.
            valid: [rows] bool; a False row is padding: it has a target, but does not move the centre.
            columns: not needed here, see `SinkhornKnopp`.

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


_LOWEST = torch.finfo(torch.float32).min
Rows = tuple[Tensor, Tensor, Tensor]  # q [R, K], logarithm of what its rows were divided by [R], valid [R]


class SinkhornKnopp(nn.Module):
    """Targets that use every prototype equally over the batch of all ranks (Caron et al. 2020, SwAV, section 3).

    exp(z / temperature) is scaled in turn so that each prototype has mass 1 / K and each row 1 / R. The scaling is kept
    as two vectors, one factor a row and one a prototype, so the [rows, K] matrix is read and not rewritten; each row is
    first divided by its largest entry, which the factors make up for, so that no logit is too large or too small.

    The prototypes' factors are all that rows need to know of each other. `columns` finds them from several sets of rows
    (micro-batches), which it reads one after the other, once an iteration.

    Args:
        iterations: of the alternating scaling; 3 in the paper.
    """

    looks_ahead = True  # a target depends on the logits of the whole batch

    def __init__(self, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations

    @torch.no_grad()
    def forward(
        self, logits: Tensor, temperature: float, valid: Tensor | None = None, columns: Tensor | None = None
    ) -> Tensor:
        """Targets of teacher logits [rows, K]; rows whose `valid` [rows] is False take no part and get zeros.

        Args:
            columns: [K], of `columns`, where these rows are a part of the batch; None where they are all of it.

        Returns:
            [rows, K], each valid row sums to 1, fp32.
        """
        with torch.autocast(logits.device.type, enabled=False):  # it would multiply in half precision
            rows = q, _, valid = self._rows(logits, temperature, valid)
            columns = self._columns(lambda: [rows]) if columns is None else columns  # [K]
            return q * columns * (valid / (q @ columns))[:, None]

    @torch.no_grad()
    def columns(self, sweep: Callable[[], Iterable[tuple[Tensor, Tensor | None]]], temperature: float) -> Tensor:
        """The prototypes' factors for a batch in several parts: [K].

        Args:
            sweep: gives (logits [rows, K], valid [rows] or None) of each part; called once an iteration.
        """

        def rows() -> Iterable[Rows]:
            for logits, valid in sweep():
                with torch.autocast(logits.device.type, enabled=False):
                    yield self._rows(logits, temperature, valid)

        return self._columns(rows)

    def _rows(self, logits: Tensor, temperature: float, valid: Tensor | None) -> Rows:
        logits = logits.float() / temperature
        valid = logits.new_ones(len(logits)) if valid is None else valid.to(logits.dtype)  # [R]
        row_max = logits.amax(dim=1) if len(logits) else logits.new_zeros(0)  # [R]
        q = torch.exp(logits - row_max[:, None])  # [R, K], 1 at the largest of a row
        return q, row_max.masked_fill(valid == 0, _LOWEST), valid  # padding has no say in the largest

    def _columns(self, sweep: Callable[[], Iterable[Rows]]) -> Tensor:
        least = 1e-20  # bounds the factors, so that none of their products overflows or vanishes
        mass = largest = rows = None  # [K], [], []; all weights are exp(logits - the largest of them)
        for q, row_max, valid in sweep():
            if mass is None:
                mass, rows, largest = q.new_zeros(q.shape[1]), q.new_zeros(()), q.new_full((), _LOWEST)
            higher = torch.cat([row_max, largest[None]]).amax()  # a rank may have no row at all
            mass = mass * torch.exp(largest - higher) + q.T @ (valid * torch.exp(row_max - higher))
            largest, rows = higher, rows + valid.sum()
        mass = mass * torch.exp(largest - all_reduce(largest.clone(), "max"))
        rows = all_reduce(rows)  # of all ranks
        columns = 1 / (len(mass) * all_reduce(mass)).clamp_min(least)  # [K]
        for _ in range(self.iterations - 1):
            parts = [q.T @ (valid / (rows * (q @ columns)).clamp_min(least)) for q, _, valid in sweep()]  # of [K]
            columns = 1 / (len(mass) * all_reduce(sum(parts))).clamp_min(least)  # [K]
        return columns

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
