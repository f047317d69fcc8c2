"""What follows from a configuration: iterations, learning rate, sizes, precision. Pure functions, told once."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dinocomp.config.schema import Config, Student
from dinocomp.errors import ConfigError
from dinocomp.hints import did_you_mean

# arch -> (token width, blocks, attention heads); Vision Transformer sizes S, B, L and DINOv2's giant2.
ARCHITECTURES: dict[str, tuple[int, int, int]] = {
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant2": (1536, 40, 24),
}


_UNITS = {"b": 0, "kb": 1, "mb": 2, "gb": 3, "tb": 4, "pb": 5}  # powers of 1024, as Streaming reads them


@dataclass(frozen=True)
class Architecture:
    """Size of a vision transformer. Unpacks as (embed_dim, depth, num_heads, mlp_ratio)."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float

    def __iter__(self) -> Iterator[Any]:
        return iter((self.embed_dim, self.depth, self.num_heads, self.mlp_ratio))


@dataclass(frozen=True)
class HeadSize:
    """Arguments of one projection head, besides the token width."""

    prototypes: int
    bottleneck: int
    layers: int
    hidden: int


def total_iterations(config: Config) -> int:
    """Optimizer steps of the whole run: official epochs times their length."""
    return config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH


def first_phase(config: Config) -> tuple[int, Config] | None:
    """How many iterations, from the first on, see smaller crops, and the configuration that holds in them; or None."""
    iterations, curriculum = round(config.curriculum.fraction * total_iterations(config)), config.curriculum
    if not iterations:
        return None
    patch = config.student.patch_size
    sizes = {
        name: getattr(curriculum, name) or math.ceil(getattr(config.crops, name) / 2 / patch) * patch
        for name in ("global_crops_size", "local_crops_size")
    }
    return iterations, replace(config, crops=replace(config.crops, **sizes))


def images_per_iteration(config: Config, world_size: int) -> int:
    """The global batch: images of one optimizer step over all processes."""
    return config.train.batch_size_per_gpu * world_size


def micro_batch(config: Config) -> int:
    """Images of a process that are in memory at a time; where they are found out while training, where that begins."""
    size = config.train.microbatch_size
    return size if isinstance(size, int) and size else config.train.batch_size_per_gpu


def passes(config: Config, world_size: int, dataset_size: int) -> float:
    """How many times the run sees each of `dataset_size` images."""
    return total_iterations(config) * images_per_iteration(config, world_size) / dataset_size


ANCHOR = 1024
"""Images an iteration at which the peak learning rate is `optim.base_lr` itself."""


def peak_learning_rate(config: Config, world_size: int) -> float:
    """`optim.lr` where it is given, else base_lr * sqrt(global batch / 1024) (the reference's `sqrt_wrt_1024`)."""
    if config.optim.lr > 0:
        return config.optim.lr
    return config.optim.base_lr * math.sqrt(images_per_iteration(config, world_size) / ANCHOR)


def checkpoint_interval(config: Config) -> int:
    """Iterations between checkpoints."""
    return config.checkpoint.save_frequency * config.train.OFFICIAL_EPOCH_LENGTH


def milestone_interval(config: Config) -> int:
    """Iterations between checkpoints that are kept for ever; 0 for none."""
    return config.checkpoint.keep_every * config.train.OFFICIAL_EPOCH_LENGTH


def evaluation_crop(config: Config) -> tuple[int, int]:
    """Pixels (shorter side after resizing, centre crop) for evaluation: 256 and 224 at the default crop size."""
    size = config.crops.global_crops_size
    return round(size * 256 / 224), size


def global_patches(config: Config) -> int:
    """Patches of a global crop."""
    return (config.crops.global_crops_size // config.student.patch_size) ** 2


def architecture(student: Student) -> Architecture:
    """Size of the network: that of the named arch, each number replaced where the configuration gives its own.

    Raises:
        ConfigError: an unknown arch, or `custom` without all three of its sizes.
    """
    name = student.arch.removesuffix("_memeff")
    given = (student.embed_dim, student.depth, student.num_heads)
    if name == "custom":
        names = ("embed_dim", "depth", "num_heads")
        missing = [f"student.{key}" for key, value in zip(names, given, strict=True) if value is None]
        if missing:
            raise ConfigError(f"student.arch=custom needs {', '.join(missing)}; give whole numbers")
        sizes = given
    elif name in ARCHITECTURES:
        sizes = tuple(a if b is None else b for a, b in zip(ARCHITECTURES[name], given, strict=True))
    else:
        known = [*ARCHITECTURES, "custom"]
        raise ConfigError(f"no arch {student.arch!r}; expected one of {', '.join(known)}.{did_you_mean(name, known)}")
    return Architecture(*sizes, student.mlp_ratio)


def head_sizes(config: Config) -> dict[str, HeadSize]:
    """The heads of a run: `dino_head` for DINO and for iBOT that shares it, `ibot_head` for iBOT that does not."""
    dino, ibot = config.dino, config.ibot
    ibot_on = ibot.loss_weight > 0
    heads = {}
    if dino.loss_weight > 0 or (ibot_on and not ibot.separate_head):
        heads["dino_head"] = HeadSize(
            dino.head_n_prototypes, dino.head_bottleneck_dim, dino.head_nlayers, dino.head_hidden_dim
        )
    if ibot_on and ibot.separate_head:
        heads["ibot_head"] = HeadSize(
            ibot.head_n_prototypes, ibot.head_bottleneck_dim, ibot.head_nlayers, ibot.head_hidden_dim
        )
    return heads


def prototypes(config: Config) -> dict[str, int]:
    """Prototypes of each loss that compares distributions and is on: "dino", "ibot"."""
    heads = head_sizes(config)
    found = {}
    if config.dino.loss_weight > 0:
        found["dino"] = heads["dino_head"].prototypes
    if config.ibot.loss_weight > 0:
        found["ibot"] = heads.get("ibot_head", heads.get("dino_head")).prototypes
    return found


def precision(config: Config, on_gpu: bool) -> str:
    """The compute type of the whole model: `fp32`, `bf16` or `fp16`.

    `auto` is fp32 on a CPU. On a GPU it is bf16, or fp32 where the student backbone's `param_dtype` says so: fp16 there
    is the reference's default, not a wish.

    Raises:
        ConfigError: bf16 or fp16 on a CPU, on which Composer trains in fp32 only.
    """
    wanted = config.performance.precision
    if wanted in ("bf16", "fp16") and not on_gpu:
        raise ConfigError(
            f"performance.precision={wanted} needs a GPU. Type performance.precision=fp32 to train on this CPU."
        )
    if wanted != "auto":
        return wanted
    asked = config.compute_precision.student.backbone.mixed_precision.param_dtype
    return "fp32" if asked == "fp32" or not on_gpu else "bf16"


SHARDED = ("fsdp", "fsdp2")


def whole_bytes(parameters: Mapping[str, int], frozen: int = 0) -> int:
    """Weights, gradients and AdamW's two averages of the student, the teacher, and a frozen one, in fp32.

    Args:
        parameters: of the student by network.
        frozen: parameters of the frozen teacher, in distillation.
    """
    return 4 * (1 + 1 + 2 + 1) * sum(parameters.values()) + 4 * frozen


def strategy(config: Config, world_size: int, gpu_bytes: int | None, whole: int) -> str:
    """How networks lie on processes: `single`, `ddp`, `fsdp` or `fsdp2`.

    Args:
        gpu_bytes: memory of a GPU; None on CPUs.
        whole: bytes of whole networks, with gradients and optimizer; see `whole_bytes`.
    """
    wanted = config.parallelism.strategy
    if world_size == 1:
        return "single"
    if wanted != "auto":
        return wanted
    asked = config.compute_precision.student.backbone.sharding_strategy
    if gpu_bytes is None or asked == "NO_SHARD":
        return "ddp"
    if asked != "FULL_SHARD" and whole < gpu_bytes / 3:
        return "ddp"
    # Composer finds a fitting micro-batch with FSDP1 alone.
    return "fsdp" if config.train.microbatch_size == "auto" else "fsdp2"


def cache_limit(config: Config) -> int | None:
    """`data.cache_limit` in bytes; None for no limit.

    Raises:
        ConfigError: it is not a size.
    """
    text = config.data.cache_limit.strip().lower()
    if not text:
        return None
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmgtp]?b)?", text)
    if size is None:
        raise ConfigError("not a size; type data.cache_limit=500gb (b, kb, mb, gb, tb or pb), or ''")
    return int(float(size[1]) * 1024 ** _UNITS[size[2] or "b"])
