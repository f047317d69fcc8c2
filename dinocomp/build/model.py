"""Networks and the ComposerModel, from a configuration."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dinocomp.build.data import mask_settings
from dinocomp.config import Config, derive
from dinocomp.config.distil import frozen_teacher
from dinocomp.data import max_masked_patches
from dinocomp.interop import load_backbone, load_run
from dinocomp.interop.head import load_target
from dinocomp.method import DINOv2, LossWeights, Networks
from dinocomp.method.losses import Centering, SinkhornKnopp, build_targets
from dinocomp.method.pixels import Colours
from dinocomp.models import DINOHead, VisionTransformer


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
    """Freshly initialised backbone and heads. A head that no loss uses is None.

    Activation checkpointing is a matter of the student alone: a block heeds it only where gradients are taken.
    """
    backbone = VisionTransformer(
        **backbone_arguments(config),
        pos_embed_std=config.student.pos_embed_std,
        pos_embed_blur=config.student.pos_embed_blur,
        linear_init=config.student.linear_init,
        drop_path_rate=drop_path_rate,
        drop_path_uniform=config.student.drop_path_uniform,
        kernel=config.performance.attention,
        recompute=config.parallelism.activation_checkpointing,
        recompute_every=config.parallelism.activation_checkpointing_every,
        offload=config.parallelism.activation_cpu_offload,
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


def build_model(config: Config, world_size: int = 1, *, initial_weights: bool = True, empty: bool = False) -> DINOv2:
    """Student, teacher (its copy, or as `MODEL.WEIGHTS` has it), what gives the targets where that is another network,
    and loss, on the CPU.

    Args:
        initial_weights: whether to read the files of weights that the configuration names. A run that goes on from a
            checkpoint does not need them; but for those of a frozen teacher, which no checkpoint holds.
        empty: networks without memory (on torch's meta device), for a rank whose weights come from another.
    """
    initial_weights = initial_weights and not empty
    with torch.device("meta") if empty else nullcontext():
        student = build_networks(config, drop_path_rate=config.student.drop_path_rate)
        teacher = build_networks(config)
    if initial_weights and config.student.pretrained_weights:
        load_backbone(student.backbone, config.student.pretrained_weights)
    for name, net in vars(teacher).items():
        if net is not None and not empty:
            net.load_state_dict(getattr(student, name).state_dict())

    heads = derive.head_sizes(config)

    def targets(head: str) -> Centering | SinkhornKnopp:
        size = heads.get(head, heads.get("dino_head"))  # patches go through the DINO head where they have none
        return build_targets(
            config.train.centering,
            size.prototypes if size else 1,
            momentum=config.dino.center_momentum,
            iterations=config.dino.sinkhorn_iterations,
            by_compiled=config.performance.compile,
        )

    model = DINOv2(
        student,
        teacher,
        target=build_target(config),
        dino_targets=targets("dino_head"),
        ibot_targets=targets("ibot_head"),
        weights=LossWeights(config.dino.loss_weight, config.ibot.loss_weight, config.dino.koleo_loss_weight),
        student_temp=config.dino.student_temp,
        mean=config.crops.mean,
        std=config.crops.std,
        max_masked=_max_masked(config, world_size),
        masking=config.ibot.mask_sample_probability > 0,
        all_patches=config.ibot.all_patches,
        koleo_distributed=config.dino.koleo_distributed,
        colours=build_colours(config),
    )
    if initial_weights and config.MODEL.WEIGHTS:
        load_run(
            model.networks("student"),
            model.networks("teacher"),
            {"dino_targets": model.dino_targets, "ibot_targets": model.ibot_targets},
            config.MODEL.WEIGHTS,
        )
    return model


def build_target(config: Config) -> Networks | None:
    """The frozen teacher, whole, on every rank; None where nothing is distilled."""
    if frozen_teacher(config) is None:
        return None
    path = Path(config.teacher.distil_from).expanduser()
    nets = load_target(path, kernel=config.performance.attention)
    return Networks(nets["backbone"], nets.get("dino_head"), nets.get("ibot_head"))


def build_colours(config: Config) -> Colours | None:
    """What changes the crops' colours on the device; None where the workers do."""
    if not config.performance.device_augment:
        return None
    blurred = max(config.crops.blur_probability) > 0
    return Colours(config.crops.blur_kernel_size if blurred else 1, config.crops.solarize_threshold)


def _max_masked(config: Config, world_size: int) -> dict[tuple[int, int], int]:
    """The most masked patches of a rank's batch and of a micro-batch, by (images, patches of a global crop).

    Micro-batches lie in a rank's batch as ranks lie in the global one.
    """
    images, phase = derive.images_per_iteration(config, world_size), derive.first_phase(config)
    return {
        (size, masks.patches): max_masked_patches(masks, images, images // size)
        for masks in (mask_settings(config), *([mask_settings(phase[1])] if phase else []))
        for size in {config.train.batch_size_per_gpu, derive.micro_batch(config)}
    }
