"""Time and memory of a training step, calculated: operations, links, and what a rank holds.

Nothing here has been compared with a GPU. Operations are counted (`tests/test_communication.py` holds them against
torch's counter); times rest on the assumptions in `Machine`.
"""

import math
from dataclasses import dataclass

from benchmarks.communication import FP32, Collective, Step, Unit, collectives, units
from dinocomp.config import Config, derive


@dataclass(frozen=True)
class Machine:
    """Assumptions about a node of eight H100 SXM and the network between nodes.

    Peak, NVLink and memory bandwidth are NVIDIA's figures for the card; eight 400 Gb/s adapters a node are those of a
    DGX H100. `utilisation`, `reached` and `cpu_hop` are guesses of the usual size.
    """

    peak: float = 989e12  # operations a second, dense bf16
    utilisation: float = 0.4  # share of the peak that a step's arithmetic reaches
    gpus: int = 8  # of a node
    gpu_bytes: float = 80e9
    nvlink: float = 450e9  # bytes a second and direction, of each GPU
    network: float = 400e9  # the same, of all adapters of a node
    reached: float = 0.8  # share of a link's bandwidth that large messages reach
    memory: float = 3.35e12  # bytes a second, of a GPU's memory
    cpu_hop: float = 50e-6  # seconds that a small message takes from process to process over TCP (gloo)


@dataclass(frozen=True)
class _Protocol:
    """One of NCCL's ways to send. Latencies are those of its tuning tables (src/graph/tuning.cc, 2.19 to 2.26)."""

    ring_start: float  # seconds
    ring_nvlink: float  # seconds a hop
    ring_network: float
    tree_start: float
    tree_nvlink: float
    tree_network: float
    share: float  # of the bandwidth
    limit: float = math.inf  # bytes a second


_US = 1e-6
_PROTOCOLS = (
    _Protocol(6.6 * _US, 0.6 * _US, 2.7 * _US, 6.8 * _US, 0.6 * _US, 5.0 * _US, share=0.5, limit=40e9),  # LL
    _Protocol(14.0 * _US, 1.9 * _US, 4.0 * _US, 14.0 * _US, 1.25 * _US, 8.5 * _US, share=0.92),  # LL128
    _Protocol(8.4 * _US, 3.4 * _US, 14.0 * _US, 8.4 * _US, 4.0 * _US, 14.0 * _US, share=1.0),  # Simple
)


def seconds(message: Collective, ranks: int, machine: Machine) -> float:
    """Of one message: the quickest of NCCL's rings, and for sums trees; over the CPUs always a ring.

    A ring's latency grows with the number of ranks, a tree's with its logarithm.
    """
    if message.cpu:
        return 2 * (ranks - 1) * machine.cpu_hop
    nodes = math.ceil(ranks / machine.gpus)
    link = machine.nvlink if nodes == 1 else min(machine.nvlink, machine.network)
    volume = message.sent(ranks) / message.times
    rounds = 2 if message.kind == "all_reduce" else 1
    between = rounds * (nodes if nodes > 1 else 0)
    found = []
    for p in _PROTOCOLS:
        transfer = volume / min(link * machine.reached * p.share, p.limit)
        hops = (rounds * (ranks - 1) - between) * p.ring_nvlink + between * p.ring_network
        found.append(p.ring_start + hops + transfer)
        if message.kind == "all_reduce":
            depth = (min(ranks, machine.gpus) - 1) * p.tree_nvlink + math.log2(nodes) * p.tree_network
            found.append(p.tree_start + 2 * depth + transfer)
    return min(found)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a pass over some images (a multiplication and an addition are two)."""

    student: float  # forward, backbone and heads
    student_global: float  # forward, backbone, of the global crops alone
    teacher: float  # backbone and heads
    teacher_heads: float
    patches: float  # the student's patch projection, whose input needs no gradient

    @property
    def backward(self) -> float:
        return 2 * self.student - self.patches


def operations(config: Config, images: int, masked: int | None = None) -> Operations:
    """Of matrix products and attention.

    Args:
        masked: rows that the heads see of patches; None for the mean number.
    """
    size, student, parts = derive.architecture(config.student), config.student, units(config)
    with_dino, with_ibot = config.dino.loss_weight > 0, config.ibot.loss_weight > 0
    patches = derive.global_patches(config)
    local_patches = (config.crops.local_crops_size // student.patch_size) ** 2
    prefix = 1 + student.num_register_tokens
    locals_ = images * config.crops.local_crops_number if with_dino else 0
    if masked is None:
        low, high = config.ibot.mask_ratio_min_max
        masked = round(2 * images * config.ibot.mask_sample_probability * (low + high) / 2 * patches)

    block = parts[1]
    matrices = [shape for shape in block.shapes if len(shape) == 2]
    attention = sum(math.prod(shape) for shape in matrices[:2])  # query, key, value; projection
    ffn = sum(math.prod(shape) for shape in matrices[2:])

    def blocks(sequences: int, tokens: int, trains: bool) -> float:
        """All but the FFN of the last one, which sees the tokens alone that losses ask for."""
        total = 0.0
        for k in range(size.depth):
            rate = student.drop_path_rate * (1 if student.drop_path_uniform else k / max(size.depth - 1, 1))
            kept = max(int(sequences * (1 - rate)), 1) if trains and rate and sequences else sequences
            products = attention + (ffn if k < size.depth - 1 else 0)
            total += kept * tokens * (2 * products + 4 * tokens * size.embed_dim)
        return total

    def projection(sequences: int, number: int) -> float:
        return 2 * sequences * number * 3 * student.patch_size**2 * size.embed_dim

    def heads(cls_rows: int) -> float:
        rows = {"dino_head": cls_rows if with_dino else 0, "ibot_head": masked if with_ibot else 0}
        if not any(unit.network == "ibot_head" for unit in parts):  # patches go through the DINO head
            rows = {"dino_head": sum(rows.values())}
        return sum(
            2 * rows[unit.network] * sum(math.prod(s) for s in unit.shapes if len(s) == 2 and s[1] > 1)
            for unit in parts
            if unit.network != "backbone"
        )

    global_projection = projection(2 * images, patches)
    asked = 2 * images + (masked if with_ibot else 0)  # tokens of the global crops
    of_global = blocks(2 * images, prefix + patches, True) + global_projection
    local = blocks(locals_, prefix + local_patches, True)
    local_projection = projection(locals_, local_patches)
    teacher_heads = heads(2 * images)
    return Operations(
        student=of_global + local + local_projection + 2 * ffn * (asked + locals_) + heads(2 * images + locals_),
        student_global=of_global + 2 * ffn * 2 * images,
        teacher=blocks(2 * images, prefix + patches, False) + global_projection + 2 * ffn * asked + teacher_heads,
        teacher_heads=teacher_heads,
        patches=global_projection + local_projection,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    compute: float  # arithmetic, and the optimizer's and the teacher's update
    sending: float  # all messages, hidden or not
    flags: float  # of these, those over the CPUs
    total: float


def step_time(step: Step, machine: Machine) -> StepTime:
    """A step whose messages are hidden behind the arithmetic of their phase, all but one of each pass.

    (The first gathering of a pass has nothing to hide behind, nor has the last gradient.) Messages without a phase are
    waited for.
    """
    config, passes = step.config, step.micro_batches
    ops = operations(config, config.train.batch_size_per_gpu)
    speed = machine.peak * machine.utilisation
    again = ops.student if config.parallelism.activation_checkpointing == "full" else 0
    sweeps = config.dino.sinkhorn_iterations if step.teacher_looks_ahead else 0
    arithmetic = {
        "look ahead": ops.student_global / speed if step.student_looks_ahead else 0,
        "student forward": ops.student / speed,
        "teacher forward": (ops.teacher + sweeps * ops.teacher_heads) / speed,
        "backward": (ops.backward + again) / speed,
    }
    messages = collectives(step)
    sent = [(m, seconds(m, step.ranks, machine)) for m in messages]
    total = 0.0
    for phase, busy in arithmetic.items():
        ours = [(m, each) for m, each in sent if m.phase == phase]
        sending = sum(m.times * each for m, each in ours)
        number = sum(m.times for m, _ in ours)
        total += max(busy, sending) + (passes * sending / number if number else 0)
    update = _update(step, machine)
    waited = sum(m.times * each for m, each in sent if not m.phase)
    return StepTime(
        compute=sum(arithmetic.values()) + update,
        sending=sum(m.times * each for m, each in sent),
        flags=sum(m.times * each for m, each in sent if m.cpu),
        total=total + waited + update,
    )


def _update(step: Step, machine: Machine) -> float:
    """AdamW (28 bytes a parameter read and written), clipping (8) and the teacher's average (12)."""
    return 48 * _held(step) / (machine.memory * machine.reached)


def _held(step: Step) -> float:
    """Numbers of each kind that a rank keeps of the student: the most that a rank keeps, for shares are uneven."""
    parts = units(step.config)
    if step.strategy not in ("fsdp", "fsdp2"):
        return sum(unit.parameters for unit in parts)
    return sum(unit.gathered(step.strategy, step.ranks, FP32) for unit in parts) / FP32 / step.ranks


def state_bytes(step: Step) -> dict[str, float]:
    """What a GPU holds beside activations: weights, averages and gradients, and room for sending."""
    parts, held = units(step.config), _held(step)
    found = {
        "student, fp32": FP32 * held,
        "gradients, fp32": FP32 * held,
        "AdamW's averages, fp32": 2 * FP32 * held,
        "teacher, fp32": FP32 * held,
    }
    if step.strategy == "ddp" and step.ranks > 1:
        found["DDP's buckets, fp32"] = FP32 * held  # a copy of the gradients
    if step.strategy in ("fsdp", "fsdp2"):
        found |= _gathered(step, parts)
    return found


def _gathered(step: Step, parts: list[Unit]) -> dict[str, float]:
    sizes = sorted((unit.gathered(step.strategy, step.ranks, step.element) for unit in parts), reverse=True)
    largest = max(unit.scattered(step.strategy, step.ranks, step.element) for unit in parts)
    whole = sum(sizes) if not step.config.parallelism.reshard_after_forward else sum(sizes[:2])
    return {
        "gathered weights": whole,  # the unit that computes and the one after it, or the whole student
        "a unit's gradients, fp32, and as computed": largest * (1 + step.element / FP32),
    }
