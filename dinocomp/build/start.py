"""What can be known, and refused, before images are read or files written."""

from dataclasses import dataclass
from pathlib import Path

import torch
from composer.utils import dist

from dinocomp.build.model import backbone_arguments
from dinocomp.checkpoints.find import find_checkpoint
from dinocomp.checkpoints.manifest import iteration_of, world_size_of
from dinocomp.config import Config, derive, load_config
from dinocomp.config.changes import differences
from dinocomp.errors import ConfigError
from dinocomp.interop import check_file, read_iteration
from dinocomp.output import CONFIG


@dataclass(frozen=True)
class Start:
    """What is known before anything is built or written.

    Attributes:
        gpu: whether to train on GPUs.
        precision: `fp32`, `bf16` or `fp16`.
        checkpoint: the folder of the checkpoint to go on from, None for a fresh start.
        iteration: finished iterations there, or those that `MODEL.KEEP_ITERATION` takes over from other weights.
        changed: for a run that goes on, a line for every key that is not what it was.
        notes: other lines on how it goes on.
    """

    gpu: bool
    precision: str
    output: Path
    checkpoint: Path | None
    iteration: int = 0
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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
    found = find_checkpoint(output / "checkpoints", config.checkpoint.resume)
    checkpoint = found.checkpoint
    iteration = iteration_of(checkpoint) if checkpoint else 0
    changed, notes = [], list(found.passed_over)
    if checkpoint is None:
        for path in filter(None, (config.MODEL.WEIGHTS, config.student.pretrained_weights)):
            check_file(path)
        if config.MODEL.WEIGHTS and config.MODEL.KEEP_ITERATION:
            iteration = _iteration_to_keep(config)
    elif (output / CONFIG).is_file():
        earlier = load_config(str(output / CONFIG)).config
        changed = differences(earlier, config)
        if any(describe(earlier) != describe(config) for describe in (backbone_arguments, derive.head_sizes)):
            networks = [line for line in changed if line.startswith(("student.", "dino.", "ibot.", "crops."))]
            raise ConfigError(
                f"{checkpoint} holds other networks: {'; '.join(networks)}. "
                f"Give another train.output_dir, or the settings of {output / CONFIG}."
            )
    if checkpoint and (before := world_size_of(checkpoint)) != (now := dist.get_world_size()):
        notes.append(
            f"processes were {before}, are {now} (images, crops and masks are the same as long as "
            "train.batch_size_per_gpu times processes is; what is drawn on a process, such as drop path, is another)"
        )
    return Start(gpu, precision, output, checkpoint, iteration, tuple(changed), tuple(notes))


def _iteration_to_keep(config: Config) -> int:
    iteration, total = read_iteration(config.MODEL.WEIGHTS), derive.total_iterations(config)
    if iteration >= total:
        raise ConfigError(
            f"MODEL.KEEP_ITERATION=true: {config.MODEL.WEIGHTS} is of iteration {iteration}, and the run has {total}. "
            "Raise optim.epochs, or type MODEL.KEEP_ITERATION=false to start at 0."
        )
    return iteration
