"""What a training step needs of a GPU's memory, from a configuration: the moment that needs most, in its parts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from dinocomp.config import sizes
from dinocomp.config.distil import FrozenTeacher
from dinocomp.config.schema import Config
from dinocomp.config.sizes import FP32, Step

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_LIBRARIES = 1.0e9  # CUDA's context, cuBLAS's and cuDNN's scratch memory, NCCL's buffers
_GAPS = 0.05  # of what is allocated, in the allocator's blocks but not in tensors


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the moment that needs most."""

    weights: float = 0  # of student, teacher and, in distillation, the frozen one, fp32
    optimizer: float = 0  # AdamW's two averages
    gradients: float = 0  # with DDP's buckets
    copies: float = 0  # of weights in the compute type, and gathered ones
    activations: float = 0  # of the backbones
    heads: float = 0  # what heads, targets and losses keep and make: logits most of all
    images: float = 0
    allowance: float = 0  # for CUDA and the allocator's gaps

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class MemoryPlan:
    """The estimate for one GPU of a run.

    Attributes:
        strategy: single, ddp, fsdp or fsdp2.
        limit: bytes of a GPU; None where it is not known.
        remedy: what to type, where it does not fit; '' where nothing helps.
    """

    memory: Memory
    strategy: str
    limit: float | None = None
    remedy: str = ""

    @property
    def fits(self) -> bool:
        """Whether the GPU has as much, as far as is known."""
        return self.limit is None or self.memory.total <= self.limit


def estimate(
    config: Config,
    parameters: Mapping[str, int],
    masked: int,
    *,
    world_size: int = 1,
    strategy: str = "single",
    compute: str = "bf16",
    gpu: bool = True,
    frozen: FrozenTeacher | None = None,
) -> Memory:
    """Bytes that each process needs for a training step, at the moment that needs most.

    Args:
        parameters: of the student by network ("backbone", "dino_head", "ibot_head").
        masked: R, patches of a micro-batch that iBOT compares; see `max_masked_patches` in `data/masks.py`.
        strategy: single, ddp, fsdp or fsdp2.
        compute: fp32, bf16 or fp16.
        gpu: as on a GPU, where AdamW takes many weights at once and there is an allowance for what are no tensors; else
            as on a CPU.
        frozen: what gives the targets, in distillation.
    """
    step = Step(config, parameters, world_size, strategy, _BYTES[compute], masked, gpu, frozen)
    most = max(_moments(step), key=lambda moment: moment.total)
    return replace(most, allowance=_LIBRARIES + _GAPS * most.total) if gpu else most


def _moments(step: Step) -> Iterator[Memory]:
    """The moments of which one needs most, in their order."""
    shares = step.world_size if step.sharded else 1
    of_all = FP32 * step.numbers / shares
    buckets = of_all if step.strategy == "ddp" and step.world_size > 1 else 0
    earlier = of_all if step.passes > 1 else 0  # gradients of the micro-batches before
    weights = 2 * of_all + FP32 * step.frozen_numbers / shares
    base = Memory(weights=weights, optimizer=2 * of_all, gradients=buckets + earlier, images=sizes.images(step))
    unit, cast = sizes.gathered(step), sizes.cast_weights(step)
    targets, saved = sizes.targets(step), sizes.saved_by_heads(step)
    blocks, rest = [sizes.kept_of_block(step, i) for i in range(step.depth)], sizes.final_norm(step)
    kept = sum(blocks) + rest

    asking = replace(base, copies=max(unit, sizes.target_gathered(step)))
    yield replace(asking, activations=sizes.teacher(step))
    yield replace(asking, activations=sizes.teacher_tokens(step), heads=sizes.making_targets(step))
    forward = targets + sizes.logits(step) + saved
    yield replace(base, copies=unit + cast, activations=kept + sizes.tokens(step), heads=forward)
    backward = replace(base, copies=unit + sizes.kept_casts(step))
    yield replace(backward, activations=kept, heads=targets + saved + sizes.loss(step))
    for i in reversed(range(step.depth)):  # block by block activations go and gradients come
        done = 1 - step.backbone * (i + 1) / step.depth / step.numbers
        yield replace(
            backward,
            gradients=buckets + max(earlier, done * of_all),
            activations=sum(blocks[: i + 1]) + sizes.backward_of_block(step, i),
        )
    yield replace(base, gradients=buckets + of_all, copies=sizes.optimizer_scratch(step) / shares)
