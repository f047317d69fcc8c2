"""Optimizer and schedules, from a configuration."""

import torch

from dinocomp.config import Config, derive
from dinocomp.method import DINOv2
from dinocomp.optim import Multipliers, parameter_groups
from dinocomp.schedules import Schedules


def build_schedules(config: Config, world_size: int) -> Schedules:
    """Schedules in iterations from a configuration in official epochs."""
    optim, teacher, epoch = config.optim, config.teacher, config.train.OFFICIAL_EPOCH_LENGTH
    return Schedules(
        total=derive.total_iterations(config),
        lr=derive.peak_learning_rate(config, world_size),
        min_lr=optim.min_lr,
        warmup=optim.warmup_epochs * epoch,
        freeze_last_layer=optim.freeze_last_layer_epochs * epoch,
        freeze_backbone=optim.freeze_backbone_epochs * epoch,
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
        backbone_apart=config.optim.freeze_backbone_epochs > 0,
    )
    # Learning rate and weight decay are set before every step, from the schedules.
    optimizer = torch.optim.AdamW(
        [{"params": parameters} for parameters in groups.values()],
        lr=0.0,
        betas=(config.optim.adamw_beta1, config.optim.adamw_beta2),
        fused=config.performance.fused_optimizer or None,
    )
    return optimizer, list(groups)


def choose_kernel(optimizer: torch.optim.AdamW, *, fused: bool) -> None:
    """Has a loaded optimizer compute as this run wants it: a checkpoint brings the choice of the run that wrote it.

    Its steps are counted on the device where weights are updated by one kernel, else on the CPU.
    """
    for group in optimizer.param_groups:
        for name, value in optimizer.defaults.items():
            group.setdefault(name, value)  # one that the run before had not: its weights were part of another
        group["fused"] = fused or None
        for weight in group["params"]:
            if "step" in (state := optimizer.state.get(weight, {})):
                state["step"] = state["step"].to(weight.device if fused else "cpu")
