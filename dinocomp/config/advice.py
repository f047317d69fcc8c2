"""Settings that run but are known to work badly, each with what to do instead."""

from collections.abc import Iterator
from dataclasses import dataclass

from dinocomp.config.auto import momentum_for, prototypes_for
from dinocomp.config.derive import (
    checkpoint_interval,
    head_sizes,
    images_per_iteration,
    micro_batch,
    passes,
    peak_learning_rate,
    precision,
    total_iterations,
)
from dinocomp.config.schema import Config

_FEW_IMAGES = 100_000  # below which a run that begins as the reference's is warned
# Images an iteration below which runs are warned. With Sinkhorn-Knopp small networks learnt from 32 as from 64, in as
# many passes over the images (docs/small-data.md); fewer have not been tried.
_FEW_IN_A_BATCH = {"centering": 64, "sinkhorn_knopp": 32}
_SMALL_DATA = 200_000  # images up to which the recipe small_data is meant
_SECTIONS = {"dino_head": "dino", "ibot_head": "ibot"}
# From where on a short run feels them: blocks that contribute from the first step, positions beside patches.
_FELT_LAYERSCALE, _FELT_POSITIONS = 0.1, 0.1
_DROWNING_POSITIONS = 10.0  # beside which patches are not felt
_MANY_PASSES = 1000  # over the images, above which more are likely wasted


@dataclass(frozen=True)
class Advice:
    """What is likely to go wrong, and what to type or do about it."""

    what: str
    remedy: str


def warnings(config: Config, world_size: int, dataset_size: int | None) -> list[Advice]:
    """Everything worth a warning before training.

    Args:
        world_size: training processes.
        dataset_size: training images; None where they have not been counted.
    """
    found = [*_batch(config, world_size), *_losses(config), *_distillation(config), *_schedules(config, world_size)]
    if dataset_size is not None:
        found += _dataset(config, world_size, dataset_size)
    return found


def when_features_do_not_improve(config: Config, dataset_size: int | None = None, world_size: int = 1) -> str:
    """What to change, and is not set already, where the teacher's k-NN accuracy falls or stays low. One line.

    Args:
        dataset_size: training images; None where that is not known.
        world_size: training processes.
    """
    student, koleo, words = config.student, config.dino.koleo_loss_weight, []
    small, centred = (dataset_size or 0) <= _SMALL_DATA, config.train.centering == "centering"
    from_weights = bool(config.MODEL.WEIGHTS or student.pretrained_weights)  # how a network starts is settled
    begins_as_the_recipe = small and not (from_weights or centred or _starts_as_the_reference(config))
    koleo_works = _koleo_images(config, world_size) > 1 and precision(config, on_gpu=True) != "fp16"
    if from_weights:
        words += ["recipes=[sinkhorn]"] if centred else []
    elif begins_as_the_recipe:
        words += ["student.linear_init=lecun_normal"] if student.linear_init != "lecun_normal" else []
        words += ["student.pos_embed_std=2"] if student.pos_embed_std > _DROWNING_POSITIONS else []
    elif small:
        words.append("recipes=[small_data]")
    if koleo == 0 and koleo_works:
        words.append("dino.koleo_loss_weight=0.1")
    if 2 * (passes(config, world_size, dataset_size) if dataset_size else 0) <= _MANY_PASSES:
        words.append(f"optim.epochs={2 * config.optim.epochs} (twice as long, where it still rises)")
    if koleo and koleo_works and begins_as_the_recipe:  # which weight is the better one depends on the images
        words.append(f"dino.koleo_loss_weight={0.1 if koleo > 0.1 else 0.3}")
    rate = "optim.lr" if config.optim.lr > 0 else "optim.base_lr"
    if half := (config.optim.lr or config.optim.base_lr) / 2:
        words.append(f"{rate}={half:.3g} (half of it)")
    return f"try in a new train.output_dir, one after the other: {', '.join(words)}"


def _koleo_images(config: Config, world_size: int) -> int:
    """Among how many images KoLeo looks for the nearest one."""
    return config.train.batch_size_per_gpu * (world_size if config.dino.koleo_distributed else 1)


def _batch(config: Config, world_size: int) -> Iterator[Advice]:
    images, few = images_per_iteration(config, world_size), _FEW_IN_A_BATCH[config.train.centering]
    if images < few:
        yield Advice(
            f"{images} images an iteration: targets are estimated from too few images, and the loss often stays flat",
            f"raise train.batch_size_per_gpu or the number of GPUs to {few} images or more; "
            "otherwise watch the k-NN accuracy and lower optim.base_lr",
        )
    if config.performance.device_augment and config.train.device == "cpu":
        yield Advice(
            "performance.device_augment changes colours on the cores that train, more slowly than data workers do",
            "type performance.device_augment=false on a CPU",
        )
    if _koleo_images(config, world_size) == 1 and config.dino.koleo_loss_weight > 0:
        yield Advice(
            "one image on each process: KoLeo has no second image to keep it away from",
            "type train.batch_size_per_gpu=2 or more, or recipes=[no_koleo]",
        )
    rate, crops = config.student.drop_path_rate, 2 * micro_batch(config)
    kept = max(int(crops * (1 - rate)), 1) / crops
    if rate and abs(kept - (1 - rate)) > 0.1:
        yield Advice(
            f"drop path of {rate:g} is {1 - kept:.2g} of {crops} global crops, which is all that is computed at a time",
            "raise train.microbatch_size (or train.batch_size_per_gpu), or lower student.drop_path_rate",
        )
    all_patches = config.ibot.all_patches
    if config.ibot.loss_weight > 0 and not all_patches and int(2 * images * config.ibot.mask_sample_probability) < 1:
        yield Advice(
            f"ibot.mask_sample_probability={config.ibot.mask_sample_probability:g} of {2 * images} global crops "
            "is none: no patch is ever masked",
            f"raise it to at least {1 / (2 * images):.2g}, or switch the loss off with ibot.loss_weight=0",
        )


def _losses(config: Config) -> Iterator[Advice]:
    if precision(config, on_gpu=True) == "fp16" and config.dino.koleo_loss_weight > 0:
        yield Advice(
            "fp16 with KoLeo: two almost equal features give gradients that fp16 cannot hold, and the step is skipped",
            "type recipes=[bf16], or recipes=[fp16,no_koleo] on a GPU without bf16",
        )
    if config.dino.loss_weight == 0:
        yield Advice(
            "dino.loss_weight=0: iBOT or KoLeo alone is known to be unstable",
            "keep dino.loss_weight=1, unless this is the experiment",
        )
    hottest = max(config.teacher.teacher_temp, config.teacher.warmup_teacher_temp)
    if hottest >= config.dino.student_temp:
        yield Advice(
            f"teacher temperature {hottest:g} is not below the student's {config.dino.student_temp:g}: "
            "targets say no more than predictions, and features collapse",
            "type teacher.teacher_temp=0.07 teacher.warmup_teacher_temp=0.04 dino.student_temp=0.1",
        )
    if config.MODEL.WEIGHTS and config.student.pretrained_weights:
        yield Advice(
            "MODEL.WEIGHTS and student.pretrained_weights are both given: a checkpoint holds the backbone too",
            "keep one of them",
        )


def _distillation(config: Config) -> Iterator[Advice]:
    """Differences from the paper's way: no masks, no drop path, iBOT on all patches (section 5)."""
    ibot = config.ibot
    if not config.teacher.distil_from:
        if ibot.loss_weight and ibot.all_patches:
            yield Advice(
                "ibot.all_patches=true without teacher.distil_from: patches that are not masked are predicted from "
                "themselves",
                "name the larger teacher as teacher.distil_from=PATH, or type ibot.all_patches=false "
                "ibot.mask_sample_probability=0.5",
            )
        return
    unlike = {
        f"student.drop_path_rate={config.student.drop_path_rate:g}": config.student.drop_path_rate > 0,
        f"ibot.mask_sample_probability={ibot.mask_sample_probability:g}": ibot.loss_weight
        and ibot.mask_sample_probability > 0,
        "ibot.all_patches=false": ibot.loss_weight and not ibot.all_patches,
    }
    if found := [words for words, differs in unlike.items() if differs]:
        yield Advice(
            f"a frozen teacher with {', '.join(found)}: DINOv2's students were distilled without masks and drop path",
            "type recipes=[distil]",
        )


def _schedules(config: Config, world_size: int) -> Iterator[Advice]:
    epochs, iterations = config.optim.epochs, total_iterations(config)
    if config.optim.warmup_epochs == epochs:
        yield Advice(
            f"optim.warmup_epochs={epochs} is the whole run: the learning rate only rises",
            f"type optim.warmup_epochs={epochs // 10}",
        )
    if config.optim.freeze_last_layer_epochs == epochs:
        yield Advice(
            f"optim.freeze_last_layer_epochs={epochs} is the whole run: the heads' last layer never learns",
            "type optim.freeze_last_layer_epochs=0, or raise optim.epochs",
        )
    if config.teacher.warmup_teacher_temp_epochs > epochs and (
        config.teacher.warmup_teacher_temp != config.teacher.teacher_temp
    ):
        yield Advice(
            f"the teacher temperature warms up over {config.teacher.warmup_teacher_temp_epochs} official epochs, "
            f"the run has {epochs}: {config.teacher.teacher_temp:g} is never reached",
            f"type teacher.warmup_teacher_temp_epochs={epochs * 3 // 10}",
        )
    from_weights = config.MODEL.WEIGHTS or config.student.pretrained_weights
    frozen = config.optim.freeze_backbone_epochs
    if frozen and not from_weights:
        yield Advice(
            f"optim.freeze_backbone_epochs={frozen}: the backbone stays at its random start that long",
            "give student.pretrained_weights=PATH, or type optim.freeze_backbone_epochs=0",
        )
    elif frozen >= epochs:
        yield Advice(
            f"optim.freeze_backbone_epochs={frozen} of {epochs} official epochs: the backbone never learns",
            "type optim.freeze_backbone_epochs=1, or raise optim.epochs; unless heads alone are wanted, to distil from "
            "(docs/distillation.md)",
        )
    momentum = config.teacher.momentum_teacher
    lower = momentum_for(iterations)
    if momentum < 1 and 1 / (1 - momentum) > iterations / 4 and not from_weights:
        yield Advice(
            f"teacher.momentum_teacher={momentum:g} averages over {1 / (1 - momentum):,.0f} iterations of a run of "
            f"{iterations:,}: the teacher stays near its random start",
            "train longer" + (f", or type teacher.momentum_teacher={lower:g}" if lower < momentum else ""),
        )
    if momentum == 1:
        yield Advice(
            "teacher.momentum_teacher=1: the teacher never leaves its random start",
            "type teacher.momentum_teacher=0.992",
        )
    if momentum > config.teacher.final_momentum_teacher:
        yield Advice(
            f"the teacher's momentum falls from {momentum:g} to {config.teacher.final_momentum_teacher:g}: "
            "it follows the student ever more closely",
            "type teacher.final_momentum_teacher=1.0",
        )
    peak = peak_learning_rate(config, world_size)
    if config.optim.min_lr > peak:
        yield Advice(
            f"optim.min_lr={config.optim.min_lr:g} lies above the peak learning rate {peak:.3g}",
            f"type optim.min_lr={peak / 1000:.1g}",
        )
    if checkpoint_interval(config) > iterations:
        yield Advice(
            f"the first checkpoint would come after {checkpoint_interval(config):,} iterations, "
            f"the run has {iterations:,}: a run that is killed starts over",
            "type checkpoint.save_frequency=1",
        )


def _dataset(config: Config, world_size: int, dataset_size: int) -> Iterator[Advice]:
    images = images_per_iteration(config, world_size)
    heads, fitting = head_sizes(config), prototypes_for(dataset_size)
    if dataset_size < images:
        yield Advice(
            f"{dataset_size:,} images are fewer than one iteration takes ({images:,}): "
            "a batch holds an image several times",
            f"type train.batch_size_per_gpu={max(dataset_size // (2 * world_size), 1)} or less",
        )
    from_weights = config.MODEL.WEIGHTS or config.student.pretrained_weights
    if dataset_size < _FEW_IMAGES and not from_weights and _starts_as_the_reference(config):
        yield Advice(
            f"{dataset_size:,} images are few: the reference's recipe is for a million and more, and on few its "
            "features often end up worse than raw pixels",
            "add recipes=[small_data], see docs/small-data.md, and trust the k-NN accuracy on held-out images, not the "
            "loss",
        )
    for name, head in heads.items():
        if head.prototypes > max(dataset_size, fitting):
            yield Advice(
                f"{head.prototypes:,} prototypes in {name} are more than the {dataset_size:,} images",
                f"type {_SECTIONS[name]}.head_n_prototypes={fitting}",
            )
    count = passes(config, world_size, dataset_size)
    if count > _MANY_PASSES:
        fewer = max(config.optim.epochs * 300 // int(count), 1)
        yield Advice(
            f"{count:,.0f} passes over the data: most of that time is likely wasted",
            f"type optim.epochs={fewer} (with shorter warm-ups), or find more images",
        )
    if count < 1:
        yield Advice(
            f"the run sees only {count:.0%} of the images",
            f"type optim.epochs={-(-config.optim.epochs // max(count, 1e-9)):.0f} or more to see all of them once",
        )


def _starts_as_the_reference(config: Config) -> bool:
    """Whether the network begins all but blind to where a patch is, or with blocks that are next to nothing."""
    student = config.student
    return student.pos_embed_std < _FELT_POSITIONS or 0 < (student.layerscale or 0) < _FELT_LAYERSCALE
