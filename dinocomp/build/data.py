"""What is shown to the networks, from a configuration."""

import logging
from typing import Any

from composer.utils import dist
from torch.utils.data import DataLoader

from dinocomp.config import Config, derive
from dinocomp.data import CropSettings, FirstPhase, Images, MaskSettings, open_images, training_loader

log = logging.getLogger(__name__)


def opening(config: Config) -> dict[str, Any]:
    """How images are opened, whichever they are."""
    return {
        "cache_dir": config.data.cache_dir,
        "cache_limit": derive.cache_limit(config),
        "timeout_seconds": config.data.timeout_seconds,
    }


def training_images(config: Config) -> Images:
    """What the run trains on."""
    images = open_images(config.train.dataset_path, split="train", **opening(config))
    log.info("training images: %s (%d)", images.path, len(images))
    if config.data.cache_limit and images.block is None:
        log.info(
            "note: data.cache_limit=%s does nothing: these shards are read where they are", config.data.cache_limit
        )
    return images


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
    phase = derive.first_phase(config)
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
        skip_bad=config.data.on_bad_image == "skip",
        device_augment=config.performance.device_augment,
        scaled_decode=config.performance.scaled_decode,
        first_phase=FirstPhase(phase[0], crop_settings(phase[1]), mask_settings(phase[1])) if phase else None,
    )
