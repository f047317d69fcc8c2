"""The whole run, from a configuration: images, model, loader, and Composer's Trainer around them."""

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from composer import Trainer
from composer.core import DataSpec, Timestamp
from composer.devices import DeviceCPU, DeviceGPU
from composer.loggers import LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger
from composer.utils import dist, reproducibility
from torch.utils.data import DataLoader

from dinocomp.build.data import build_loader, opening, training_images
from dinocomp.build.model import backbone_arguments, build_model
from dinocomp.build.optim import build_optimizer, build_schedules
from dinocomp.build.start import Start, check_enough
from dinocomp.callbacks import (
    ApplySchedules,
    BadImages,
    Checkpoints,
    ClipGradients,
    FirstBatchPicture,
    Metrics,
    OnlineEvaluation,
    RestoreRandomState,
    SkipBadSteps,
    StopOnSignal,
    UpdateTeacher,
)
from dinocomp.callbacks.evaluation import LabelledPair
from dinocomp.checkpoints.folder import STATE, expired
from dinocomp.checkpoints.plain import only_plain_types
from dinocomp.checkpoints.uploads import Uploads
from dinocomp.config import Config, derive, to_yaml
from dinocomp.config.advice import warnings
from dinocomp.data import evaluation_pair
from dinocomp.errors import ConfigError
from dinocomp.interop import save_teacher
from dinocomp.method import DINOv2
from dinocomp.output import RUN_FILES

log = logging.getLogger(__name__)

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_COMPOSER_PRECISION = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp_fp16"}


@dataclass
class Run:
    """A run that is ready to start.

    `evaluation.pair` is None where nothing is labelled, `uploads` where checkpoints are not copied, or on other ranks.
    """

    trainer: Trainer
    model: DINOv2
    clip: ClipGradients
    evaluation: OnlineEvaluation
    checkpoints: Checkpoints
    uploads: Uploads | None
    stop: StopOnSignal
    iterations: int
    images_per_iteration: int
    remote_wait: float
    start: Start


def build_run(config: Config, start: Start) -> Run:
    """Everything, in order: images, model, loader, trainer."""
    images = training_images(config)
    check_enough(config, len(images))  # of a remote it was not known, of a folder some images may be unreadable
    for advice in warnings(config, dist.get_world_size(), len(images)):
        log.warning("%s -> %s", advice.what, advice.remedy)
    pair = evaluation_pair(
        config.train.dataset_path,
        config.evaluation.train_dataset_path,
        config.evaluation.val_dataset_path,
        **opening(config),
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
    global_batch = derive.images_per_iteration(config, dist.get_world_size())

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
    stop = StopOnSignal()
    bad_images = BadImages(config.data.max_bad_images)
    clip = ClipGradients(model, config.optim.clip_grad)
    bad_steps = SkipBadSteps(model, clip, config.optim.max_bad_steps)
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
        skip_bad=config.data.on_bad_image == "skip",
        export_teacher=export_teacher,
        stop=stop,
    )
    retention = partial(expired, max_to_keep=config.checkpoint.max_to_keep, milestone=derive.milestone_interval(config))
    uploads = None
    if start.remote:
        uploads = Uploads(start.remote, expired=retention, run_files=[output / name for name in RUN_FILES])
    checkpoints = Checkpoints(
        output / "checkpoints",
        interval=derive.checkpoint_interval(config),
        total=iterations,
        expired=retention,
        export_teacher=export_teacher,
        latest_teacher=output / "teacher.safetensors",
        stop=stop,
        copies=uploads,
        on_failure=config.checkpoint.on_save_failure,
    )
    callbacks = [  # within an event they run in this order
        random_state,
        ApplySchedules(model, schedules, multipliers),
        FirstBatchPicture(output / "pictures" / "first_batch.png"),
        bad_images,
        clip,
        bad_steps,
        UpdateTeacher(model, bad_steps),
        stop,
        Metrics(
            model,
            clip,
            schedules,
            bad_steps,
            bad_images,
            prototypes=derive.prototypes(config),
            folder=output,
            period=config.loggers.period_iterations,
            total=iterations,
        ),
        evaluation,
        checkpoints,
    ]
    with only_plain_types():
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
            callbacks=callbacks,
            loggers=build_loggers(config, output),
            progress_bar=False,
            log_to_console=False,
            load_path=str(start.checkpoint / STATE) if start.checkpoint else None,
            spin_dataloaders=False,  # the loader itself goes on where the run stands
            run_name=output.resolve().name,
            seed=config.train.seed,
        )
    random_state.attach(trainer)
    if start.iteration and not start.checkpoint:
        images = start.iteration * global_batch
        loader.dataset.load_state_dict({"position": images, "iteration": start.iteration})
        trainer.state.timestamp = Timestamp(
            batch=start.iteration, batch_in_epoch=start.iteration, sample=images, sample_in_epoch=images
        )
    return Run(
        trainer,
        model,
        clip,
        evaluation,
        checkpoints,
        uploads,
        stop,
        iterations=iterations,
        images_per_iteration=global_batch,
        remote_wait=config.checkpoint.remote_wait_seconds,
        start=start,
    )


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
