"""What a training step sends, as formulas: every collective, its bytes and how often it happens.

`tests/test_communication.py` holds them against what running processes send.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from dinocomp.build.model import build_networks
from dinocomp.config import Config, derive
from dinocomp.models.block import Block

FP32 = 4  # bytes
_FLAT_ALIGNMENT = 16  # bytes, at which FSDP lets each weight of a flat tensor begin
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # bytes of gradients that DDP sends at once: at first, then


@dataclass(frozen=True)
class Collective:
    """One kind of message of a step.

    Attributes:
        purpose: what for.
        kind: all_reduce, all_gather, reduce_scatter or broadcast.
        bytes: of the whole tensor: what is reduced, what is gathered in the end, what is scattered.
        times: in a step.
        phase: what may be computed while it is under way: "student forward", "teacher forward", "backward", "look
            ahead"; "" for messages that are waited for.
        cpu: whether it goes over the CPUs (gloo).
    """

    purpose: str
    kind: str
    bytes: int
    times: int
    phase: str = ""
    cpu: bool = False

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends in a step, as a ring sends them; it receives as many."""
        rounds = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}[self.kind]
        return self.times * self.bytes * rounds * (ranks - 1) / ranks


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered together: a transformer block, or what a network has besides its blocks.

    Attributes:
        shapes: of its weights, in their order.
        trained: whether each of them gets a gradient.
    """

    network: str  # backbone, dino_head, ibot_head
    shapes: tuple[tuple[int, ...], ...]
    trained: tuple[bool, ...]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def gathered(self, strategy: str, ranks: int, element: int) -> int:
        """Bytes of the unit once it is gathered, with padding, `element` bytes a number.

        FSDP lays weights end to end and pads the whole. FSDP2 cuts each weight along its first dimension, in equal
        numbers of rows: one of a single row takes its size on every rank, and `ranks` times that when gathered.
        """
        return element * sum(self._numbers(strategy, ranks, element, self.shapes))

    def scattered(self, strategy: str, ranks: int, element: int) -> int:
        """Bytes of the unit's gradients, fp32, with padding, as they are summed and scattered."""
        if strategy == "fsdp":  # one flat tensor, laid out as the weights are
            return FP32 * sum(self._numbers(strategy, ranks, element, self.shapes))
        shapes = [shape for shape, trained in zip(self.shapes, self.trained, strict=True) if trained]
        return FP32 * sum(self._numbers(strategy, ranks, element, shapes))

    def _numbers(self, strategy: str, ranks: int, element: int, shapes: Any) -> Iterator[int]:
        if strategy == "fsdp2":
            yield from (ranks * math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for shape in shapes)
            return
        numbers, align = 0, _FLAT_ALIGNMENT // element
        for shape in shapes:
            numbers = math.ceil(numbers / align) * align + math.prod(shape)
        yield math.ceil(numbers / ranks) * ranks


@cache
def units(config: Config) -> list[Unit]:
    """The units of the student, which are those of the teacher, without building it in memory."""
    with torch.device("meta"):
        networks = build_networks(config)
    if not config.ibot.loss_weight:
        networks.backbone.mask_token.requires_grad_(False)
    found = []
    for name, net in vars(networks).items():
        if net is None:
            continue
        blocks = [module for module in net.modules() if isinstance(module, Block)]
        inside = {id(p) for block in blocks for p in block.parameters()}
        for module in (net, *blocks):
            mine = [p for p in module.parameters() if module is not net or id(p) not in inside]
            found.append(Unit(name, tuple(tuple(p.shape) for p in mine), tuple(p.requires_grad for p in mine)))
    return found


@dataclass(frozen=True)
class Step:
    """What of a run decides the messages of a step.

    Attributes:
        element: bytes of a number that networks compute with: 4 in fp32, 2 in bf16.
        measured: whether gauges and metrics are taken in this step.
    """

    config: Config
    strategy: str
    ranks: int
    element: int = 2
    measured: bool = False

    @property
    def micro_batches(self) -> int:
        return math.ceil(self.config.train.batch_size_per_gpu / derive.micro_batch(self.config))

    @property
    def sinkhorn(self) -> bool:
        return self.config.train.centering == "sinkhorn_knopp"

    @property
    def student_looks_ahead(self) -> bool:
        return self.micro_batches > 1 and self.config.dino.koleo_loss_weight > 0

    @property
    def teacher_looks_ahead(self) -> bool:
        return self.micro_batches > 1 and self.sinkhorn


def collectives(step: Step) -> list[Collective]:
    """Every message of a step, in no order."""
    if step.ranks == 1:
        return []
    parameters = _ddp(step) if step.strategy == "ddp" else _sharded(step)
    return [c for c in (*parameters, *_targets(step), *_koleo(step), *_loop(step), *_gauges(step)) if c.times]


def _ddp(step: Step) -> list[Collective]:
    gradients = [
        FP32 * math.prod(shape)
        for unit in units(step.config)
        for shape, trained in zip(unit.shapes, unit.trained, strict=True)
        if trained
    ]
    buffers = 6 + sum(0 if step.sinkhorn else k for k in _target_sizes(step.config))  # mean and std; centres
    return [
        *(Collective("gradients", "all_reduce", size, 1, "backward") for size in _buckets(gradients)),
        Collective("DDP's copy of buffers (mean, std, centres)", "broadcast", FP32 * buffers, 1),
    ]


def _buckets(gradients: list[int]) -> list[int]:
    """Sizes of DDP's messages: gradients fill them from the last weight to the first.

    (DDP goes by the order in which gradients are ready, in which neighbours may change places; so one of them may be in
    the message before or after. The sum and the number of messages stay.)
    """
    sizes, limit = [0], _FIRST_BUCKET
    for size in reversed(gradients):
        if sizes[-1] >= limit:
            sizes.append(0)
            limit = _BUCKET
        sizes[-1] += size
    return sizes


def _sharded(step: Step) -> list[Collective]:
    config, passes = step.config, step.micro_batches
    again = passes if config.parallelism.reshard_after_forward else 0  # once more for backward
    # Weights that stay gathered after a forward are still there in the one that follows a look ahead.
    ahead = passes if step.student_looks_ahead and config.parallelism.reshard_after_forward else 0
    messages = []
    for unit in units(config):
        layout = step.strategy, step.ranks, step.element
        size, gradients = unit.gathered(*layout), unit.scattered(*layout)
        backbone = unit.network == "backbone"
        sweeps = config.dino.sinkhorn_iterations * passes * _losses_of(step, unit.network)
        teacher = passes + (sweeps if step.teacher_looks_ahead and not backbone else 0)
        messages += [
            Collective("student, look ahead", "all_gather", size, ahead if backbone else 0, "look ahead"),
            Collective("student, forward", "all_gather", size, passes, "student forward"),
            Collective("student, backward", "all_gather", size, again, "backward"),
            Collective("teacher", "all_gather", size, teacher, "teacher forward"),
            Collective("gradients", "reduce_scatter", gradients, passes, "backward"),
        ]
    return [*messages, *_norms(step)]


def _norms(step: Step) -> list[Collective]:
    """Of gradients in shares: a number for each network.

    Of FSDP2's DTensors torch 2.7 sums it twice, for the factor that gradients are scaled by and for who asks; torch
    2.11 once, but the norms of all weights. (Versions between were not looked at.)
    """
    purpose = "clipping: norm of a network"
    weights = Counter(unit.network for unit in units(step.config) for trained in unit.trained if trained)
    if step.strategy == "fsdp":
        return [Collective(purpose, "all_reduce", FP32, len(weights))]
    if torch.__version__ < "2.11":
        return [Collective(purpose, "all_reduce", FP32, 2 * len(weights))]
    return [Collective(purpose, "all_reduce", FP32 * number, 1) for number in weights.values()]


def _losses_of(step: Step, network: str) -> int:
    """How many losses ask a head."""
    heads = derive.head_sizes(step.config)
    asked = {"dino": "dino_head", "ibot": "ibot_head" if "ibot_head" in heads else "dino_head"}
    return sum(asked[loss] == network for loss in derive.prototypes(step.config))


def _target_sizes(config: Config) -> list[int]:
    """Prototypes K of the targets, which both exist, also where a loss is off."""
    heads = derive.head_sizes(config)
    return [
        heads[name].prototypes if name in heads else heads["dino_head"].prototypes if "dino_head" in heads else 1
        for name in ("dino_head", "ibot_head")
    ]


def _targets(step: Step) -> list[Collective]:
    messages = []
    for loss, prototypes in derive.prototypes(step.config).items():
        if step.sinkhorn:
            messages += [
                Collective("Sinkhorn-Knopp: largest logit, rows", "all_reduce", FP32, 2),
                Collective(
                    f"Sinkhorn-Knopp, {loss}", "all_reduce", FP32 * prototypes, step.config.dino.sinkhorn_iterations
                ),
            ]
        else:
            messages.append(Collective(f"centre, {loss}", "all_reduce", FP32 * (prototypes + 1), 1))
    return messages


def _koleo(step: Step) -> list[Collective]:
    config = step.config
    if not (config.dino.koleo_loss_weight and config.dino.koleo_distributed):
        return []
    images, width = derive.images_per_iteration(config, step.ranks), derive.architecture(config.student).embed_dim
    return [
        Collective("KoLeo: features of a view", "all_gather", FP32 * images * width, 2),
        Collective("KoLeo: nearest neighbours", "all_gather", 8 * images, 2),
    ]


def _loop(step: Step) -> list[Collective]:
    flags = Collective("flags: bad image, bad step, stop", "all_reduce", 8, 3, cpu=True)
    performance = step.config.performance
    if performance.async_step and performance.fused_optimizer and step.strategy == "ddp":
        return [replace(flags, times=2), Collective("flag: bad step", "all_reduce", FP32, 1)]
    if performance.async_step:
        return [flags]
    return [
        flags,
        Collective("Composer: images of the batch; samples so far", "all_reduce", 8, 2),
        Collective("Composer: loss", "all_reduce", FP32, 1),
        Collective("Composer: time of the batch", "broadcast", FP32, 1),
        Collective("Composer: whether the data are at an end", "all_reduce", 1, 1),
    ]


def _gauges(step: Step) -> list[Collective]:
    if not step.measured:
        return []
    config, losses = step.config, derive.prototypes(step.config)
    width = derive.architecture(config.student).embed_dim
    terms = (1 + bool(config.crops.local_crops_number) if "dino" in losses else 0) + ("ibot" in losses)
    terms += bool(config.dino.koleo_loss_weight)
    numbers = terms + len({unit.network for unit in units(config)}) + 1 + (2 if step.sinkhorn else 3) * len(losses)
    sums = 2 * width + 1 + sum(prototypes + 2 for prototypes in losses.values())  # in double precision
    return [
        Collective("gauges: features and targets", "all_reduce", 8 * sums, 1),
        Collective("metrics", "all_reduce", FP32 * numbers, 1),
    ]
