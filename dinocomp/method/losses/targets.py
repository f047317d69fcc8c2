"""From teacher logits to target distributions: centring here, Sinkhorn-Knopp beside, over the batch of all ranks."""

import torch
from torch import Tensor, nn

from dinocomp.distributed import all_reduce
from dinocomp.method.losses.cross_entropy import Targets, chunks, compiled
from dinocomp.method.losses.sinkhorn import SinkhornKnopp


class Centering(nn.Module):
    """softmax((z - c) / temperature), with c the running mean of the logits (Caron et al. 2021, section 3.1).

    A batch's logits go into the centre when `step` is called, once an optimizer step, so that the targets of a step all
    see the same centre.

    Args:
        num_prototypes: K.
        momentum: share of the old centre that is kept at each step.
        by_compiled: whether the passes over logits are compiled, here and in the losses.
    """

    looks_ahead = False  # a target depends on its own logits and the centre, which stands still within a step

    def __init__(self, num_prototypes: int, momentum: float, *, by_compiled: bool = False) -> None:
        super().__init__()
        self.momentum = momentum
        self.by_compiled = by_compiled
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self._sum: Tensor | None = None  # [K], of the rows seen since the last step, on this rank
        self._count: Tensor | None = None  # their number

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float, valid: Tensor | None = None, columns: None = None) -> Targets:
        """Targets of teacher logits.

        Args:
            logits: [rows, K].
            temperature: of the teacher.
            valid: [rows] bool; a False row is padding: it has a target, but does not move the centre.
            columns: not needed here, see `SinkhornKnopp`.

        Returns:
            [rows, K], each row sums to 1.
        """
        valid = logits.new_ones(len(logits), dtype=torch.float32) if valid is None else valid.float()  # [rows]
        scale = self.center.new_full((), 1 / temperature)
        column = -self.center[0] / temperature  # [K]
        top, row, total = (
            torch.empty_like(valid),
            torch.empty_like(valid),
            torch.zeros_like(column),
        )  # [rows] twice, [K]
        read = compiled(_read) if self.by_compiled else _read
        for some in chunks(len(logits), logits.shape[1], logits.device, compiled=self.by_compiled):
            top[some], row[some], part = read(logits[some], scale, column, valid[some])
            total += part
        self._sum = total if self._sum is None else self._sum + total
        self._count = valid.sum() if self._count is None else self._count + valid.sum()
        return Targets(logits, scale, top, column, row, self.by_compiled)

    @torch.no_grad()
    def step(self) -> None:
        """Moves the centre by the mean of what `forward` saw since the last step, over all ranks' rows alike."""
        if self._sum is None:
            return
        total = all_reduce(torch.cat([self._sum, self._count[None]]))  # [K + 1]
        # A batch without a single masked patch says nothing of where the centre is.
        mean = total[:-1] / total[-1].clamp_min(1)  # [K]
        weight = (1 - self.momentum) * (total[-1] > 0)
        self.center.lerp_(mean[None], weight)
        self.forget()

    def forget(self) -> None:
        """Drops what `forward` saw since the last step."""
        self._sum = self._count = None


def _read(logits: Tensor, scale: Tensor, column: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's largest logit and the logarithm of its sum, see `Targets`, both [R]; the sum of valid rows, [K]."""
    z = logits.float()  # [R, K]
    top = z.amax(dim=-1)
    row = torch.addcmul(column, z - top[:, None], scale).logsumexp(dim=-1)
    # Not as a matrix product, which a GPU would do in half precision or TF32.
    return top, row, (z * valid[:, None]).sum(dim=0)


def build_targets(
    name: str, num_prototypes: int, *, momentum: float, iterations: int, by_compiled: bool = False
) -> Centering | SinkhornKnopp:
    """`centering` or `sinkhorn_knopp` by name."""
    if name == "centering":
        return Centering(num_prototypes, momentum, by_compiled=by_compiled)
    if name == "sinkhorn_knopp":
        return SinkhornKnopp(iterations, by_compiled=by_compiled)
    raise ValueError(f"no way to make targets called '{name}'; there are centering and sinkhorn_knopp")
