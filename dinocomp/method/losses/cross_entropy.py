"""Cross-entropy of the student against the teacher's targets, with neither side as fp32 [rows, prototypes].

With 65,536 prototypes that tensor takes a gigabyte, and each pass over it shows in the step's time. Both sides stay
logits in the compute type; probabilities are made of them where they are summed, some rows at a time, and again for the
gradient, which is known in closed form. Compiled, nothing is made at all: sums are taken as logits are read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Numbers at a time: in fp32 8 MB, which a core's caches hold, or 128 MB, which keep a GPU busy for longer than it
# takes to launch the next kernel. `config/sizes.py` has them, too.
AT_A_TIME = {"cpu": 1 << 21, "cuda": 1 << 25}


@dataclass(frozen=True)
class Targets:
    """Distributions over K prototypes, p[..., k] = exp(scale * (logits[..., k] - top[...]) + column[k] - row[...]).

    Softmax, centring and Sinkhorn-Knopp are all of this form. A `row` of inf makes a row of zeros.
    """

    logits: Tensor  # [..., K] of the teacher, in the compute type
    scale: Tensor  # [] fp32, 1 / temperature: a tensor, for compiled code would be made anew for each number
    top: Tensor  # [...] fp32, each row's largest logit, or as large a number: so large ones lose nothing by rounding
    column: Tensor  # [K] fp32, logarithms of the prototypes' factors
    row: Tensor  # [...] fp32, logarithms of what each row is divided by
    compiled: bool = False  # whether losses read them by compiled code

    def dense(self) -> Tensor:
        """The distributions themselves, [..., K] fp32."""
        return _probabilities(self.logits, self.scale, self.top, self.column, self.row)

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows: slice) -> "Targets":
        return replace(self, logits=self.logits[rows], top=self.top[rows], row=self.row[rows])

    def unflatten(self, *sizes: int) -> "Targets":
        """[a * b, K] -> [a, b, K]."""
        fields = {name: getattr(self, name).unflatten(0, sizes) for name in ("logits", "top", "row")}
        return replace(self, **fields)


def cross_entropy(targets: Targets, logits: Tensor, temperature: float) -> Tensor:
    """-sum_v sum_k targets[v, r, k] log softmax(logits[c, r] / temperature)[k], in fp32.

    Several crops c may be compared with the same targets, and with several of them v at once, for cross-entropy is
    linear in its target.

    Args:
        targets: [V, R, K].
        logits: [C, R, K] of the student.
        temperature: of the student.

    Returns:
        [C, R].
    """
    return _CrossEntropy.apply(
        logits,
        targets.logits,
        targets.scale,
        targets.top,
        targets.column,
        targets.row,
        temperature,
        targets.compiled,
    )


def chunks(rows: int, numbers: int, device: torch.device, *, compiled: bool = False) -> Iterator[slice]:
    """Slices of so many rows that take so many numbers each, as many at a time as is good for speed; of compiled code,
    which keeps none of them, all."""
    step = rows if compiled else AT_A_TIME["cpu" if device.type == "cpu" else "cuda"] // max(numbers, 1)
    step = max(step, 1)
    return (slice(first, first + step) for first in range(0, rows, step))


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by torch.compile, for each of the shapes that it meets."""
    # What is read of so many tensors would by default be written to memory where it is summed twice: fp32 [rows, K].
    known = [name for name in ("realize_reads_threshold",) if name in torch._inductor.list_options()]
    return torch.compile(function, dynamic=False, fullgraph=True, options=dict.fromkeys(known, 16))


def _probabilities(logits: Tensor, scale: Tensor, top: Tensor, column: Tensor, row: Tensor) -> Tensor:
    return torch.addcmul(column, logits - top[..., None], scale).sub_(row[..., None]).exp_()


def _values(logits: Tensor, *targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [C, R], logarithm of softmax's divisor [C, R], and mass of the targets [R]: V, but 0 for a row of zeros."""
    p = _probabilities(*targets).sum(dim=0)  # [R, K]
    z = logits.float() / temperature  # [C, R, K]
    log_q = z.log_softmax(dim=-1)
    lse = z[..., 0] - log_q[..., 0]
    return -log_q.mul_(p).sum(dim=-1), lse, p.sum(dim=-1)


def _gradient(logits: Tensor, *targets: Tensor, temperature: float, grad: Tensor, lse: Tensor, mass: Tensor) -> Tensor:
    """By the logits, [C, R, K] in their type, where `grad` [C, R] is that by the loss."""
    grad = grad / temperature
    p = _probabilities(*targets).sum(dim=0)  # [R, K]
    q = (logits.float() / temperature).sub_(lse[..., None]).exp_()  # [C, R, K], of the student
    return q.mul_((grad * mass)[..., None]).addcmul_(p, grad[..., None], value=-1).to(logits.dtype)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target_logits: Tensor,
        scale: Tensor,
        top: Tensor,
        column: Tensor,
        row: Tensor,
        temperature: float,
        by_compiled: bool,
    ) -> Tensor:
        loss, lse = logits.new_empty(2, *logits.shape[:2], dtype=torch.float32)  # [C, R] each
        mass = lse.new_empty(lse.shape[1])  # [R]
        values = compiled(_values) if by_compiled else _values
        sides = logits, target_logits, scale, top, column, row
        for some, parts in _parts(*sides, by_compiled=by_compiled):
            loss[:, some], lse[:, some], mass[some] = values(*parts, temperature=temperature)
        ctx.save_for_backward(*sides, lse, mass)
        ctx.temperature, ctx.compiled = temperature, by_compiled
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *sides, lse, mass = ctx.saved_tensors
        by_logits = torch.empty_like(sides[0])  # [C, R, K]
        gradient = compiled(_gradient) if ctx.compiled else _gradient
        for some, parts in _parts(*sides, by_compiled=ctx.compiled):
            by_logits[:, some] = gradient(
                *parts, temperature=ctx.temperature, grad=grad[:, some], lse=lse[:, some], mass=mass[some]
            )
        return by_logits, None, None, None, None, None, None, None


def _parts(
    logits: Tensor, target_logits: Tensor, scale: Tensor, top: Tensor, column: Tensor, row: Tensor, *, by_compiled: bool
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Which rows, and both sides of them, as many at a time as `chunks` has it."""
    numbers = (len(logits) + len(target_logits)) * logits.shape[2]
    for some in chunks(logits.shape[1], numbers, logits.device, compiled=by_compiled):
        yield some, (logits[:, some], target_logits[:, some], scale, top[:, some], column, row[:, some])
