"""Floating-point operations of a training step, counted operator by operator on tensors without memory."""

from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import random_batch, without_memory
from dinocomp.build.data import mask_settings
from dinocomp.build.model import build_model
from dinocomp.config import Config


@dataclass(frozen=True)
class StepFlops:
    """Operations of one process's step; a multiplication and an addition are two."""

    forward: int  # student, teacher and losses
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def count_flops(config: Config) -> StepFlops:
    """Of matrix products, convolutions and attention in the step of `train.batch_size_per_gpu` images.

    What the method needs and no more: the batch in one pass and nothing computed twice, whatever
    `train.microbatch_size` and activation checkpointing say, so that rates of utilisation (MFU) compare. Drop path
    computes what it computes while training; masked patches are as many as there can be. Takes no memory to speak of.
    """
    config = _plain(config)
    images = config.train.batch_size_per_gpu
    patches = mask_settings(config).grid[0] * mask_settings(config).grid[1]
    masks = torch.zeros(images, 2, patches, dtype=torch.bool)  # [B, 2, N]; how many rows that gives, see below
    # A compiled function runs as it was written, operator by operator; attention as the matrix products it consists of.
    with torch.compiler.set_stance("force_eager"), without_memory(), sdpa_kernel(SDPBackend.MATH):
        model = build_model(config, initial_weights=False).train()
        model.teacher_temp = config.teacher.teacher_temp
        batch = random_batch(config, masks, "cpu")
        with FlopCounterMode(display=False) as counter:
            loss = model.loss(model(batch), batch)["total"]
            forward = counter.get_total_flops()
            loss.backward()
    return StepFlops(forward, counter.get_total_flops() - forward)


def _plain(config: Config) -> Config:
    return replace(
        config,
        train=replace(config.train, microbatch_size=0),
        performance=replace(config.performance, attention="sdpa"),
        parallelism=replace(config.parallelism, activation_checkpointing="none", activation_cpu_offload=False),
    )
