"""Weights in and out."""

from dinocomp.interop.backbone import Backbone, open_backbone
from dinocomp.interop.model import Model, View, load
from dinocomp.interop.teacher import load_teacher, read_about, read_teacher, save_teacher
from dinocomp.interop.weights import check_file, load_backbone, load_run, read_iteration

__all__ = [
    "Backbone",
    "Model",
    "View",
    "check_file",
    "load",
    "load_backbone",
    "load_run",
    "load_teacher",
    "open_backbone",
    "read_about",
    "read_iteration",
    "read_teacher",
    "save_teacher",
]
