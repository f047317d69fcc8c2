"""The method: student, teacher, and the losses between them."""

from dinocomp.method.dinov2 import DINOv2, LossWeights, Networks

__all__ = ["DINOv2", "LossWeights", "Networks"]
