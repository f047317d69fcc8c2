"""Floating-point operations of a training step, counted operator by operator on tensors without memory."""

from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import random_batch, without_memory
from dinocomp.build.model import build_model
from dinocomp.config import Config, derive


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
    patches = derive.global_patches(config)
    masks = torch.zeros(config.train.batch_size_per_gpu, 2, patches, dtype=torch.bool)  # [B, 2, N]; nobody counts them
    # Attention as the matrix products it consists of: fused backward passes compute some of them again.
    with without_memory(), sdpa_kernel(SDPBackend.MATH):
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
        # Operators that can be seen; colours are no part of a step that is the same wherever they are made.
        performance=replace(config.performance, attention="sdpa", compile=False, device_augment=False),
        parallelism=replace(config.parallelism, activation_checkpointing="none", activation_cpu_offload=False),
    )
