"""The networks. They know nothing of training."""

from dinocomp.models.heads import DINOHead
from dinocomp.models.vision_transformer import Rows, Tokens, VisionTransformer

__all__ = ["DINOHead", "Rows", "Tokens", "VisionTransformer"]
