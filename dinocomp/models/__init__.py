"""The networks. They know nothing of training."""

from dinocomp.models.heads import DINOHead
from dinocomp.models.vision_transformer import Tokens, VisionTransformer

__all__ = ["DINOHead", "Tokens", "VisionTransformer"]
