"""Settings that cannot work together, each with what to change. What merely works badly is in advice.py."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dinocomp.config.derive import architecture, cache_limit, first_phase, global_patches, total_iterations
from dinocomp.config.schema import Config
from dinocomp.errors import ConfigError

_CROP_SIZE = r"crops\.((global|local)_crops_size)"
_ADDRESS = r"\w[\w+.-]*://."


@dataclass(frozen=True)
class Problem:
    """An impossible combination: the keys it is made of, and what to do about it."""

    keys: tuple[str, ...]
    message: str


def problems(config: Config) -> list[Problem]:
    """Every impossible combination in a configuration whose single values are all in range."""
    checks = (
        *(_network, _losses, _masks, _lengths, _crops, _curriculum),
        *(_device, _compiled, _micro_batches, _places, _checkpoints),
    )
    return [problem for check in checks for problem in check(config)]


def _network(config: Config) -> Iterator[Problem]:
    try:
        size = architecture(config.student)
    except ConfigError as error:
        yield Problem(("student.arch",), str(error))
    else:
        if size.embed_dim % size.num_heads:
            yield Problem(
                ("student.arch", "student.embed_dim", "student.num_heads"),
                f"the width {size.embed_dim} does not divide into {size.num_heads} attention heads; "
                f"change student.num_heads or student.embed_dim (64 a head is usual)",
            )
        elif config.performance.attention in ("xformers", "varlen") and (head := size.embed_dim // size.num_heads) % 8:
            yield Problem(
                ("performance.attention", "student.embed_dim", "student.num_heads"),
                f"{config.performance.attention} needs heads whose width is a multiple of 8, not {head}; "
                "type performance.attention=sdpa",
            )
    patch = config.student.patch_size
    sides = {"crops.global_crops_size": config.crops.global_crops_size}
    if config.crops.local_crops_number > 0:
        sides["crops.local_crops_size"] = config.crops.local_crops_size
    for name, side in sides.items():
        if side % patch:
            below, above = side // patch * patch, (side // patch + 1) * patch
            fits = " or ".join(f"{name}={value}" for value in (below, above) if value)
            yield Problem((name, "student.patch_size"), f"patches of {patch} px do not tile {side} px; type {fits}")


def _losses(config: Config) -> Iterator[Problem]:
    weights = ("dino.loss_weight", "ibot.loss_weight", "dino.koleo_loss_weight")
    if config.dino.loss_weight == config.ibot.loss_weight == config.dino.koleo_loss_weight == 0:
        yield Problem(weights, "nothing is left to train on; give at least one of them a weight above 0")
    elif config.optim.freeze_backbone_epochs and not (config.dino.loss_weight or config.ibot.loss_weight):
        yield Problem(
            ("optim.freeze_backbone_epochs", "dino.loss_weight", "ibot.loss_weight"),
            "KoLeo alone trains no head, and a frozen backbone leaves it nothing; type optim.freeze_backbone_epochs=0",
        )


def _masks(config: Config) -> Iterator[Problem]:
    if config.ibot.loss_weight == 0:
        return
    least, largest = config.ibot.mask_ratio_min_max
    if least > largest:
        yield Problem(
            ("ibot.mask_ratio_min_max",), f"the least comes first; type ibot.mask_ratio_min_max=[{largest:g},{least:g}]"
        )
    if config.ibot.mask_sample_probability == 0:
        if config.ibot.all_patches:
            return
        yield Problem(
            ("ibot.mask_sample_probability", "ibot.loss_weight"),
            "no crop would ever be masked; raise the probability, or switch the loss off with ibot.loss_weight=0 "
            "(without masks it is for distillation, with ibot.all_patches=true)",
        )
    patches = global_patches(config)
    if int(patches * largest) < 1:
        yield Problem(
            ("ibot.mask_ratio_min_max", "crops.global_crops_size", "student.patch_size"),
            f"of {patches} patches none is ever masked; raise the largest ratio to {1 / max(patches, 1):.2g} or more",
        )


def _lengths(config: Config) -> Iterator[Problem]:
    epochs = config.optim.epochs
    if config.optim.warmup_epochs > epochs:
        yield Problem(
            ("optim.warmup_epochs", "optim.epochs"),
            f"the warm-up is longer than the run; type optim.warmup_epochs={epochs // 10}, or raise optim.epochs",
        )
    if config.optim.freeze_last_layer_epochs > epochs:
        yield Problem(
            ("optim.freeze_last_layer_epochs", "optim.epochs"),
            "the last layer is frozen beyond the end; lower optim.freeze_last_layer_epochs or raise optim.epochs",
        )


def _crops(config: Config) -> Iterator[Problem]:
    crops = config.crops
    pairs = {
        "global_crops_scale": crops.global_crops_scale,
        "local_crops_scale": crops.local_crops_scale,
        "aspect_ratio": crops.aspect_ratio,
        "blur_sigma": crops.blur_sigma,
    }
    for name, (least, largest) in pairs.items():
        if least > largest:
            yield Problem((f"crops.{name}",), f"the least comes first; type crops.{name}=[{largest:g},{least:g}]")
    if crops.blur_kernel_size % 2 == 0:
        yield Problem(
            ("crops.blur_kernel_size",),
            f"the kernel needs a middle; type crops.blur_kernel_size={crops.blur_kernel_size + 1}",
        )
    if not config.evaluation.knn_k:
        yield Problem(("evaluation.knn_k",), "name at least one number of neighbours; type evaluation.knn_k=[20]")


def _curriculum(config: Config) -> Iterator[Problem]:
    """What would be wrong with a run of the smaller crops alone, and crops that are not smaller."""
    phase = first_phase(config)
    if phase is None:
        sizes = ("global_crops_size", "local_crops_size")
        for name in (name for name in sizes if getattr(config.curriculum, name)):
            yield Problem(
                (f"curriculum.{name}", "curriculum.fraction"),
                "nothing is shown at that size; type curriculum.fraction=0.75 as well",
            )
        return
    if phase[0] == total_iterations(config):
        yield Problem(("curriculum.fraction",), "whole crops would never be shown; type curriculum.fraction=0.75")
    blurred = {"global_crops_size": max(config.crops.blur_probability[:2]) > 0}
    if config.crops.local_crops_number:
        blurred["local_crops_size"] = config.crops.blur_probability[2] > 0
    for name, blur in blurred.items():
        smaller, size = getattr(phase[1].crops, name), getattr(config.crops, name)
        if smaller > size:
            yield Problem(
                (f"curriculum.{name}", f"crops.{name}"),
                f"crops would shrink from {smaller} to {size} px; type curriculum.{name}={size} or less",
            )
        least = -(-(config.crops.blur_kernel_size // 2 + 1) // config.student.patch_size) * config.student.patch_size
        if blur and smaller <= config.crops.blur_kernel_size // 2:
            yield Problem(
                (f"curriculum.{name}", "crops.blur_kernel_size"),
                f"{smaller} px are too few for the blur's kernel; type curriculum.{name}={least} or more, or a smaller "
                "crops.blur_kernel_size",
            )
    for check in (_network, _masks):
        for problem in check(phase[1]):
            if any(key in ("crops.global_crops_size", "crops.local_crops_size") for key in problem.keys):
                keys = tuple(re.sub(_CROP_SIZE, r"curriculum.\1", key) for key in problem.keys)
                yield Problem(keys, re.sub(_CROP_SIZE, r"curriculum.\1", problem.message))


def _device(config: Config) -> Iterator[Problem]:
    if config.train.device == "cpu" and config.performance.precision == "fp16":
        yield Problem(
            ("performance.precision", "train.device"), "a CPU cannot train in fp16; type performance.precision=fp32"
        )
    if config.train.device == "cpu" and config.performance.attention in ("xformers", "varlen"):
        yield Problem(
            ("performance.attention", "train.device"),
            f"{config.performance.attention} needs a GPU; type performance.attention=sdpa",
        )
    if config.performance.precision == "fp32" and config.performance.attention == "varlen":
        yield Problem(
            ("performance.attention", "performance.precision"),
            "varlen computes in half precision; type performance.attention=sdpa, or performance.precision=bf16",
        )


def _compiled(config: Config) -> Iterator[Problem]:
    performance, parallelism = config.performance, config.parallelism
    if performance.cuda_graphs and not performance.compile:
        yield Problem(
            ("performance.cuda_graphs", "performance.compile"),
            "graphs are made of what is compiled; type performance.compile=true",
        )
    if performance.compile and performance.attention == "xformers":
        yield Problem(
            ("performance.compile", "performance.attention"),
            "xformers' attention cannot be compiled; type performance.attention=auto",
        )
    if performance.compile and parallelism.activation_cpu_offload:
        yield Problem(
            ("performance.compile", "parallelism.activation_cpu_offload"),
            "what is compiled keeps its activations on the GPU; type performance.compile=false, or "
            "parallelism.activation_checkpointing=full instead of the offload",
        )
    for switch in ("compile", "async_step"):
        if getattr(performance, switch) and config.train.microbatch_size == "auto":
            why = {"compile": "compiles anew for each size", "async_step": "waits for the GPU again and again"}[switch]
            yield Problem(
                (f"performance.{switch}", "train.microbatch_size"),
                f"the search {why}; let a short run without performance.{switch} find what fits, and type that number",
            )
    if performance.cuda_graphs and config.train.microbatch_size not in (0, config.train.batch_size_per_gpu):
        yield Problem(
            ("performance.cuda_graphs", "train.microbatch_size"),
            "graphs give their results in memory that the next micro-batch overwrites; type "
            "performance.cuda_graphs=false, or train.microbatch_size=0",
        )
    if performance.cuda_graphs and config.train.device == "cpu":
        yield Problem(("performance.cuda_graphs", "train.device"), "a CPU has none; type performance.cuda_graphs=false")


def _micro_batches(config: Config) -> Iterator[Problem]:
    size, batch = config.train.microbatch_size, config.train.batch_size_per_gpu
    if isinstance(size, int) and size and (size > batch or batch % size):
        fitting = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= size)
        yield Problem(
            ("train.microbatch_size", "train.batch_size_per_gpu"),
            f"{batch} images are no whole number of micro-batches of {size}; type train.microbatch_size={fitting}",
        )
    if size == "auto" and config.train.device == "cpu":
        yield Problem(
            ("train.microbatch_size", "train.device"),
            "what fits is found out on GPUs only; type a number of images, such as train.microbatch_size=8",
        )
    if size == "auto" and config.parallelism.strategy == "fsdp2":
        yield Problem(
            ("train.microbatch_size", "parallelism.strategy"),
            "Composer finds out what fits with ddp and fsdp only; type parallelism.strategy=fsdp, or a number",
        )


def _places(config: Config) -> Iterator[Problem]:
    """What the text of an address or a size shows; whether anything is there is looked at later."""
    output, remote = config.train.output_dir, config.checkpoint.remote
    if not output.strip():
        yield Problem(("train.output_dir",), "a run needs a folder to write to; type train.output_dir=output/NAME")
    elif re.match(_ADDRESS, output):
        yield Problem(
            ("train.output_dir",),
            f"a run writes to a local folder; type train.output_dir=output/NAME checkpoint.remote={output} "
            "to have its checkpoints copied there",
        )
    if remote and not re.match(_ADDRESS, remote):
        guess = re.sub(r"^(\w+):/?", r"\1://", remote) if re.match(r"^\w+:", remote) else "s3://bucket/run"
        yield Problem(
            ("checkpoint.remote",),
            f"not an address in an object store; type checkpoint.remote={guess}, or '' for none "
            "(local checkpoints are in train.output_dir)",
        )
    try:
        cache_limit(config)
    except ConfigError as error:
        yield Problem(("data.cache_limit",), str(error))


def _checkpoints(config: Config) -> Iterator[Problem]:
    every, frequency = config.checkpoint.keep_every, config.checkpoint.save_frequency
    if every % frequency:
        yield Problem(
            ("checkpoint.keep_every", "checkpoint.save_frequency"),
            f"only some of them are ever saved; type checkpoint.keep_every={-(-every // frequency) * frequency}",
        )
    if config.MODEL.KEEP_ITERATION and not config.MODEL.WEIGHTS:
        yield Problem(
            ("MODEL.KEEP_ITERATION", "MODEL.WEIGHTS"),
            "there are no weights whose iteration could be kept; name them as MODEL.WEIGHTS=PATH",
        )
