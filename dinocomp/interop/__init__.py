"""Weights in and out."""

from dinocomp.interop.teacher import load_teacher, prepare_image, read_teacher, save_teacher
from dinocomp.interop.weights import check_file, load_backbone, load_run, read_iteration

__all__ = [
    "check_file",
    "load_backbone",
    "load_run",
    "load_teacher",
    "prepare_image",
    "read_iteration",
    "read_teacher",
    "save_teacher",
]
