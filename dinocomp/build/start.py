"""What can be known, and refused, before images are read or files written."""

from dataclasses import dataclass
from pathlib import Path

import torch

from dinocomp.build.model import backbone_arguments
from dinocomp.config import Config, derive, load_config
from dinocomp.config.keys import walk
from dinocomp.errors import ConfigError
from dinocomp.interop import check_file
from dinocomp.resume import find_checkpoint


@dataclass(frozen=True)
class Start:
    """What is known before anything is built or written.

    Attributes:
        gpu: whether to train on GPUs.
        precision: `fp32`, `bf16` or `fp16`.
        checkpoint: the checkpoint to go on from, None for a fresh start.
        changed: for a run that goes on, "KEY was A, is B" for every key that is not what it was.
    """

    gpu: bool
    precision: str
    output: Path
    checkpoint: Path | None
    changed: tuple[str, ...] = ()


def on_gpu(config: Config) -> bool:
    """Whether the run trains on GPUs.

    Raises:
        ConfigError: GPUs are asked for and there are none.
    """
    available = torch.cuda.is_available()
    if config.train.device == "gpu" and not available:
        raise ConfigError(
            "train.device=gpu, but torch sees no CUDA device on this machine. Type train.device=cpu to train on the "
            "CPU, or mend the driver (see `nvidia-smi`) or install a CUDA build of torch (see torch.version.cuda)."
        )
    return available and config.train.device != "cpu"


def check_start(config: Config) -> Start:
    """Everything that can be refused before images are read or files written. The process group must be up.

    Raises:
        DinocompError: the machine, the output folder or a file of weights does not go with the configuration.
    """
    gpu, output = on_gpu(config), Path(config.train.output_dir).expanduser()
    precision = derive.precision(config, gpu)
    checkpoint = find_checkpoint(output / "checkpoints", config.checkpoint.resume)
    changed: list[str] = []
    if checkpoint is None:
        for path in filter(None, (config.MODEL.WEIGHTS, config.student.pretrained_weights)):
            check_file(path)
    elif (output / "config.yaml").is_file():
        earlier = load_config(str(output / "config.yaml")).config
        changed = differences(earlier, config)
        if any(describe(earlier) != describe(config) for describe in (backbone_arguments, derive.head_sizes)):
            networks = [line for line in changed if line.startswith(("student.", "dino.", "ibot.", "crops."))]
            raise ConfigError(
                f"{checkpoint} holds other networks: {'; '.join(networks)}. "
                f"Give another train.output_dir, or the settings of {output / 'config.yaml'}."
            )
    return Start(gpu, precision, output, checkpoint, tuple(changed))


def differences(earlier: Config, now: Config) -> list[str]:
    """ "KEY was A, is B" for every key whose value differs, but for the output folder."""
    before = {spec.name: spec.default for spec in walk(earlier)}
    return [
        f"{spec.name} was {before[spec.name]}, is {spec.default}"
        for spec in walk(now)
        if before[spec.name] != spec.default and spec.name != "train.output_dir"
    ]
