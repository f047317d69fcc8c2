"""What `auto` stands for: values chosen by rule from the images, the batch and the length of the run.

Each rule is a function of what is known, gives its reason, and comes to the reference's own value where there are as
many images and iterations as the reference has. docs/small-data.md shows what they were measured on.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dinocomp.config.derive import ANCHOR, images_per_iteration, total_iterations
from dinocomp.config.keys import show, with_values
from dinocomp.config.schema import Config

ASSUMED_IMAGES = 100_000  # where they have not been counted
ASSUMED_SIDE = 256  # pixels, where no image has been seen
_MANY = 1_000_000  # images from which on the reference's values hold
_LEAST_PROTOTYPES, _IMAGES_EACH = 128, 16
_LEAST_MOMENTUM, _AVERAGES = 0.5, 20  # of the teacher, one after the other, in a run
_LEAST_PATCHES = 4  # high and wide, of a global crop
_MANY_PATCHES, _BLUR = 6, 0.125
_REFERENCE = Config()  # whose defaults are the reference's


@dataclass(frozen=True)
class Facts:
    """What is known of a run besides its configuration.

    Attributes:
        images: how many there are to train on; None where they have not been counted.
        side: the shorter side of a usual image (pixels); None where none has been seen.
        world_size: training processes.
        settled: values by key that the run has begun with; they are kept when it goes on.
        reasons: by key, why they were chosen then.
    """

    images: int | None = None
    side: int | None = None
    world_size: int = 1
    settled: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What was chosen for a key given as `auto`, and why."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key}={show(self.value)}: {self.reason}"


Rule = Callable[[Config, Facts], tuple[Any, str]]


def choose(config: Config, keys: Collection[str], facts: Facts) -> tuple[Config, tuple[Choice, ...]]:
    """Puts a value in the place of each key that was given as `auto`.

    Args:
        config: with any values for `keys`.
        keys: those that were given as `auto`; each has a rule in `RULES`.
    """
    chosen = []
    for key, rule in RULES.items():  # in this order: later rules look at what earlier ones chose
        if key not in keys:
            continue
        if key in facts.settled:
            value, reason = facts.settled[key], facts.reasons.get(key, "as this run began")
        else:
            value, reason = rule(config, facts)
        config = with_values(config, {key: value})
        chosen.append(Choice(key, value, reason))
    return config, tuple(chosen)


def _images(facts: Facts) -> tuple[int, str]:
    """How many images a rule goes by, and how it speaks of them."""
    if facts.images is None:
        return ASSUMED_IMAGES, f"{ASSUMED_IMAGES:,} images, assumed: they are not counted yet (--images N)"
    return facts.images, f"{facts.images:,} images"


def prototypes_for(images: int) -> int:
    """How many prototypes go with so many images: the power of two nearest below one for 16 images, 128 to 65536."""
    most = _REFERENCE.dino.head_n_prototypes
    return min(max(1 << max((images // _IMAGES_EACH).bit_length() - 1, 0), _LEAST_PROTOTYPES), most)


def momentum_for(iterations: int) -> float:
    """Which momentum averages over a twentieth of so many iterations, 0.5 to the reference's 0.992."""
    return round(min(max(1 - _AVERAGES / iterations, _LEAST_MOMENTUM), _REFERENCE.teacher.momentum_teacher), 4)


def _dino_prototypes(config: Config, facts: Facts) -> tuple[int, str]:
    images, said = _images(facts)
    least, most = _LEAST_PROTOTYPES, _REFERENCE.dino.head_n_prototypes
    reason = f"a power of two from {least} to {most:,}, one for {_IMAGES_EACH} of {said}"
    return prototypes_for(images), reason


def _ibot_prototypes(config: Config, facts: Facts) -> tuple[int, str]:
    prototypes, reason = _dino_prototypes(config, facts)
    return prototypes, reason if config.ibot.separate_head else "of no use: ibot.separate_head=false"


def _momentum(config: Config, facts: Facts) -> tuple[float, str]:
    iterations = total_iterations(config)
    momentum, wanted = momentum_for(iterations), iterations / _AVERAGES
    said = f"averages over {1 / (1 - momentum):.0f} iterations"
    if momentum == _REFERENCE.teacher.momentum_teacher:
        return momentum, f"{said}, as the reference's and the most; a twentieth of {iterations:,} is {wanted:,.0f}"
    if momentum == _LEAST_MOMENTUM:
        return momentum, f"{said}, the fewest; a twentieth of {iterations:,} is {wanted:.1f}"
    return momentum, f"{said}: a twentieth of {iterations:,}"


def _teacher_temp(config: Config, facts: Facts) -> tuple[float, str]:
    images, said = _images(facts)
    reference = _REFERENCE.teacher.teacher_temp
    if images >= _MANY:
        return reference, f"the reference's, from {_MANY:,} images on: {said}"
    start = config.teacher.warmup_teacher_temp
    return start, f"as at the start, sharp to the end ({reference:g} from {_MANY:,} images on): {said}"


def _temp_warmup(config: Config, facts: Facts) -> tuple[int, str]:
    if config.teacher.teacher_temp == config.teacher.warmup_teacher_temp:
        return 0, "the temperature does not change"
    return _part("three tenths", 0.3, config.optim.epochs, _REFERENCE.teacher.warmup_teacher_temp_epochs)


def _warmup(config: Config, facts: Facts) -> tuple[int, str]:
    if config.optim.epochs == 1:
        return 0, "the run is one official epoch; more and shorter ones can be warmed up over"
    return _part("a tenth", 0.1, config.optim.epochs, _REFERENCE.optim.warmup_epochs)


def _part(words: str, share: float, epochs: int, most: int) -> tuple[int, str]:
    """So much of a run, in whole official epochs."""
    part = min(math.ceil(round(share * epochs, 6)), most)
    return part, f"{words} of the run's {epochs:,} official epochs, rounded up, at most {most}"


def _base_lr(config: Config, facts: Facts) -> tuple[float, str]:
    """Below the batch it is anchored at, the rate falls with the batch and not its square root, to half of that."""
    images = images_per_iteration(config, facts.world_size)
    reference, share = _REFERENCE.optim.base_lr, min(max((images / ANCHOR) ** 0.5, 0.5), 1.0)
    rate = round(reference * share, 6)
    there = f"{ANCHOR:,} on, half of it up to {ANCHOR // 4}, in between by the square root"
    return rate, f"{images:,} images an iteration: the reference's {reference:g} from {there}"


def _global_size(config: Config, facts: Facts) -> tuple[int, str]:
    patch, side, most = config.student.patch_size, facts.side or ASSUMED_SIDE, _REFERENCE.crops.global_crops_size
    size = max(min(-(-side // patch), most // patch), _LEAST_PATCHES) * patch
    seen = f"images of {side} px" if facts.side else f"images of {side} px, assumed: none has been seen yet"
    least = f"{_LEAST_PATCHES} x {_LEAST_PATCHES} patches at least"
    return size, f"in whole patches of {patch} px, at most {most} px, but {least}; {seen}"


def _local_size(config: Config, facts: Facts) -> tuple[int, str]:
    patch, size = config.student.patch_size, config.crops.global_crops_size
    reference = _REFERENCE.crops
    share = reference.local_crops_size / reference.global_crops_size
    of = f"{reference.local_crops_size}/{reference.global_crops_size}"
    return max(round(size * share / patch), 2) * patch, f"{of} of {size} px, in whole patches of {patch} px"


def _local_number(config: Config, facts: Facts) -> tuple[int, str]:
    patches = (config.crops.local_crops_size // config.student.patch_size) ** 2
    if patches < 16:
        return 2, f"{patches} patches each, of which more say little and cost as much"
    return _REFERENCE.crops.local_crops_number, f"the reference's: {patches} patches each"


def _pos_embed_blur(config: Config, facts: Facts) -> tuple[float, str]:
    images, said = _images(facts)
    side = config.crops.global_crops_size // config.student.patch_size
    if images >= _MANY:
        return _REFERENCE.student.pos_embed_blur, f"the reference's, from {_MANY:,} images on: {said}"
    if side < _MANY_PATCHES:
        return 0.0, f"{side} x {side} patches, too few to be alike; {_BLUR:g} from {_MANY_PATCHES} x {_MANY_PATCHES} on"
    return _BLUR, f"an eighth of {side} x {side} patches, for neighbours to begin alike: {said}"


RULES: dict[str, Rule] = {
    "dino.head_n_prototypes": _dino_prototypes,
    "ibot.head_n_prototypes": _ibot_prototypes,
    "teacher.momentum_teacher": _momentum,
    "teacher.teacher_temp": _teacher_temp,
    "teacher.warmup_teacher_temp_epochs": _temp_warmup,
    "optim.base_lr": _base_lr,
    "optim.warmup_epochs": _warmup,
    "crops.global_crops_size": _global_size,
    "crops.local_crops_size": _local_size,
    "crops.local_crops_number": _local_number,
    "student.pos_embed_blur": _pos_embed_blur,
}
