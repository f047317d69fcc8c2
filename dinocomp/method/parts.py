"""An optimizer step in several passes (micro-batches), whose batch quantities stay those of the whole batch.

Sinkhorn-Knopp's factors and KoLeo's neighbours depend on all images of a step. They are found before its first backward
pass, from features alone: the teacher sees every part once, and keeps of it only the tokens that its heads are to be
asked about again; the student's global crops go through once more, without gradient, where KoLeo is on. What a part
then needs of the others is a `Part`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dinocomp.data import Batch
from dinocomp.method.losses import koleo_gradient

if TYPE_CHECKING:
    from dinocomp.method.dinov2 import DINOv2


@dataclass(frozen=True)
class PatchRows:
    """Which patch tokens iBOT looks at: R rows, then padding to a constant number."""

    index: Tensor  # [R] int64, into the flattened [2B * N] patches
    valid: Tensor  # [R] bool, False for padding
    weight: Tensor  # [R], 1 / (rows of the row's crop), 0 for padding

    @classmethod
    def every(cls, masks: Tensor) -> PatchRows:
        """All patches, whichever of them masks [2B, N] hide: R = 2B * N, each of weight 1 / N."""
        index = torch.arange(masks.numel(), device=masks.device)  # [R]
        weight = torch.full_like(index, 1 / masks.shape[1], dtype=torch.float32)  # [R]
        return cls(index, torch.ones_like(index, dtype=torch.bool), weight)

    @classmethod
    def of(cls, masks: Tensor, limit: int | None) -> PatchRows:
        """The masked ones, of masks [2B, N] bool. `limit` is a number of rows that is never exceeded: with it shapes
        are constant and the device is not waited for; without it there are as many rows as masked patches.

        Raises:
            ValueError: more patches are masked than the limit (seen on a CPU only, where looking costs nothing).
        """
        flat = masks.flatten()  # [2B * N]
        if limit is not None and flat.device.type == "cpu" and int(flat.sum()) > limit:
            raise ValueError(f"{int(flat.sum())} patches of the batch are masked; the limit is {limit}")
        rows = int(flat.sum()) if limit is None else min(limit, flat.numel())
        index = flat.to(torch.uint8).argsort(descending=True, stable=True)[:rows]  # [R]
        valid = flat[index]  # [R]
        per_crop = masks.sum(dim=1).clamp_min(1)  # [2B]
        return cls(index, valid, valid / per_crop[index // masks.shape[1]])


class TeacherRows(NamedTuple):
    """What the teacher's heads are asked about."""

    cls: Tensor | None  # [2B, D] class tokens of the global crops, crop-major
    patches: Tensor | None  # [R, D], of the patches that iBOT looks at


@dataclass
class Part:
    """What one pass of a step knows of the whole of it.

    Attributes:
        share: of the step's images on this rank.
        teacher: what the teacher said, if it has been asked already.
        columns: Sinkhorn-Knopp's factors by loss ("dino", "ibot").
        koleo: for each view the step's loss, and the gradient [b, D] by this part's class tokens.
        kept: which sequences the student's drop path keeps of the global crops, where it has drawn that already.
    """

    share: float = 1.0
    teacher: TeacherRows | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    koleo: list[tuple[Tensor, Tensor]] | None = None
    kept: list[Tensor | None] | None = None


@torch.no_grad()
def look_ahead(model: DINOv2, batches: Sequence[Batch], to_device: Callable[[Batch], Batch]) -> list[Part]:
    """Passes the micro-batches of a step by, and gives what each needs of the others. A single one is not looked at."""
    images = [len(batch["index"]) for batch in batches]
    parts = [Part(share=count / sum(images)) for count in images]
    if len(batches) == 1:
        return parts
    sinkhorn = [name for name, maker in model.targets().items() if maker.looks_ahead]
    koleo = bool(model.weights.koleo)
    if not (sinkhorn or koleo):
        return parts
    seen = [
        _see(model, to_device(_global(batch)), part, teacher=bool(sinkhorn), student=koleo)
        for batch, part in zip(batches, parts, strict=True)
    ]
    asked, features = zip(*seen, strict=True)
    for name in sinkhorn:

        def sweep(name: str = name) -> Iterator[tuple[Tensor, Tensor | None]]:
            for part, rows in zip(parts, asked, strict=True):
                of_loss = part.teacher._replace(**{"dino": {"patches": None}, "ibot": {"cls": None}}[name])
                yield model.teacher_logits(of_loss)[name], rows.valid if name == "ibot" else None

        columns = model.targets()[name].columns(sweep, model.teacher_temp)  # [K]
        for part in parts:
            part.columns[name] = columns
    if koleo:
        views = [
            koleo_gradient(torch.cat(view), all_ranks=model.koleo_distributed) for view in zip(*features, strict=True)
        ]
        for k, part in enumerate(parts):
            # The step's loss is the mean over its images; Composer weighs a part's loss by the part's share.
            part.koleo = [(loss, gradient.split(images)[k] / part.share) for loss, gradient in views]
    return parts


def _see(
    model: DINOv2, batch: Batch, part: Part, *, teacher: bool, student: bool
) -> tuple[PatchRows | None, tuple[Tensor, Tensor] | None]:
    """Shows one micro-batch's global crops to the teacher and to the student, and keeps in `part` what they are to be
    asked about again. Gives iBOT's rows, and the student's class tokens [b, D] of the two views."""
    crops, masks, asked = model.global_inputs(batch)
    cls = None
    if teacher:
        part.teacher = model.ask_teacher(crops, asked)
    if student:
        part.kept = model.networks("student")["backbone"].draw_kept(len(crops), crops.device)
        cls = model.student_backbone([crops], [masks], [part.kept], [None])[0].cls.chunk(2)
    return asked, cls


def _global(batch: Batch) -> dict[str, Tensor]:
    """What is looked at ahead; local crops stay where they are."""
    return {name: batch[name] for name in ("global_crops", "global_colours", "masks") if name in batch}
