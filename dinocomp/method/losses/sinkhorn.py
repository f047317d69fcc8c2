"""Sinkhorn-Knopp: targets that use all prototypes alike."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dinocomp.distributed import all_reduce
from dinocomp.method.losses.cross_entropy import Targets, compiled

_LOWEST = torch.finfo(torch.float32).min


class _Rows:
    """Some rows of exp(logits / temperature), each divided by its largest entry, and their weighted sums.

    Compiled, the matrix is made anew wherever it is summed, of logits that take half as much memory to read. Else it is
    kept, [R, K] in fp32, and the sums are matrix products, which read it once.
    """

    def __init__(self, logits: Tensor, scale: Tensor, valid: Tensor | None, by_compiled: bool) -> None:
        self.logits = logits  # [R, K]
        self.scale = scale
        self.valid = logits.new_ones(len(logits), dtype=torch.float32) if valid is None else valid.float()  # [R]
        self.top = logits.amax(dim=1).float() if len(logits) else self.valid  # [R], the largest logits
        self.compiled = by_compiled
        self.q = None if by_compiled else _scaled(logits, scale, self.top)  # [R, K], 1 at the largest of a row

    def by_row(self, columns: Tensor) -> Tensor:
        """q @ columns: [R]."""
        if self.q is None:
            return compiled(_by_row)(self.logits, self.scale, self.top, columns)
        return self.q @ columns

    def by_column(self, weights: Tensor) -> Tensor:
        """weights @ q: [K]."""
        if self.q is None:
            return compiled(_by_column)(self.logits, self.scale, self.top, weights)
        return self.q.T @ weights


def _scaled(logits: Tensor, scale: Tensor, top: Tensor) -> Tensor:
    return (logits - top[:, None]).mul_(scale).exp_()


def _by_row(logits: Tensor, scale: Tensor, top: Tensor, columns: Tensor) -> Tensor:
    return (_scaled(logits, scale, top) * columns).sum(dim=1)


def _by_column(logits: Tensor, scale: Tensor, top: Tensor, weights: Tensor) -> Tensor:
    return (_scaled(logits, scale, top) * weights[:, None]).sum(dim=0)


class SinkhornKnopp(nn.Module):
    """Targets that use every prototype equally over the batch of all ranks (Caron et al. 2020, SwAV, section 3).

    exp(z / temperature) is scaled in turn so that each prototype has mass 1 / K and each row 1 / R. The scaling is kept
    as two vectors, one factor a row and one a prototype, so the [rows, K] matrix is read and not rewritten; each row is
    first divided by its largest entry, which the factors make up for, so that no logit is too large or too small.

    The prototypes' factors are all that rows need to know of each other. `columns` finds them from several sets of rows
    (micro-batches), which it reads one after the other, once an iteration.

    Args:
        iterations: of the alternating scaling; 3 in the paper.
        by_compiled: whether the passes over logits are compiled, here and in the losses.
    """

    looks_ahead = True  # a target depends on the logits of the whole batch

    def __init__(self, iterations: int, *, by_compiled: bool = False) -> None:
        super().__init__()
        self.iterations = iterations
        self.by_compiled = by_compiled

    @torch.no_grad()
    def forward(
        self, logits: Tensor, temperature: float, valid: Tensor | None = None, columns: Tensor | None = None
    ) -> Targets:
        """Targets of teacher logits [rows, K]; rows whose `valid` [rows] is False take no part and get zeros.

        Args:
            columns: [K], of `columns`, where these rows are a part of the batch; None where they are all of it.

        Returns:
            [rows, K], each valid row sums to 1.
        """
        with torch.autocast(logits.device.type, enabled=False):  # it would multiply in half precision
            rows = self._rows(logits, temperature, valid)
            columns = self._columns(lambda: [rows]) if columns is None else columns  # [K]
            row = torch.log(rows.by_row(columns)).masked_fill(rows.valid == 0, torch.inf)  # [rows]
        return Targets(logits, rows.scale, rows.top, columns.log(), row, self.by_compiled)

    @torch.no_grad()
    def columns(self, sweep: Callable[[], Iterable[tuple[Tensor, Tensor | None]]], temperature: float) -> Tensor:
        """The prototypes' factors for a batch in several parts: [K].

        Args:
            sweep: gives (logits [rows, K], valid [rows] or None) of each part; called once an iteration.
        """

        def rows() -> Iterable[_Rows]:
            for logits, valid in sweep():
                with torch.autocast(logits.device.type, enabled=False):
                    yield self._rows(logits, temperature, valid)

        return self._columns(rows)

    def _rows(self, logits: Tensor, temperature: float, valid: Tensor | None) -> _Rows:
        scale = torch.full((), 1 / temperature, device=logits.device)
        return _Rows(logits, scale, valid, self.by_compiled)

    def _columns(self, sweep: Callable[[], Iterable[_Rows]]) -> Tensor:
        least = 1e-20  # bounds the factors, so that none of their products overflows or vanishes
        mass = largest = count = None  # [K], [], []; all weights are exp(logits - the largest of them)
        for rows in sweep():
            of_rows = (rows.top * rows.scale).masked_fill(rows.valid == 0, _LOWEST)  # padding has no say in the largest
            if mass is None:
                mass, count = of_rows.new_zeros(rows.logits.shape[1]), of_rows.new_zeros(())
                largest = of_rows.new_full((), _LOWEST)
            higher = torch.cat([of_rows, largest[None]]).amax()  # a rank may have no row at all
            added = rows.by_column(rows.valid * torch.exp(of_rows - higher))
            mass = mass * torch.exp(largest - higher) + added
            largest, count = higher, count + rows.valid.sum()
        mass = mass * torch.exp(largest - all_reduce(largest.clone(), "max"))
        count = all_reduce(count)  # of all ranks
        columns = 1 / (len(mass) * all_reduce(mass)).clamp_min(least)  # [K]
        for _ in range(self.iterations - 1):
            parts = [
                rows.by_column(rows.valid / (count * rows.by_row(columns)).clamp_min(least)) for rows in sweep()
            ]  # of [K]
            columns = 1 / (len(mass) * all_reduce(sum(parts))).clamp_min(least)  # [K]
        return columns

    def step(self) -> None:
        """Sinkhorn-Knopp keeps nothing from batch to batch."""

    def forget(self) -> None:
        """As `step`."""
