"""From a configuration to objects: the only file that knows all the others. Read it from `build_run` upwards."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import DataSpec
from composer.devices import DeviceCPU, DeviceGPU
from composer.loggers import LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger
from composer.utils import dist, reproducibility
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
from dinocomp.callbacks.evaluation import LabelledPair
from dinocomp.config import Config, derive, load_config, to_yaml
from dinocomp.data import (
    CropSettings,
    Images,
    MaskSettings,
    evaluation_pair,
    max_masked_patches,
    open_images,
    training_loader,
)
from dinocomp.errors import ConfigError
from dinocomp.interop import check_file, load_backbone, load_run, save_teacher
from dinocomp.method import DINOv2, LossWeights, Networks
from dinocomp.method.losses import Centering, SinkhornKnopp, build_targets
from dinocomp.models import DINOHead, VisionTransformer
from dinocomp.optim import Multipliers, parameter_groups
from dinocomp.resume import find_checkpoint
from dinocomp.schedules import Schedules

log = logging.getLogger(__name__)

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_COMPOSER_PRECISION = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp_fp16"}


@dataclass(frozen=True)
class Start:
    """What is known before anything is built or written.

    Attributes:
        gpu: whether to train on GPUs.
        precision: `fp32`, `bf16` or `fp16`.
        checkpoint: the checkpoint to go on from, None for a fresh start.
    """

    gpu: bool
    precision: str
    output: Path
    checkpoint: Path | None


@dataclass
class Run:
    """A run that is ready to start. `evaluation.pair` is None where nothing is labelled."""

    trainer: Trainer
    model: DINOv2
    clip: ClipGradients
    evaluation: OnlineEvaluation
    iterations: int
    start: Start


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


def build_model(config: Config, world_size: int = 1, *, initial_weights: bool = True) -> DINOv2:
    """Student, teacher (its copy, or as `MODEL.WEIGHTS` has it) and loss, on the CPU.

    Args:
        initial_weights: whether to read the files of weights that the configuration names. A run that goes on from a
            checkpoint does not need them.
    """
    student = build_networks(config, drop_path_rate=config.student.drop_path_rate)
    teacher = build_networks(config)
    if initial_weights and config.student.pretrained_weights:
        load_backbone(student.backbone, config.student.pretrained_weights)
    for name, net in vars(teacher).items():
        if net is not None:
            net.load_state_dict(getattr(student, name).state_dict())

    heads = derive.head_sizes(config)

    def targets(head: str) -> Centering | SinkhornKnopp:
        size = heads.get(head, heads.get("dino_head"))  # patches go through the DINO head where they have none
        return build_targets(
            config.train.centering,
            size.prototypes if size else 1,
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
    if initial_weights and config.MODEL.WEIGHTS:
        load_run(
            model.networks("student"),
            model.networks("teacher"),
            {"dino_targets": model.dino_targets, "ibot_targets": model.ibot_targets},
            config.MODEL.WEIGHTS,
        )
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


def build_loader(config: Config, images: Images, *, pin_memory: bool) -> DataLoader:
    """This rank's batches of the whole run."""
    return training_loader(
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
        pin_memory=pin_memory,
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
    wanted, name = config.loggers, output.resolve().name
    # MLflow's own variable wins; else it would write into the working directory.
    tracking = None if "MLFLOW_TRACKING_URI" in os.environ else (output.resolve() / "mlruns").as_uri()
    makers = {
        "tensorboard": lambda: TensorboardLogger(log_dir=str(output / "tensorboard")),
        "wandb": lambda: WandBLogger(project=wanted.wandb, name=name, init_kwargs={"dir": str(output)}),
        "mlflow": lambda: MLFlowLogger(experiment_name=wanted.mlflow, run_name=name, tracking_uri=tracking),
    }
    loggers = []
    for key, make in makers.items():
        if getattr(wanted, key):
            try:
                loggers.append(make())
            except ImportError as error:
                raise ConfigError(
                    f"loggers.{key} is on, but its package cannot be imported ({error}). "
                    f"Type pip install 'dinocomp[{key}]' (in a checkout: pip install -e '.[{key}]')."
                ) from error
    return loggers


def check_start(config: Config) -> Start:
    """Everything that can be refused before images are read or files written. The process group must be up.

    Raises:
        DinocompError: the machine, the output folder or a file of weights does not go with the configuration.
    """
    gpu, output = on_gpu(config), Path(config.train.output_dir).expanduser()
    start = Start(
        gpu=gpu,
        precision=derive.precision(config, gpu),
        output=output,
        checkpoint=find_checkpoint(output / "checkpoints", config.checkpoint.resume),
    )
    if start.checkpoint is None:
        for path in filter(None, (config.MODEL.WEIGHTS, config.student.pretrained_weights)):
            check_file(path)
    elif (output / "config.yaml").is_file():
        earlier = load_config(str(output / "config.yaml")).config
        for what, describe in (("backbone", backbone_arguments), ("heads", derive.head_sizes)):
            if describe(earlier) != describe(config):
                raise ConfigError(
                    f"{start.checkpoint} cannot go on: its {what} were {describe(earlier)}, "
                    f"the configuration asks for {describe(config)}. Give another train.output_dir, "
                    f"or the settings of {output / 'config.yaml'}."
                )
    return start


def build_run(config: Config, start: Start) -> Run:
    """Everything, in order: images, model, loader, trainer."""
    cache = config.data.cache_dir
    images = open_images(config.train.dataset_path, split="train", cache_dir=cache)
    log.info("training images: %s (%d)", images.path, len(images))
    pair = evaluation_pair(
        config.train.dataset_path,
        config.evaluation.train_dataset_path,
        config.evaluation.val_dataset_path,
        cache_dir=cache,
    )
    # The same weights on every rank; the Trainer then seeds each rank differently for what is drawn while training.
    reproducibility.seed_all(config.train.seed)
    model = build_model(config, dist.get_world_size(), initial_weights=start.checkpoint is None)
    loader = build_loader(config, images, pin_memory=start.gpu)
    return build_training(config, start, model, loader, LabelledPair(*pair) if pair else None)


def build_training(
    config: Config, start: Start, model: DINOv2, loader: DataLoader, pair: LabelledPair | None = None
) -> Run:
    """Composer's Trainer with everything around a step."""
    iterations, output = derive.total_iterations(config), start.output
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
            view=(resize, crop),
            iteration=iteration,
            config=to_yaml(config),
        )

    random_state = RestoreRandomState()
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
        timeout_seconds=config.data.timeout_seconds,
        autocast=_AUTOCAST[start.precision],
        export_teacher=export_teacher,
    )
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(
            loader,
            get_num_samples_in_batch=lambda batch: len(batch["index"]),
            get_num_tokens_in_batch=lambda batch: 0,
        ),
        optimizers=optimizer,
        max_duration=f"{iterations}ba",
        device=DeviceGPU(allow_tf32=start.precision != "fp32") if start.gpu else DeviceCPU(),
        device_train_microbatch_size=config.train.batch_size_per_gpu,
        precision=_COMPOSER_PRECISION[start.precision],
        callbacks=[  # within an event they run in this order
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
        ],
        loggers=build_loggers(config, output),
        progress_bar=False,
        log_to_console=False,
        load_path=str(start.checkpoint) if start.checkpoint else None,
        run_name=output.resolve().name,
        seed=config.train.seed,
    )
    random_state.attach(trainer)
    return Run(trainer, model, clip, evaluation, iterations, start)
