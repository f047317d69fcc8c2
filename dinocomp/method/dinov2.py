"""DINOv2 as a ComposerModel: student, teacher, and the loss between them (Oquab et al. 2024, section 4).

Three roles: the `student` is trained, the `teacher` is its moving average and what a run is after, and the `target`
says what the student is to predict. The target is the teacher itself, or, in distillation (section 5 there), a network
that stays as it is.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from composer.models import ComposerModel
from torch import Tensor, nn

from dinocomp.data import Batch
from dinocomp.method.ema import ema_update
from dinocomp.method.gauges import TeacherGauges
from dinocomp.method.losses import (
    Centering,
    SinkhornKnopp,
    Targets,
    dino_loss,
    ibot_loss,
    koleo_gradient,
    koleo_loss,
    with_gradient,
)
from dinocomp.method.parts import Part, PatchRows, TeacherRows, look_ahead
from dinocomp.method.pixels import Colours, Normalize
from dinocomp.method.shell import Shell, whole_weights
from dinocomp.models import DINOHead, Rows, VisionTransformer


@dataclass
class Networks:
    """A backbone and its heads. Without `ibot_head`, patches go through `dino_head`, if iBOT is on."""

    backbone: VisionTransformer
    dino_head: DINOHead | None
    ibot_head: DINOHead | None


@dataclass(frozen=True)
class LossWeights:
    """Factors of the terms in the total; a term of weight 0 is not computed."""

    dino: float
    ibot: float
    koleo: float


@dataclass
class Outputs:
    """What a forward pass hands to the loss; None where a term is off."""

    cls: Tensor  # [2, B, D] student class tokens of the global crops
    dino_targets: Targets | None  # [2 * B, K]
    global_logits: Tensor | None  # [2, B, K]
    local_logits: Tensor | None  # [L, B, K]
    ibot_targets: Targets | None  # [R, K']
    ibot_logits: Tensor | None  # [R, K']
    asked: PatchRows | None  # which patches the R rows are
    part: Part


class DINOv2(ComposerModel):
    """Student and teacher of DINOv2, and its loss.

    The networks are direct children, each called through its own ``forward``; buffers live in children. That is what
    Composer's sharding needs.

    Args:
        student, teacher: networks of the same shape; the teacher should have no drop path and starts as a copy.
        target: for distillation, networks of any shape that give the targets in the teacher's place, whose heads have
            the student's numbers of prototypes and patches as large as the student's. No child of the model: they are
            neither trained nor saved with it, and who builds the model brings them to its device.
        dino_targets, ibot_targets: how teacher logits become targets.
        weights: of the loss terms.
        student_temp: softmax temperature of the student.
        mean, std: of the pixels, by channel, in [0, 1].
        masking: whether batches hold masked patches; else the mask token is never used.
        all_patches: whether iBOT compares all patches of the global crops, or the masked ones.
        max_masked: most masked patches that a batch on a rank can have, by (images, patches of a global crop); they are
            counted in every batch of others.
        koleo_distributed: whether KoLeo looks for neighbours among the images of all ranks.
        colours: what changes the crops' colours here, where the workers did not; batches then say how.

    Attributes:
        teacher_temp, momentum: of the present iteration; a callback sets them, until then they are None.
        terms: the weighted loss terms of the last batch on this rank, of all its micro-batches, detached; their sum is
            the total.
        measuring: whether forward passes also collect what `gauges` needs.
        frozen_backbone: whether the student's backbone is left as it is: its heads alone have gradients.
    """

    def __init__(
        self,
        student: Networks,
        teacher: Networks,
        *,
        target: Networks | None = None,
        dino_targets: Centering | SinkhornKnopp,
        ibot_targets: Centering | SinkhornKnopp,
        weights: LossWeights,
        student_temp: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        max_masked: Mapping[tuple[int, int], int],
        masking: bool = True,
        all_patches: bool = False,
        koleo_distributed: bool = False,
        colours: Colours | None = None,
    ) -> None:
        super().__init__()
        self.weights = weights
        self.student_temp = student_temp
        self.max_masked = dict(max_masked)
        self.masking = masking and bool(weights.ibot)
        self.all_patches = all_patches
        self.koleo_distributed = koleo_distributed
        self.teacher_temp: float | None = None
        self.momentum: float | None = None
        self.terms: dict[str, Tensor] = {}
        self.measuring = False
        self.frozen_backbone = False
        self._gauges = TeacherGauges()
        self._parts: deque[Part] = deque()  # of the micro-batches to come

        self.colours = colours
        self.normalize = Normalize(mean, std)
        self.dino_targets = dino_targets
        self.ibot_targets = ibot_targets
        for module in self.unsharded():  # or they would be given bf16 where they need fp32
            module._fsdp_wrap = False
        for role, networks in (("student", student), ("teacher", teacher)):
            for name, net in vars(networks).items():
                setattr(self, f"{role}_{name}", None if net is None else Shell(net))
        # In a dict, where torch does not find them.
        self._target = {n: Shell(net) for n, net in vars(target).items() if net is not None} if target else {}
        for net in [*self.networks("teacher").values(), *self.networks("target").values()]:
            net.requires_grad_(False)
        if not self.masking:
            student.backbone.mask_token.requires_grad_(False)  # it would never have a gradient

    @property
    def distils(self) -> bool:
        """Whether the targets come from a network other than the teacher."""
        return bool(self._target)

    def networks(self, role: str) -> dict[str, nn.Module]:
        """The networks of `student`, `teacher` or `target` by name: backbone and those of dino_head, ibot_head that are
        on. Those of `target` are the teacher's where nothing is distilled."""
        return {name: shell.net for name, shell in self.shells(role).items()}

    def shells(self, role: str) -> dict[str, Shell]:
        """What the networks of a role are called through, by name; sharding may have wrapped them."""
        if role == "target":
            return self._target or self.shells("teacher")
        shells = {name: getattr(self, f"{role}_{name}") for name in ("backbone", "dino_head", "ibot_head")}
        return {name: shell for name, shell in shells.items() if shell is not None}

    def weights_of(self, role: str) -> dict[str, dict[str, Tensor]]:
        """The weights of each network of `student` or `teacher`, whole, by network and name.

        Of sharded networks they are on the CPU of rank 0, and nothing is on the others; one weight at a time is
        gathered on the device. All ranks must call it.
        """
        return {name: whole_weights(shell) for name, shell in self.shells(role).items()}

    def unsharded(self) -> tuple[nn.Module, ...]:
        """The modules without weights."""
        modules = (self.colours, self.normalize, self.dino_targets, self.ibot_targets)
        return tuple(module for module in modules if module is not None)

    def targets(self) -> dict[str, Centering | SinkhornKnopp]:
        """What makes targets of the teacher's logits, by loss ("dino", "ibot"), of those that are on."""
        makers = {"dino": (self.weights.dino, self.dino_targets), "ibot": (self.weights.ibot, self.ibot_targets)}
        return {name: maker for name, (weight, maker) in makers.items() if weight}

    def begin_step(self, batches: Sequence[Batch], to_device: Callable[[Batch], Batch] = lambda batch: batch) -> None:
        """Before the forward passes of an optimizer step, which must come in this order. May be called again, for other
        micro-batches of the same step. A forward pass that nothing was said of is a step of its own.

        Args:
            to_device: brings a batch to the model's device, where it must be seen before its forward pass.
        """
        self.terms = {}
        self._gauges.clear()
        self.forget_batch()
        self._parts = deque(look_ahead(self, batches, to_device))

    def _pixels(self, batch: Batch, kind: str) -> Tensor:
        """What the networks see of the `global` or the `local` crops, crop-major: [2B, C, G, G] or [L * B, C, l, l]."""
        crops = _crop_major(batch[f"{kind}_crops"])
        if self.colours is not None:
            crops = self.colours(crops, _crop_major(batch[f"{kind}_colours"]))
        return self.normalize(crops)

    def global_inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None, PatchRows | None]:
        """What the networks see of the global crops, crop-major: pixels [2B, C, G, G], the student's masks [2B, N], and
        which patches iBOT compares."""
        crops = self._pixels(batch, "global")
        if not self.weights.ibot:
            return crops, None, None
        masks = _crop_major(batch["masks"])  # [2B, N]
        if self.all_patches:
            asked = PatchRows.every(masks)
        else:
            asked = PatchRows.of(masks, self.max_masked.get((len(crops) // 2, masks.shape[1])))
        return crops, masks if self.masking else None, asked

    def ask_teacher(self, crops: Tensor, asked: PatchRows | None) -> TeacherRows:
        """The target's tokens of unmasked global crops [2B, C, G, G] that its heads are asked about."""
        (rows,) = self.shells("target")["backbone"]([crops], patches=[asked and asked.index])
        return TeacherRows(rows.cls, rows.patches if asked else None)

    def teacher_logits(self, rows: TeacherRows) -> dict[str, Tensor]:
        """By loss: [2B, K] for "dino", [R, K'] for "ibot"; of those whose rows are given and that are on."""
        # Views are swapped: row j of the targets is the other view of the student's row j.
        use_cls = self.weights.dino and rows.cls is not None
        cls_rows = torch.cat(rows.cls.chunk(2)[::-1]) if use_cls else None  # [2B, D]
        logits = self._project("target", cls_rows, rows.patches)
        return {name: found for name, found in zip(("dino", "ibot"), logits, strict=True) if found is not None}

    def forward(self, batch: Batch) -> Outputs:
        if not self._parts:
            self.begin_step([batch])
        part = self._parts.popleft()
        crops, masks, asked = self.global_inputs(batch)
        with torch.no_grad():
            targets = self._targets(part, part.teacher or self.ask_teacher(crops, asked), asked)

        student_crops, student_masks, kept, patches = [crops], [masks], [part.kept], [asked and asked.index]
        num_local = batch["local_crops"].shape[1] if self.weights.dino else 0
        if num_local:
            student_crops.append(self._pixels(batch, "local"))
            student_masks.append(None)
            kept.append(None)
            patches.append(None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_backbone):
            rows: list[Rows] = self.student_backbone(student_crops, student_masks, kept, patches)
        if self.frozen_backbone:
            self.student_backbone.free_weights()

        cls_rows = torch.cat([r.cls for r in rows]) if self.weights.dino else None  # [(2 + L) * B, D]
        cls_logits, patch_logits = self._project("student", cls_rows, rows[0].patches if asked else None)
        # Not by two slices, each of whose gradients would be a tensor of all rows.
        by_kind = () if cls_logits is None else cls_logits.split([len(r.cls) for r in rows])
        by_crop = [logits.unflatten(0, (-1, len(batch["index"]))) for logits in by_kind]  # [2, B, K], [L, B, K]
        return Outputs(
            cls=rows[0].cls.unflatten(0, (2, -1)),
            dino_targets=targets.get("dino"),
            global_logits=by_crop[0] if by_crop else None,
            local_logits=by_crop[1] if num_local else None,
            ibot_targets=targets.get("ibot"),
            ibot_logits=patch_logits,
            asked=asked,
            part=part,
        )

    def _targets(self, part: Part, rows: TeacherRows, asked: PatchRows | None) -> dict[str, Targets]:
        """What the target said of the global crops -> targets by loss: [2B, K] for "dino", [R, K'] for "ibot"."""
        valid = {"dino": None, "ibot": asked and asked.valid}
        targets = {
            name: self.targets()[name](logits, self.teacher_temp, valid[name], part.columns.get(name))
            for name, logits in self.teacher_logits(rows).items()
        }
        if self.measuring:
            self._gauges.add(rows.cls, targets, valid)
        return targets

    def gauges(self) -> dict[str, Tensor]:
        """The teacher's gauges in the step that was measured, over all micro-batches and ranks; all ranks must ask.

        Returns:
            `feature_std`, and `entropy_H`, `prototypes_H` and, with centring, `center_norm_H` of each loss H ("dino",
            "ibot") that is on; see `method/gauges.py`. Nothing where nothing was measured.
        """
        found = self._gauges.read()
        if found:
            centred = {name: maker for name, maker in self.targets().items() if isinstance(maker, Centering)}
            found |= {f"center_norm_{name}": maker.center.norm() for name, maker in centred.items()}
        return found

    def _project(
        self, role: str, cls_rows: Tensor | None, patch_rows: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of class tokens [rows, D] and of patches [R, D]; one call of a head that both share."""
        shells = self.shells(role)
        dino_head, ibot_head = shells.get("dino_head"), shells.get("ibot_head")
        if cls_rows is None or patch_rows is None or ibot_head is not None:
            cls_logits = None if cls_rows is None else dino_head(cls_rows)
            patch_logits = None if patch_rows is None else (ibot_head or dino_head)(patch_rows)
            return cls_logits, patch_logits
        return dino_head(torch.cat([cls_rows, patch_rows])).split([len(cls_rows), len(patch_rows)])

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms' sum. Each term stays in `terms`: Composer would wait for the device once for each."""
        terms: dict[str, Tensor] = {}
        if outputs.global_logits is not None:
            global_part, local_part = dino_loss(
                outputs.dino_targets, outputs.global_logits, outputs.local_logits, self.student_temp
            )
            terms["dino_global"] = self.weights.dino * global_part
            if local_part is not None:
                terms["dino_local"] = self.weights.dino * local_part
        if self.weights.koleo:
            terms["koleo"] = self.weights.koleo * self._koleo(outputs)
        if outputs.ibot_logits is not None:
            num_crops = 2 * len(batch["global_crops"])
            terms["ibot"] = self.weights.ibot * ibot_loss(
                outputs.ibot_targets, outputs.ibot_logits, outputs.asked.weight, num_crops, self.student_temp
            )
        share = outputs.part.share
        self.terms = {name: self.terms.get(name, 0) + share * term.detach() for name, term in terms.items()}
        return {"total": sum(terms.values())}

    def _koleo(self, outputs: Outputs) -> Tensor:
        if outputs.part.koleo is not None:
            found = outputs.part.koleo
        elif self.koleo_distributed:
            found = [koleo_gradient(view, all_ranks=True) for view in outputs.cls]
        else:
            return sum(koleo_loss(view) for view in outputs.cls)
        return sum(with_gradient(*known, view.float()) for known, view in zip(found, outputs.cls, strict=True))

    def update_teacher(self) -> None:
        """Moves the teacher towards the student and the centres towards the batch; once an optimizer step."""
        ema_update(self._parameters_of("teacher"), self._parameters_of("student"), self.momentum)
        self.dino_targets.step()
        self.ibot_targets.step()

    def forget_batch(self) -> None:
        """Instead of `update_teacher`, where the optimizer's step was skipped: the centres do not see the batch."""
        self.dino_targets.forget()
        self.ibot_targets.forget()

    def _parameters_of(self, role: str) -> Iterator[nn.Parameter]:
        for net in self.networks(role).values():
            yield from net.parameters()


def _crop_major(field: Tensor) -> Tensor:
    """[B, crops, ...] -> [crops * B, ...]."""
    return field.transpose(0, 1).flatten(0, 1)
