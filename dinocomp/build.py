"""From a configuration to objects: the only file that knows all the others. Read it from `build_run` upwards."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import DataSpec
from composer.loggers import LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger
from composer.utils import dist, reproducibility
from torch import nn
from torch.utils.data import DataLoader

from dinocomp.callbacks import (
    ApplySchedules,
    Checkpoints,
    ClipGradients,
    FirstBatchPicture,
    Metrics,
    OnlineEvaluation,
    RestoreRandomState,
    UpdateTeacher,
)
from dinocomp.callbacks.checkpoints import list_checkpoints
from dinocomp.callbacks.evaluation import LabelledPair
from dinocomp.config import Config, derive, to_yaml
from dinocomp.data import CropSettings, Images, MaskSettings, evaluation_pair, max_masked_patches, open_images
from dinocomp.data import training_loader as data_loader
from dinocomp.errors import ConfigError
from dinocomp.interop import load_backbone, load_run, save_teacher
from dinocomp.method import DINOv2, LossWeights, Networks
from dinocomp.method.losses import build_targets
from dinocomp.models import DINOHead, VisionTransformer
from dinocomp.optim import Multipliers, parameter_groups
from dinocomp.schedules import Schedules

log = logging.getLogger(__name__)

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_COMPOSER_PRECISION = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp_fp16"}


@dataclass
class Run:
    """A run that is ready to start.

    Attributes:
        resumed_from: the checkpoint that `trainer` has loaded, None for a fresh start.
        pair: what the teacher is evaluated on, None where nothing is labelled.
    """

    trainer: Trainer
    model: DINOv2
    evaluation: OnlineEvaluation
    output: Path
    iterations: int
    resumed_from: Path | None
    pair: LabelledPair | None


# ---- networks --------------------------------------------------------------------------------------------------------


def backbone_arguments(config: Config) -> dict[str, Any]:
    """What `VisionTransformer` needs to be rebuilt for use; drop path and kernel are matters of training."""
    student, size = config.student, derive.architecture(config.student)
    return {
        "img_size": config.crops.global_crops_size,
        "patch_size": student.patch_size,
        "embed_dim": size.embed_dim,
        "depth": size.depth,
        "num_heads": size.num_heads,
        "mlp_ratio": size.mlp_ratio,
        "qkv_bias": student.qkv_bias,
        "proj_bias": student.proj_bias,
        "ffn_bias": student.ffn_bias,
        "ffn_layer": student.ffn_layer,
        "init_values": student.layerscale,
        "num_register_tokens": student.num_register_tokens,
        "interpolate_offset": student.interpolate_offset,
        "interpolate_antialias": student.interpolate_antialias,
    }


def build_networks(config: Config, *, drop_path_rate: float = 0.0) -> Networks:
    """Freshly initialised backbone and heads. A head that no loss uses is None."""
    backbone = VisionTransformer(
        **backbone_arguments(config),
        drop_path_rate=drop_path_rate,
        drop_path_uniform=config.student.drop_path_uniform,
        kernel=config.performance.attention,
    )
    heads = {
        name: DINOHead(
            backbone.embed_dim,
            size.prototypes,
            hidden_dim=size.hidden,
            bottleneck_dim=size.bottleneck,
            nlayers=size.layers,
        )
        for name, size in derive.head_sizes(config).items()
    }
    return Networks(backbone, heads.get("dino_head"), heads.get("ibot_head"))


def count_parameters(config: Config) -> dict[str, int]:
    """Parameters of the student by network, without building them in memory."""
    with torch.device("meta"):
        networks = build_networks(config)
    return {name: sum(p.numel() for p in net.parameters()) for name, net in vars(networks).items() if net is not None}


def build_model(config: Config, world_size: int = 1) -> DINOv2:
    """Student, teacher (its copy, or as `MODEL.WEIGHTS` has it) and loss, on the CPU."""
    student = build_networks(config, drop_path_rate=config.student.drop_path_rate)
    teacher = build_networks(config)
    if config.student.pretrained_weights:
        load_backbone(student.backbone, config.student.pretrained_weights)
    for name, net in vars(teacher).items():
        if net is not None:
            net.load_state_dict(getattr(student, name).state_dict())

    def targets(head: str) -> nn.Module:
        sizes = derive.head_sizes(config)
        prototypes = sizes.get(head, sizes.get("dino_head"))
        return build_targets(
            config.train.centering,
            prototypes.prototypes if prototypes else 1,
            momentum=config.dino.center_momentum,
            iterations=config.dino.sinkhorn_iterations,
        )

    model = DINOv2(
        student,
        teacher,
        dino_targets=targets("dino_head"),
        ibot_targets=targets("ibot_head"),
        weights=LossWeights(config.dino.loss_weight, config.ibot.loss_weight, config.dino.koleo_loss_weight),
        student_temp=config.dino.student_temp,
        mean=config.crops.mean,
        std=config.crops.std,
        max_masked=max_masked_patches(
            mask_settings(config), derive.images_per_iteration(config, world_size), world_size
        ),
    )
    if config.MODEL.WEIGHTS:
        load_run(model.networks("student"), model.networks("teacher"), config.MODEL.WEIGHTS)
    return model


# ---- data ------------------------------------------------------------------------------------------------------------


def crop_settings(config: Config) -> CropSettings:
    """The crops' section, less the normalisation, which happens on the device."""
    return CropSettings(**{name: value for name, value in vars(config.crops).items() if name not in ("mean", "std")})


def mask_settings(config: Config) -> MaskSettings:
    """How global crops are masked; not at all where iBOT is off."""
    ibot, side = config.ibot, config.crops.global_crops_size // config.student.patch_size
    ratio_min, ratio_max = ibot.mask_ratio_min_max
    return MaskSettings(
        grid=(side, side),
        sample_probability=ibot.mask_sample_probability if ibot.loss_weight else 0.0,
        ratio_min=ratio_min,
        ratio_max=ratio_max,
        block_min_patches=ibot.mask_block_min_patches,
        block_max_fraction=ibot.mask_block_max_fraction,
        block_min_aspect=ibot.mask_block_min_aspect,
    )


def build_loader(config: Config, images: Images, on_gpu: bool) -> DataLoader:
    """This rank's batches of the whole run."""
    return data_loader(
        images,
        crops=crop_settings(config),
        masks=mask_settings(config),
        batch_size=config.train.batch_size_per_gpu,
        world_size=dist.get_world_size(),
        rank=dist.get_global_rank(),
        iterations=derive.total_iterations(config),
        seed=config.train.seed,
        num_workers=config.train.num_workers,
        prefetch_factor=config.data.prefetch_factor,
        timeout_seconds=config.data.timeout_seconds,
        pin_memory=on_gpu,
    )


# ---- optimisation ----------------------------------------------------------------------------------------------------


def build_schedules(config: Config, world_size: int) -> Schedules:
    """Schedules in iterations from a configuration in official epochs."""
    optim, teacher, epoch = config.optim, config.teacher, config.train.OFFICIAL_EPOCH_LENGTH
    return Schedules(
        total=derive.total_iterations(config),
        lr=derive.peak_learning_rate(config, world_size),
        min_lr=optim.min_lr,
        warmup=optim.warmup_epochs * epoch,
        freeze_last_layer=optim.freeze_last_layer_epochs * epoch,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
        momentum=teacher.momentum_teacher,
        momentum_end=teacher.final_momentum_teacher,
        teacher_temp=teacher.teacher_temp,
        warmup_teacher_temp=teacher.warmup_teacher_temp,
        teacher_temp_warmup=teacher.warmup_teacher_temp_epochs * epoch,
    )


def build_optimizer(config: Config, model: DINOv2) -> tuple[torch.optim.AdamW, list[Multipliers]]:
    """AdamW over the student, and the multipliers of each of its groups."""
    groups = parameter_groups(
        model.networks("student").values(),
        layerwise_decay=config.optim.layerwise_decay,
        patch_embed_lr_mult=config.optim.patch_embed_lr_mult,
    )
    # Learning rate and weight decay are set before every step, from the schedules.
    optimizer = torch.optim.AdamW(
        [{"params": parameters} for parameters in groups.values()],
        lr=0.0,
        betas=(config.optim.adamw_beta1, config.optim.adamw_beta2),
    )
    return optimizer, list(groups)


# ---- run -------------------------------------------------------------------------------------------------------------


def on_gpu(config: Config) -> bool:
    """Whether the run trains on GPUs.

    Raises:
        ConfigError: GPUs are asked for and there are none.
    """
    available = torch.cuda.is_available()
    if config.train.device == "gpu" and not available:
        raise ConfigError(
            "train.device=gpu, but torch sees no CUDA device on this machine. Type train.device=cpu to train on the "
            "CPU, or mend the driver (see `nvidia-smi`) or install a CUDA build of torch (see torch.version.cuda)."
        )
    return available and config.train.device != "cpu"


def build_loggers(config: Config, output: Path) -> list[LoggerDestination]:
    """The loggers beside metrics.jsonl; each is on by one key.

    Raises:
        ConfigError: a logger's package is not installed.
    """
    wanted = config.loggers
    makers = {
        "tensorboard": lambda: TensorboardLogger(log_dir=str(output / "tensorboard")),
        "wandb": lambda: WandBLogger(project=wanted.wandb, name=output.name, init_kwargs={"dir": str(output)}),
        "mlflow": lambda: MLFlowLogger(experiment_name=wanted.mlflow, run_name=output.name),
    }
    loggers = []
    for name, make in makers.items():
        if getattr(wanted, name):
            try:
                loggers.append(make())
            except ImportError as error:
                raise ConfigError(
                    f"loggers.{name} is on, but its package cannot be imported ({error}). "
                    f"Type pip install 'dinocomp[{name}]' (in a checkout: pip install -e '.[{name}]')."
                ) from error
    return loggers


def find_checkpoint(config: Config, folder: Path) -> Path | None:
    """The checkpoint to go on from, by `checkpoint.resume`.

    Raises:
        ConfigError: one is needed and there is none, or a fresh start is asked for where there are some.
    """
    found = list_checkpoints(folder)
    if config.checkpoint.resume == "must" and not found:
        raise ConfigError(
            f"checkpoint.resume=must, but there is no checkpoint in {folder}. Check train.output_dir, "
            "or type checkpoint.resume=auto to start from scratch where there is none."
        )
    if config.checkpoint.resume == "never" and found:
        raise ConfigError(
            f"checkpoint.resume=never, but {folder} holds {len(found)} checkpoints (the newest: {found[-1].name}). "
            "Give another train.output_dir, or move that folder away."
        )
    return found[-1] if found else None


def build_trainer(
    config: Config, model: DINOv2, loader: DataLoader, *, pair: LabelledPair | None, output: Path
) -> tuple[Trainer, OnlineEvaluation, Path | None]:
    """Composer's Trainer with everything around a step, the run's evaluation, and the checkpoint it goes on from."""
    iterations, gpu = derive.total_iterations(config), on_gpu(config)
    precision = derive.precision(config, gpu)
    optimizer, multipliers = build_optimizer(config, model)
    schedules = build_schedules(config, dist.get_world_size())
    resize, crop = derive.evaluation_crop(config)

    def export_teacher(path: Path, iteration: int) -> None:
        save_teacher(
            path,
            model.networks("teacher"),
            architecture=backbone_arguments(config),
            mean=config.crops.mean,
            std=config.crops.std,
            iteration=iteration,
            config=to_yaml(config),
        )

    clip = ClipGradients(model, config.optim.clip_grad)
    evaluation = OnlineEvaluation(
        model,
        pair,
        folder=output,
        period=config.evaluation.eval_period_iterations,
        at_start=config.evaluation.at_start,
        resize=resize,
        crop=crop,
        ks=config.evaluation.knn_k,
        temperature=config.evaluation.knn_temperature,
        batch_size=config.evaluation.batch_size,
        num_workers=config.train.num_workers,
        autocast=_AUTOCAST[precision],
        export_teacher=export_teacher,
    )
    random_state = RestoreRandomState()
    callbacks: Sequence = [  # within an event they run in this order
        random_state,
        ApplySchedules(model, schedules, multipliers),
        FirstBatchPicture(output / "pictures" / "first_batch.png"),
        clip,
        UpdateTeacher(model),
        Metrics(model, clip, schedules, folder=output, period=config.loggers.period_iterations, total=iterations),
        evaluation,
        Checkpoints(
            output / "checkpoints",
            interval=derive.checkpoint_interval(config),
            max_to_keep=config.checkpoint.max_to_keep,
            total=iterations,
            export_teacher=lambda iteration: export_teacher(output / "teacher.safetensors", iteration),
        ),
    ]
    resume_from = find_checkpoint(config, output / "checkpoints")
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(
            loader,
            get_num_samples_in_batch=lambda batch: len(batch["index"]),
            get_num_tokens_in_batch=lambda batch: 0,
        ),
        optimizers=optimizer,
        max_duration=f"{iterations}ba",
        device="gpu" if gpu else "cpu",
        device_train_microbatch_size=config.train.batch_size_per_gpu,
        precision=_COMPOSER_PRECISION[precision],
        callbacks=list(callbacks),
        loggers=build_loggers(config, output),
        progress_bar=False,
        log_to_console=False,
        load_path=str(resume_from) if resume_from else None,
        run_name=output.name or "run",
        seed=config.train.seed,
    )
    random_state.attach(trainer)
    return trainer, evaluation, resume_from


def build_run(config: Config) -> Run:
    """Everything, in order: data, model, trainer. The process group must be up."""
    output = Path(config.train.output_dir)
    cache = config.data.cache_dir
    images = open_images(config.train.dataset_path, split="train", cache_dir=cache)
    log.info("training images: %s (%d)", images.path, len(images))
    found = evaluation_pair(
        config.train.dataset_path,
        config.evaluation.train_dataset_path,
        config.evaluation.val_dataset_path,
        cache_dir=cache,
    )
    pair = LabelledPair(*found) if found else None

    # The same weights on every rank; the Trainer then seeds each rank differently for what is drawn while training.
    reproducibility.seed_all(config.train.seed)
    model = build_model(config, dist.get_world_size())
    loader = build_loader(config, images, on_gpu(config))
    trainer, evaluation, resumed_from = build_trainer(config, model, loader, pair=pair, output=output)
    return Run(
        trainer=trainer,
        model=model,
        evaluation=evaluation,
        output=output,
        iterations=derive.total_iterations(config),
        resumed_from=resumed_from,
        pair=pair,
    )
