"""The whole run, from a configuration: images, model, loader, and Composer's Trainer around them."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from composer import Trainer
from composer.core import DataSpec, Timestamp
from composer.devices import DeviceCPU, DeviceGPU
from composer.utils import dist, reproducibility
from torch.utils.data import DataLoader

from dinocomp.build.callbacks import Callbacks, build_callbacks
from dinocomp.build.compile import compile_networks
from dinocomp.build.data import build_loader, training_images
from dinocomp.build.evaluation import build_measures, labelled_pair
from dinocomp.build.loggers import build_loggers
from dinocomp.build.model import build_model
from dinocomp.build.optim import build_optimizer, choose_kernel
from dinocomp.build.parallel import expected_warnings, parallelism, place_target, prepare_for_sharding
from dinocomp.build.report import run_facts
from dinocomp.build.start import Start, check_enough
from dinocomp.build.trainer import AsyncTrainer
from dinocomp.callbacks.evaluation import Measures
from dinocomp.checkpoints.plain import only_plain_types
from dinocomp.checkpoints.shapes import check_names, state_to_load
from dinocomp.config import Config, derive
from dinocomp.config.advice import warnings
from dinocomp.data import split_batch
from dinocomp.method import DINOv2

log = logging.getLogger(__name__)

_COMPOSER_PRECISION = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp_fp16"}


@dataclass
class Run:
    """A run that is ready to start."""

    trainer: Trainer
    model: DINOv2
    callbacks: Callbacks
    config: Config
    start: Start

    @property
    def iterations(self) -> int:
        """Of the whole run."""
        return derive.total_iterations(self.config)


def build_run(config: Config, start: Start, command: str = "") -> Run:
    """Everything, in order: images, model, loader, trainer. `command` is what the run was started with."""
    images = training_images(config)
    check_enough(config, len(images))  # of a remote it was not known, of a folder some images may be unreadable
    if start.checkpoint is None or start.changed:  # else they have been given
        for advice in warnings(config, dist.get_world_size(), len(images)):
            log.warning("%s -> %s", advice.what, advice.remedy)
    pair = labelled_pair(config)
    # The same weights on every rank; the Trainer then seeds each rank differently for what is drawn while training.
    reproducibility.seed_all(config.train.seed)
    empty = start.strategy in derive.SHARDED and dist.get_global_rank() != 0  # sharded, rank 0's weights go to all
    model = build_model(config, dist.get_world_size(), initial_weights=start.checkpoint is None, empty=empty)
    loader = build_loader(config, images, pin_memory=start.gpu)
    measures = build_measures(config, start, model, images, pair)
    return build_training(config, start, model, loader, measures, run_facts(config, start, images, pair, command))


def build_training(
    config: Config,
    start: Start,
    model: DINOv2,
    loader: DataLoader,
    measures: Measures | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Run:
    """Composer's Trainer with everything around a step.

    Without `measures` nothing is evaluated, without `facts` there is no page.
    """
    optimizer, multipliers = build_optimizer(config, model)
    callbacks = build_callbacks(config, start, model, multipliers, measures or Measures(), facts)
    device = DeviceGPU(allow_tf32=start.precision != "fp32") if start.gpu else DeviceCPU()
    prepare_for_sharding(config, start.strategy, model, device)
    compile_networks(config, model)
    place_target(start.strategy, start.precision, model, device)
    shares = start.strategy in derive.SHARDED
    with ExitStack() as around:
        load_path = around.enter_context(state_to_load(start.checkpoint, shares=shares))
        if load_path:
            check_names(load_path, model.state_dict())
        around.enter_context(only_plain_types())
        around.enter_context(expected_warnings(shares))
        trainer = (AsyncTrainer if config.performance.async_step else Trainer)(
            model=model,
            train_dataloader=DataSpec(
                loader,
                get_num_samples_in_batch=lambda batch: len(batch["index"]),
                get_num_tokens_in_batch=lambda batch: 0,
                split_batch=split_batch,
            ),
            optimizers=optimizer,
            max_duration=f"{derive.total_iterations(config)}ba",
            device=device,
            device_train_microbatch_size="auto"
            if config.train.microbatch_size == "auto"
            else derive.micro_batch(config),
            precision=_COMPOSER_PRECISION[start.precision],
            callbacks=callbacks.in_order(),
            loggers=build_loggers(config, start.output),
            progress_bar=False,
            log_to_console=False,
            load_path=load_path,
            parallelism_config=parallelism(start.strategy, start.precision),
            spin_dataloaders=False,  # the loader itself goes on where the run stands
            run_name=start.output.resolve().name,
            seed=config.train.seed,
        )
    choose_kernel(optimizer, fused=config.performance.fused_optimizer)
    callbacks.random_state.attach(trainer)
    if start.iteration and not start.checkpoint:  # weights of another run, whose iteration is kept
        images = start.iteration * derive.images_per_iteration(config, dist.get_world_size())
        loader.dataset.load_state_dict({"position": images, "iteration": start.iteration})
        trainer.state.timestamp = Timestamp(
            batch=start.iteration, batch_in_epoch=start.iteration, sample=images, sample_in_epoch=images
        )
    return Run(trainer, model, callbacks, config, start)
