"""What a run would be, in words, before any of it is done."""

from collections.abc import Mapping
from dataclasses import fields, replace

from dinocomp.config.advice import Advice, warnings
from dinocomp.config.derive import (
    architecture,
    checkpoint_interval,
    first_phase,
    global_patches,
    images_per_iteration,
    milestone_interval,
    passes,
    peak_learning_rate,
    precision,
    total_iterations,
)
from dinocomp.config.distil import FrozenTeacher
from dinocomp.config.keys import show, walk
from dinocomp.config.load import LoadedConfig, all_keys
from dinocomp.config.memory import MemoryPlan
from dinocomp.config.schema import Config


def describe(
    loaded: LoadedConfig,
    world_size: int,
    dataset_size: int | None,
    parameters: Mapping[str, int],
    *,
    full: bool = False,
    dataset_note: str = "",
    memory: MemoryPlan | None = None,
    frozen: FrozenTeacher | None = None,
) -> str:
    """Return the plan of a run as text.

    Args:
        world_size: training processes.
        dataset_size: training images; None where they have not been counted, with the reason in `dataset_note`.
        parameters: trained parameters by network ("backbone", "dino_head", "ibot_head").
        full: list every key, not only those that differ from their default.
        memory: what each GPU needs; None where that is not known.
        frozen: the frozen teacher, in distillation.
    """
    blocks = [
        ("Settings" if full else "Settings that differ from the defaults", _settings(loaded, full)),
        (
            "The run",
            _table(
                _numbers(loaded, world_size, dataset_size, parameters, dataset_note)
                + _frozen_rows(frozen)
                + _memory_rows(loaded, memory)
            ),
        ),
    ]
    if loaded.chosen:
        blocks.append(("Chosen where it says auto", _table([(c.key, show(c.value), c.reason) for c in loaded.chosen])))
    if loaded.notices:
        blocks.append(("Notices", loaded.notices))
    advice = warnings(loaded.config, world_size, dataset_size)
    if memory is not None and not memory.fits:
        advice.insert(0, _too_large(memory))
    if advice:
        blocks.append(("Warnings", [line for item in advice for line in (f"! {item.what}", f"  -> {item.remedy}")]))
    return "\n\n".join(title + "\n" + "\n".join(f"  {line}" for line in lines) for title, lines in blocks) + "\n"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _settings(loaded: LoadedConfig, full: bool) -> list[str]:
    defaults = all_keys()
    rows = [
        (spec.name, show(spec.default), loaded.origin.get(spec.name, "default"))
        for spec in walk(loaded.config)
        if full or spec.default != defaults[spec.name].default
    ]
    if loaded.recipes:
        rows.insert(0, ("recipes", show(tuple(loaded.recipes)), "applied in this order"))
    return _table(rows) if rows else ["none"]


def _numbers(
    loaded: LoadedConfig, world_size: int, dataset_size: int | None, parameters: Mapping[str, int], dataset_note: str
) -> list[tuple[str, str]]:
    config = loaded.config
    train, optim = config.train, config.optim
    iterations, images = total_iterations(config), images_per_iteration(config, world_size)
    size = architecture(config.student)
    rows = [
        ("iterations", f"{iterations:,} ({optim.epochs} official epochs of {train.OFFICIAL_EPOCH_LENGTH:,})"),
        (
            "images an iteration",
            f"{images:,} ({train.batch_size_per_gpu} on each of {world_size} process{'es' * (world_size > 1)})",
        ),
        ("images an official epoch", f"{images * train.OFFICIAL_EPOCH_LENGTH:,}"),
        ("images in the run", f"{images * iterations:,}"),
    ]
    if dataset_size is None:
        rows.append(("dataset", f"not counted{': ' + dataset_note if dataset_note else ''}"))
    else:
        share = images * train.OFFICIAL_EPOCH_LENGTH / dataset_size
        rows.append(("dataset", f"{dataset_size:,} images; an official epoch takes {_share(share)}"))
        rows.append(("passes over the dataset", f"{passes(config, world_size, dataset_size):,.1f}"))
    peak = peak_learning_rate(config, world_size)
    rule = "optim.lr as it stands" if optim.lr > 0 else f"{optim.base_lr:g} * sqrt({images} / 1024)"
    rows += [
        (
            "peak learning rate",
            f"{peak:.4g} ({rule}), after {optim.warmup_epochs * train.OFFICIAL_EPOCH_LENGTH:,} iterations",
        ),
        ("network", f"{size.depth} blocks, {size.embed_dim} wide, {size.num_heads} heads, {config.student.ffn_layer}"),
        ("crops of each image", _crops_line(loaded.config)),
        ("precision", f"{precision(config, on_gpu=True)} on a GPU" + _cpu_precision(loaded)),
    ]
    rows += [(f"parameters, {name}", f"{count:,}") for name, count in parameters.items()]
    if parameters:
        rows.append(("parameters, together", f"{sum(parameters.values()):,} trained; the teacher holds as many"))
    period = config.evaluation.eval_period_iterations
    rows += [
        ("checkpoints", _checkpoints_line(config, sum(parameters.values()))),
        ("k-NN evaluation", f"every {period:,} iterations" if period else "never"),
        ("output", train.output_dir),
    ]
    return rows


def _checkpoints_line(config: Config, parameters: int) -> str:
    kept, milestone = config.checkpoint.max_to_keep, milestone_interval(config)
    line = f"every {checkpoint_interval(config):,} iterations"
    if parameters:  # weights of student and teacher, and AdamW's two averages, in fp32; the teacher once more
        line += f", {5 * 4 * parameters / 1e9:.3g} GB each"
    line += f"; the newest {kept} are kept" if kept else "; all are kept"
    if kept and milestone:
        line += f", and for ever those of every {milestone:,} iterations"
    return line + (f"; copied to {config.checkpoint.remote}" if config.checkpoint.remote else "")


def _frozen_rows(frozen: FrozenTeacher | None) -> list[tuple[str, str]]:
    if frozen is None:
        return []
    size, numbers = frozen.architecture, frozen.parameters
    heads = ", ".join(f"{name} of {number:,} prototypes" for name, number in frozen.prototypes.items())
    return [
        ("distilled from", str(frozen.path)),
        (
            "frozen teacher",
            f"{size['depth']} blocks, {size['embed_dim']} wide, {size['num_heads']} heads, {size['ffn_layer']}; "
            + heads,
        ),
        ("parameters, frozen teacher", f"{sum(numbers.values()):,}, neither trained nor saved"),
    ]


def _memory_rows(loaded: LoadedConfig, plan: MemoryPlan | None) -> list[tuple[str, str]]:
    if plan is None or loaded.config.train.device == "cpu":
        return []
    parts = {field.name: getattr(plan.memory, field.name) / 1e9 for field in fields(plan.memory)}
    named = ", ".join(f"{name} {size:.1f}" for name, size in parts.items() if size >= 0.05)
    line = f"about {plan.memory.total / 1e9:.1f} GB with {plan.strategy}: {named}"
    if plan.limit is not None:
        line += f"; a GPU of {plan.limit / 1e9:g} GB is {'enough' if plan.fits else 'too small'}"
    if loaded.config.train.microbatch_size == "auto":
        line += "; all images at a time, fewer where they do not fit (train.microbatch_size=auto)"
    return [("memory on each GPU", line)]


def _too_large(plan: MemoryPlan) -> Advice:
    return Advice(
        f"a step needs about {plan.memory.total / 1e9:.1f} GB of each GPU, which has {plan.limit / 1e9:g} GB",
        plan.remedy or "use more GPUs with parallelism.strategy=fsdp2, smaller crops, or a smaller student.arch",
    )


def _crops_line(config: Config) -> str:
    crops = config.crops
    local = f", {crops.local_crops_number} local of {crops.local_crops_size} px" if crops.local_crops_number else ""
    line = f"2 global of {crops.global_crops_size} px ({global_patches(config)} patches each){local}"
    phase = first_phase(config)
    if phase is None:
        return line
    iterations, smaller = phase
    at_first = _crops_line(replace(smaller, curriculum=replace(smaller.curriculum, fraction=0.0)))
    return f"{at_first} in the first {iterations:,} iterations, then {line}"


def _cpu_precision(loaded: LoadedConfig) -> str:
    fp16 = loaded.config.performance.precision == "fp16"
    return "; a CPU cannot train in fp16" if fp16 else f", {precision(loaded.config, on_gpu=False)} on a CPU"


def _share(share: float) -> str:
    """0.25 -> "25 % of them", 52.1 -> "each 52.1 times"."""
    return f"{100 * share:.3g} % of them" if share <= 1 else f"each {share:.1f} times"
