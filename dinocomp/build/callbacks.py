"""What happens around a step, from a configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from composer import Callback
from composer.utils import dist

from dinocomp.build.model import backbone_arguments, build_colours
from dinocomp.build.optim import build_schedules
from dinocomp.build.start import Start
from dinocomp.callbacks import (
    ApplySchedules,
    BadImages,
    Checkpoints,
    ClipGradients,
    CollectGarbage,
    FirstBatchPicture,
    FreezeBackbone,
    Metrics,
    MicroBatches,
    OnlineEvaluation,
    Report,
    RestoreRandomState,
    SkipBadSteps,
    StopOnSignal,
    UpdateTeacher,
)
from dinocomp.callbacks.evaluation import Measures
from dinocomp.checkpoints.folder import TEACHER, expired
from dinocomp.checkpoints.uploads import Uploads
from dinocomp.config import Config, derive, to_yaml
from dinocomp.config.advice import when_features_do_not_improve
from dinocomp.interop import save_teacher
from dinocomp.method import DINOv2
from dinocomp.optim import Multipliers
from dinocomp.output import RUN_FILES


@dataclass
class Callbacks:
    """Everything around a step, in the order in which it runs within an event."""

    random_state: RestoreRandomState
    schedules: ApplySchedules
    freeze: FreezeBackbone
    picture: FirstBatchPicture
    bad_images: BadImages
    micro_batches: MicroBatches
    clip: ClipGradients
    bad_steps: SkipBadSteps
    teacher: UpdateTeacher
    stop: StopOnSignal
    metrics: Metrics
    evaluation: OnlineEvaluation
    checkpoints: Checkpoints
    garbage: CollectGarbage
    report: Report

    def in_order(self) -> list[Callback]:
        return list(vars(self).values())


def build_callbacks(
    config: Config,
    start: Start,
    model: DINOv2,
    multipliers: list[Multipliers],
    measures: Measures,
    facts: Mapping[str, Any] | None = None,
) -> Callbacks:
    """All callbacks of a run.

    Args:
        multipliers: of the optimizer's groups.
        measures: what an evaluation consists of.
        facts: for the run's page, which it has only with them.
    """
    output, total = start.output, derive.total_iterations(config)
    schedules = build_schedules(config, dist.get_world_size())
    resize, crop = derive.evaluation_crop(config)

    def export_teacher() -> Callable[[Path, int], None]:
        weights = model.weights_of("teacher")
        return lambda path, iteration: save_teacher(
            path,
            weights,
            architecture=backbone_arguments(config),
            mean=config.crops.mean,
            std=config.crops.std,
            view=(resize, crop),
            iteration=iteration,
            config=to_yaml(config),
            distilled_from=start.distilled_from,
        )

    stop = StopOnSignal()
    bad_images = BadImages(config.data.max_bad_images)
    clip = ClipGradients(model, config.optim.clip_grad)
    lr = "optim.lr" if config.optim.lr > 0 else "optim.base_lr"
    performance = config.performance
    deferred = performance.async_step and performance.fused_optimizer
    # fp16's scaler tells the optimizer something of its own; and of sharded weights it has not been tried.
    deferred = deferred and start.precision != "fp16" and start.strategy not in derive.SHARDED
    bad_steps = SkipBadSteps(model, clip, config.optim.max_bad_steps, lr, deferred=deferred)
    retention = partial(expired, max_to_keep=config.checkpoint.max_to_keep, milestone=derive.milestone_interval(config))
    uploads = None
    if start.remote:
        uploads = Uploads(start.remote, expired=retention, run_files=[output / name for name in RUN_FILES])
    return Callbacks(
        random_state=RestoreRandomState(),
        schedules=ApplySchedules(model, schedules, multipliers),
        freeze=FreezeBackbone(model, schedules.freeze_backbone),
        picture=FirstBatchPicture(output / "pictures" / "first_batch.png", build_colours(config)),
        bad_images=bad_images,
        micro_batches=MicroBatches(model, graphs=config.performance.cuda_graphs),
        clip=clip,
        bad_steps=bad_steps,
        teacher=UpdateTeacher(model, bad_steps),
        stop=stop,
        metrics=Metrics(
            model,
            clip,
            schedules,
            bad_steps,
            bad_images,
            prototypes=derive.prototypes(config),
            folder=output,
            period=config.loggers.period_iterations,
            total=total,
        ),
        evaluation=OnlineEvaluation(
            model,
            measures,
            folder=output,
            period=config.evaluation.eval_period_iterations,
            iterations=total,
            at_start=config.evaluation.at_start,
            budget=config.evaluation.budget,
            export_teacher=export_teacher,
            stop=stop,
            remedy=when_features_do_not_improve(
                config, (facts or {}).get("data", {}).get("images"), dist.get_world_size()
            ),
        ),
        checkpoints=Checkpoints(
            output / "checkpoints",
            interval=derive.checkpoint_interval(config),
            total=total,
            expired=retention,
            export_teacher=export_teacher,
            latest_teacher=output / TEACHER,
            damaged=start.damaged,
            bad_steps=bad_steps,
            stop=stop,
            copies=uploads,
            on_failure=config.checkpoint.on_save_failure,
        ),
        garbage=CollectGarbage(config.performance.collect_garbage_every),
        report=Report(output, facts or {}, stop, page=config.loggers.report and facts is not None),
    )
