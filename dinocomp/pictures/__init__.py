"""Tensors to pictures: functions that know of no run, no configuration and no training."""

from dinocomp.pictures.attention import ClassAttention, attention_picture, watch_attention
from dinocomp.pictures.batch import batch_picture, coloured
from dinocomp.pictures.canvas import write_png
from dinocomp.pictures.curves import curves_picture, read_lines
from dinocomp.pictures.embedding import embedding_picture, map_images
from dinocomp.pictures.looks import Looks, look_at, makers, thumbnails
from dinocomp.pictures.neighbours import nearest_images, neighbours_picture
from dinocomp.pictures.pca import patch_colours, pca_picture
from dinocomp.pictures.prototypes import Usage, prototype_usage, prototypes_picture

__all__ = [
    "ClassAttention",
    "Looks",
    "Usage",
    "attention_picture",
    "batch_picture",
    "coloured",
    "curves_picture",
    "embedding_picture",
    "look_at",
    "makers",
    "map_images",
    "nearest_images",
    "neighbours_picture",
    "patch_colours",
    "pca_picture",
    "prototype_usage",
    "prototypes_picture",
    "read_lines",
    "thumbnails",
    "watch_attention",
    "write_png",
]
