"""What is to be evaluated, and how."""

from dataclasses import dataclass, field
from typing import Any

from dinocomp.data import Images
from dinocomp.evaluate.linear import LinearSettings, Seen
from dinocomp.evaluate.segmentation import SegmentationSettings

LABELLED = ("knn", "linear", "logreg", "retrieval")  # in the order in which they are done
PROTOCOLS = (*LABELLED, "segmentation")


@dataclass(frozen=True)
class KnnSettings:
    """See `knn`; the reference's values."""

    ks: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    shots: tuple[int, ...] = ()
    tries: int = 5


@dataclass(frozen=True)
class LogregSettings:
    """See `logistic_regression`; `c_values` of `c_grid`."""

    c_values: int = 12
    fraction: float = 0.1
    seed: int = 0
    max_iterations: int = 1000


@dataclass(frozen=True)
class Plan:
    """What is to be evaluated, on what, and how.

    Attributes:
        weights: what they were given as.
        identity: what changes when the weights do.
        iteration: finished training steps, where that is known.
        train, val: labelled images; of a single set, `train` alone (retrieval, leave-one-out).
        masks: `IMAGES:MASKS` to fit and to score, for segmentation.
        seen, seen_masks: how images are shown, to all protocols and to segmentation.
        precision: the numbers that the backbone computes in, in words.
        k_asked: whether `knn.ks` were asked for: one that is too large is then refused, not left out.
        keep_features: keep class tokens on the disk, for the next time.
    """

    weights: str
    identity: Any
    iteration: int | None
    protocols: tuple[str, ...]
    seen: Seen
    seen_masks: Seen
    precision: str
    train: Images | None = None
    val: Images | None = None
    masks: tuple[str, str] | None = None
    limit_train: int = 0
    limit_val: int = 0
    keep_features: bool = False
    k_asked: bool = True
    knn: KnnSettings = field(default_factory=KnnSettings)
    linear: LinearSettings = field(default_factory=LinearSettings)
    logreg: LogregSettings = field(default_factory=LogregSettings)
    segmentation: SegmentationSettings = field(default_factory=SegmentationSettings)
