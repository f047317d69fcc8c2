"""Images -> shards -> crops and masks -> batches."""

from dinocomp.data.batch import Batch, split_batch
from dinocomp.data.crops import CropSettings, evaluation_view, multi_crop
from dinocomp.data.images import decode_rgb, rgb_of
from dinocomp.data.listing import ClassName, Source
from dinocomp.data.loader import FirstPhase, MultiCropDataset, training_loader
from dinocomp.data.masks import MaskSettings, batch_masks, block_mask, max_masked_patches
from dinocomp.data.order import TrainingOrder
from dinocomp.data.reader import BadImage, Images, Sample
from dinocomp.data.report import Report
from dinocomp.data.shards import (
    Survey,
    check_images,
    count_images,
    ensure_shards,
    evaluation_pair,
    open_images,
    survey_images,
)
from dinocomp.data.sources import find_sources
from dinocomp.data.workers import PlainLoader

__all__ = [
    "BadImage",
    "Batch",
    "ClassName",
    "CropSettings",
    "FirstPhase",
    "Images",
    "MaskSettings",
    "MultiCropDataset",
    "PlainLoader",
    "Report",
    "Sample",
    "Source",
    "Survey",
    "TrainingOrder",
    "batch_masks",
    "block_mask",
    "check_images",
    "count_images",
    "decode_rgb",
    "ensure_shards",
    "evaluation_pair",
    "evaluation_view",
    "find_sources",
    "max_masked_patches",
    "multi_crop",
    "open_images",
    "rgb_of",
    "split_batch",
    "survey_images",
    "training_loader",
]
