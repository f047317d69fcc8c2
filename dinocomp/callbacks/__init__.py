"""What happens around a training step, one event a file."""

from dinocomp.callbacks.bad_images import BadImages
from dinocomp.callbacks.bad_steps import SkipBadSteps
from dinocomp.callbacks.checkpoints import Checkpoints
from dinocomp.callbacks.clip import ClipGradients
from dinocomp.callbacks.evaluation import OnlineEvaluation
from dinocomp.callbacks.freeze import FreezeBackbone
from dinocomp.callbacks.garbage import CollectGarbage
from dinocomp.callbacks.metrics import Metrics
from dinocomp.callbacks.micro_batches import MicroBatches
from dinocomp.callbacks.pictures import FirstBatchPicture
from dinocomp.callbacks.random_state import RestoreRandomState
from dinocomp.callbacks.report import Report
from dinocomp.callbacks.schedules import ApplySchedules
from dinocomp.callbacks.stop import StopOnSignal
from dinocomp.callbacks.teacher import UpdateTeacher

__all__ = [
    "ApplySchedules",
    "BadImages",
    "Checkpoints",
    "ClipGradients",
    "CollectGarbage",
    "FirstBatchPicture",
    "FreezeBackbone",
    "Metrics",
    "MicroBatches",
    "OnlineEvaluation",
    "Report",
    "RestoreRandomState",
    "SkipBadSteps",
    "StopOnSignal",
    "UpdateTeacher",
]
