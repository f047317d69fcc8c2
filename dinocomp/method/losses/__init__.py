"""The loss terms and the teacher's targets, each a formula on tensors, all in fp32."""

from dinocomp.method.losses.cross_entropy import Targets
from dinocomp.method.losses.dino import dino_loss
from dinocomp.method.losses.ibot import ibot_loss
from dinocomp.method.losses.koleo import koleo_gradient, koleo_loss, with_gradient
from dinocomp.method.losses.sinkhorn import SinkhornKnopp
from dinocomp.method.losses.targets import Centering, build_targets

__all__ = [
    "Centering",
    "SinkhornKnopp",
    "Targets",
    "build_targets",
    "dino_loss",
    "ibot_loss",
    "koleo_gradient",
    "koleo_loss",
    "with_gradient",
]
