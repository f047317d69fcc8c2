"""What other settings do to a run that goes on with them."""

from dinocomp.config.keys import walk
from dinocomp.config.schema import Config

_SAFE = "safe, the numbers stay the same"
_SCHEDULES = "schedules follow the new value from here on"
# The first that a key begins with; all others are settings of losses, crops or augmentation.
_EFFECTS = {
    "data.cache_limit": "images come in another order from here on, where they are fetched",
    "data.on_bad_image": "safe, unless an image is damaged",
    "data.": _SAFE,
    "loggers.": _SAFE,
    "evaluation.": _SAFE,
    "checkpoint.": _SAFE,
    "train.num_workers": _SAFE,
    "parallelism.": "safe, the numbers differ by rounding",
    "train.microbatch_size": "safe, the numbers differ by rounding, and other images are dropped together (drop path)",
    "performance.device_augment": "colours differ by a level of 255 here and there from here on",
    "performance.scaled_decode": "large images' crops differ a little from here on",
    "performance.": "safe, the numbers differ by rounding",
    "compute_precision.": "safe, the numbers differ by rounding",
    "train.device": "safe, the numbers differ by rounding",
    "MODEL.": "not used, the run goes on from its own checkpoint",
    "student.pos_embed_blur": "not used, the run goes on from its own checkpoint",
    "student.pos_embed_std": "not used, the run goes on from its own checkpoint",
    "student.linear_init": "not used, the run goes on from its own checkpoint",
    "student.pretrained_weights": "not used, the run goes on from its own checkpoint",
    "optim.max_bad_steps": _SAFE,
    "optim.": _SCHEDULES,
    "teacher.distil_from": "safe where it is the same file in another place; another one is refused",
    "teacher.": _SCHEDULES,
    "train.OFFICIAL_EPOCH_LENGTH": _SCHEDULES,
    "train.seed": "images come in another order and other crops from here on",
    "train.dataset_path": "other images, or in another order, from here on",
    "train.batch_size_per_gpu": "the learning rate follows the batch, unless the number of processes makes up for it",
}


def differences(earlier: Config, now: Config) -> list[str]:
    """ "KEY was A, is B (what that does)" for every key whose value differs, but for the output folder."""
    before = {spec.name: spec.default for spec in walk(earlier)}
    return [
        f"{spec.name} was {_shown(before[spec.name])}, is {_shown(spec.default)} ({_effect(spec.name)})"
        for spec in walk(now)
        if before[spec.name] != spec.default and spec.name != "train.output_dir"
    ]


def _shown(value: object) -> str:
    return "''" if value == "" else str(value)


def _effect(name: str) -> str:
    for beginning, effect in _EFFECTS.items():
        if name.startswith(beginning):
            return effect
    return "the training task is another from here on"
