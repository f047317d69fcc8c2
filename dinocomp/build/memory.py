"""What a run needs of a GPU's memory, and what to type where a GPU has less."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from dinocomp.build.data import mask_settings
from dinocomp.build.model import count_parameters
from dinocomp.config import Config, derive
from dinocomp.config.distil import frozen_teacher
from dinocomp.config.memory import Memory, MemoryPlan, estimate
from dinocomp.data import max_masked_patches

_USUAL_GPU = 80e9  # bytes, where it is not said what a GPU has


def plan_memory(config: Config, world_size: int, limit: float | None = None) -> MemoryPlan:
    """Estimates what each GPU needs.

    Args:
        world_size: training processes, one for each GPU.
        limit: bytes of a GPU; None where it is not known.
    """
    parameters, frozen = count_parameters(config), frozen_teacher(config)
    whole = derive.whole_bytes(parameters, sum(frozen.parameters.values()) if frozen else 0)

    @cache  # seconds for small parts of a large batch
    def asked(size: int) -> int:
        if config.ibot.all_patches and config.ibot.loss_weight:
            return 2 * size * derive.global_patches(config)
        images = derive.images_per_iteration(config, world_size)
        return max_masked_patches(mask_settings(config), images, images // size)

    def needed(config: Config) -> tuple[Memory, str]:
        strategy = derive.strategy(config, world_size, int(limit or _USUAL_GPU), whole)
        rows, compute = asked(derive.micro_batch(config)), derive.precision(config, on_gpu=True)
        memory = estimate(
            config, parameters, rows, world_size=world_size, strategy=strategy, compute=compute, frozen=frozen
        )
        return memory, strategy

    memory, strategy = needed(config)
    if limit is None or memory.total <= limit:
        return MemoryPlan(memory, strategy, limit)
    for words, changed in _ways_out(config, strategy):
        less, _ = needed(changed)
        if less.total <= limit:
            return MemoryPlan(memory, strategy, limit, f"type {words} (about {less.total / 1e9:.1f} GB)")
    return MemoryPlan(memory, strategy, limit)


def _ways_out(config: Config, strategy: str) -> Iterator[tuple[str, Config]]:
    """(words to type, what they make of the configuration), the ones that cost least time first."""
    batch, now = config.train.batch_size_per_gpu, derive.micro_batch(config)
    smaller = [size for size in range(now - 1, 0, -1) if batch % size == 0]
    recipes = {"none": "", "selective": "recipes=[activation_checkpointing]", "full": "recipes=[low_memory]"}
    mode = config.parallelism.activation_checkpointing
    lighter = list(recipes)[list(recipes).index(mode) :]
    shardings = [None] if strategy in ("single", *derive.SHARDED) else [None, "fsdp2"]
    for sharding in shardings:
        for size in [now, *smaller]:
            for other in lighter:
                words = [] if other == mode else [recipes[other]]
                parallel = replace(config.parallelism, activation_checkpointing=other)
                if size != config.train.microbatch_size and (size != now or config.train.microbatch_size):
                    words.append(f"train.microbatch_size={size}")
                if sharding:
                    words.append(f"parallelism.strategy={sharding}")
                    parallel = replace(parallel, strategy=sharding)
                train = replace(config.train, microbatch_size=size)
                if words:
                    yield " ".join(words), replace(config, parallelism=parallel, train=train)
