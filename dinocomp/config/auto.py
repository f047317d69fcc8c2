"""What `auto` stands for: values chosen by rule from the images, the batch and the length of the run.

Each rule is a function of what is known, gives its reason, and comes to the reference's own value where there are as
many images and iterations as the reference has. docs/small-data.md shows what they were measured on.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dinocomp.config.derive import images_per_iteration, total_iterations
from dinocomp.config.keys import show, with_values
from dinocomp.config.schema import Config

ASSUMED_IMAGES = 100_000  # where they have not been counted
ASSUMED_SIDE = 256  # pixels, where no image has been seen
_MANY = 1_000_000  # images from which on the reference's values hold
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
        return ASSUMED_IMAGES, f"as for {ASSUMED_IMAGES:,} images, which are not counted yet (--images N)"
    return facts.images, f"{facts.images:,} images"


def prototypes_for(images: int) -> int:
    """How many prototypes go with so many images: the power of two nearest below one for 16 images, 128 to 65536."""
    most = _REFERENCE.dino.head_n_prototypes
    return min(max(1 << max((images // 16).bit_length() - 1, 0), 128), most)


def _prototypes(config: Config, facts: Facts) -> tuple[int, str]:
    images, said = _images(facts)
    return prototypes_for(images), f"one for 16 of {said}, as a power of two from 128 to 65,536"


def _momentum(config: Config, facts: Facts) -> tuple[float, str]:
    iterations = total_iterations(config)
    momentum = round(min(max(1 - 20 / iterations, 0.9), _REFERENCE.teacher.momentum_teacher), 4)
    return momentum, f"averages over {1 / (1 - momentum):.0f} iterations: a twentieth of {iterations:,}, from 10 to 125"


def _teacher_temp(config: Config, facts: Facts) -> tuple[float, str]:
    images, said = _images(facts)
    reference = _REFERENCE.teacher.teacher_temp
    if images >= _MANY:
        return reference, f"the reference's: {said}"
    start = config.teacher.warmup_teacher_temp
    return start, f"as at the start: sharp targets to the end, for {said} ({reference:g} from {_MANY:,} images on)"


def _temp_warmup(config: Config, facts: Facts) -> tuple[int, str]:
    epochs, most = config.optim.epochs, _REFERENCE.teacher.warmup_teacher_temp_epochs
    if config.teacher.teacher_temp == config.teacher.warmup_teacher_temp:
        return 0, "the temperature does not change"
    return min(most, -(-epochs * 3 // 10)), f"three tenths of {epochs} official epochs, rounded up, at most {most}"


def _warmup(config: Config, facts: Facts) -> tuple[int, str]:
    epochs, most = config.optim.epochs, _REFERENCE.optim.warmup_epochs
    return min(most, -(-epochs // 10)), f"a tenth of {epochs} official epochs, rounded up, at most {most}"


def _base_lr(config: Config, facts: Facts) -> tuple[float, str]:
    images = images_per_iteration(config, facts.world_size)
    reference = _REFERENCE.optim.base_lr
    rate = reference / 2 if images < 512 else reference
    return rate, f"{images:,} images an iteration: the reference's {reference:g} from 512 on, half of it below"


def _global_size(config: Config, facts: Facts) -> tuple[int, str]:
    patch, side, most = config.student.patch_size, facts.side or ASSUMED_SIDE, _REFERENCE.crops.global_crops_size
    size = max(min(-(-side // patch), most // patch), 4) * patch
    seen = f"images of {side} px" if facts.side else f"as for images of {side} px, for none has been seen yet"
    return size, f"{seen}, in whole patches of {patch} px: at most {most} px, but 4 x 4 patches at least"


def _local_size(config: Config, facts: Facts) -> tuple[int, str]:
    patch, size = config.student.patch_size, config.crops.global_crops_size
    reference = _REFERENCE.crops
    share = reference.local_crops_size / reference.global_crops_size
    return max(round(size * share / patch), 2) * patch, f"3/7 of {size} px, in whole patches of {patch} px"


def _local_number(config: Config, facts: Facts) -> tuple[int, str]:
    patches = (config.crops.local_crops_size // config.student.patch_size) ** 2
    if patches < 16:
        return 2, f"{patches} patches each, of which more say little and cost as much"
    return _REFERENCE.crops.local_crops_number, f"the reference's: {patches} patches each"


RULES: dict[str, Rule] = {
    "dino.head_n_prototypes": _prototypes,
    "ibot.head_n_prototypes": _prototypes,
    "teacher.momentum_teacher": _momentum,
    "teacher.teacher_temp": _teacher_temp,
    "teacher.warmup_teacher_temp_epochs": _temp_warmup,
    "optim.base_lr": _base_lr,
    "optim.warmup_epochs": _warmup,
    "crops.global_crops_size": _global_size,
    "crops.local_crops_size": _local_size,
    "crops.local_crops_number": _local_number,
}
