"""What can be known, and refused, before images are converted or files written."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from composer.utils import dist

from dinocomp.build.compile import check_compiler
from dinocomp.build.machine import check_attention, check_loggers, on_gpu
from dinocomp.build.model import backbone_arguments, build_networks
from dinocomp.build.parallel import choose_strategy
from dinocomp.checkpoints.find import Found, find_checkpoint
from dinocomp.checkpoints.folder import TEACHER, has_state
from dinocomp.checkpoints.manifest import iteration_of, world_size_of
from dinocomp.checkpoints.remote import RemoteFolder
from dinocomp.config import Config, derive, load_config
from dinocomp.config.changes import differences
from dinocomp.config.distil import frozen_teacher
from dinocomp.data import check_images
from dinocomp.distributed import on_rank_0
from dinocomp.errors import ConfigError, WeightsError
from dinocomp.hints import missing, obstacle
from dinocomp.interop import load_backbone, load_run, read_iteration
from dinocomp.interop.head import fingerprint
from dinocomp.interop.teacher import read_about
from dinocomp.output import CONFIG, LOG

_OF_A_RUN = (LOG, "checkpoints")  # what every run writes first, and what is worth going on from
_OF_NETWORKS = (
    r"student\.(arch|patch_size|layerscale|ffn_layer|\w+_bias|num_|embed_dim|depth|mlp_ratio|interpolate)"
    r"|(dino|ibot)\.(head_|loss_weight|separate_head)|crops\.global_crops_size"
)
_BESIDE = (".yaml", ".yml", ".sh", ".txt", ".md", ".log", ".out", ".err")  # what people put beside a run


@dataclass(frozen=True)
class Start:
    """What is known before anything is built or written.

    Attributes:
        gpu: whether to train on GPUs.
        precision: `fp32`, `bf16` or `fp16`.
        strategy: how networks lie on processes, `single`, `ddp`, `fsdp` or `fsdp2`.
        checkpoint: the folder of the checkpoint to go on from, None for a fresh start.
        iteration: finished iterations there, or those that `MODEL.KEEP_ITERATION` takes over from other weights.
        changed: for a run that goes on, a line for every key that is not what it was.
        passed_over: a line for each newer checkpoint that is damaged.
        notes: other lines on how it goes on.
        damaged, seen: checkpoints that were passed over, and all that there are.
        remote: where checkpoints are copied to, on rank 0.
        distilled_from: fingerprint of the frozen teacher's file, on rank 0; '' where there is none.
    """

    gpu: bool
    precision: str
    strategy: str
    output: Path
    checkpoint: Path | None
    iteration: int = 0
    changed: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()
    seen: tuple[Path, ...] = ()
    remote: RemoteFolder | None = None
    distilled_from: str = ""


def check_start(config: Config, found: Found | None = None) -> Start:
    """Everything that can be refused before images are converted or files written. The process group must be up.

    What is known at once comes first, reading weights and listing images last.

    Args:
        found: the checkpoint to go on from, where it has been looked for already.

    Raises:
        DinocompError: the machine, the output folder, the images or a file of weights do not go with the configuration.
    """
    gpu, output = on_gpu(config), Path(config.train.output_dir).expanduser()
    frozen_teacher(config)
    precision, strategy = derive.precision(config, gpu), choose_strategy(config, gpu)
    check_attention(config, gpu)
    check_compiler(config, gpu, strategy)
    check_loggers(config)
    if config.optim.freeze_backbone_epochs and precision == "fp16" and strategy == "ddp":
        raise ConfigError(
            "optim.freeze_backbone_epochs with fp16 on several processes: each would keep a gradient scale of its own "
            "while the backbone is frozen. Type recipes=[bf16] or recipes=[fp32], or parallelism.strategy=fsdp2"
        )
    _check_output(output, config.train.dataset_path)
    count = check_images(
        config.train.dataset_path,
        config.evaluation.train_dataset_path,
        config.evaluation.val_dataset_path,
        config.data.cache_dir,
    )
    if count is not None:
        check_enough(config, count)
    remote = open_remote(config)
    found = found or find_checkpoint(output / "checkpoints", config.checkpoint.resume, remote)
    checkpoint = found.checkpoint
    iteration = iteration_of(checkpoint) if checkpoint else 0
    changed, notes = [], []
    if checkpoint is None:
        _check_teacher(output)
        _check_weights(config)
        if config.MODEL.WEIGHTS and config.MODEL.KEEP_ITERATION:
            iteration = _iteration_to_keep(config)
    elif (output / CONFIG).is_file():
        earlier = load_config(str(output / CONFIG)).config
        changed = differences(earlier, config)
        if any(describe(earlier) != describe(config) for describe in (backbone_arguments, derive.head_sizes)):
            networks = [line.partition(" (")[0] for line in changed if re.match(_OF_NETWORKS, line)]
            raise ConfigError(
                f"{checkpoint} holds other networks: {'; '.join(networks)}. "
                f"Give another train.output_dir, or the settings of {output / CONFIG}."
            )
    distilled_from = _frozen_teacher_of(config, checkpoint)
    if config.parallelism.strategy in derive.SHARDED and strategy == "single":
        notes.append(f"parallelism.strategy={config.parallelism.strategy}: one process holds whole networks")
    if checkpoint and (before := world_size_of(checkpoint)) != (now := dist.get_world_size()):
        notes.append(
            f"processes were {before}, are {now} (images, crops and masks are the same as long as "
            "train.batch_size_per_gpu times processes is; what is drawn on a process, such as drop path, is another)"
        )
    return Start(
        gpu,
        precision,
        strategy,
        output,
        checkpoint,
        iteration,
        changed=tuple(changed),
        passed_over=found.passed_over,
        notes=tuple(notes),
        damaged=found.damaged,
        seen=found.seen,
        remote=remote,
        distilled_from=distilled_from,
    )


def _frozen_teacher_of(config: Config, checkpoint: Path | None) -> str:
    """The fingerprint of the frozen teacher's file, on rank 0: the one that the checkpoint was trained with.

    Raises:
        ConfigError: on all ranks, where it was another one.
    """

    def check() -> str:
        now = fingerprint(config.teacher.distil_from) if config.teacher.distil_from else ""
        if checkpoint and (checkpoint / TEACHER).is_file():
            before = read_about(checkpoint / TEACHER).get("distilled_from", "")
            if now != before:
                raise ConfigError(
                    f"{checkpoint} was trained {f'with the frozen teacher {before[:12]}…' if before else 'without'}"
                    f"{'' if before else ' a frozen teacher'}, and teacher.distil_from="
                    f"{config.teacher.distil_from or repr('')} is {f'{now[:12]}…' if now else 'none'} (SHA-256). Give "
                    "the file it was trained with, or another train.output_dir."
                )
        return now

    return on_rank_0(check)


def open_remote(config: Config) -> RemoteFolder | None:
    """The object store for checkpoints, seen to work; on rank 0, elsewhere None.

    Raises:
        ConfigError: on all ranks, where it does not work.
    """
    if not config.checkpoint.remote:
        return None
    remote = RemoteFolder(config.checkpoint.remote)
    on_rank_0(remote.check)
    return remote if dist.get_global_rank() == 0 else None


def check_enough(config: Config, images: int) -> None:
    """Refuses fewer images than one iteration takes: a batch would hold some of them twice.

    Raises:
        ConfigError: there are too few.
    """
    processes = dist.get_world_size()
    needed = derive.images_per_iteration(config, processes)
    if images < needed:
        fitting = images // processes
        remedy = f"type train.batch_size_per_gpu={fitting}" if fitting else f"start no more than {images} process(es)"
        raise ConfigError(
            f"train.dataset_path={config.train.dataset_path} has {images} image(s), fewer than the {needed} of one "
            f"iteration (train.batch_size_per_gpu={config.train.batch_size_per_gpu} on each of {processes} "
            f"process(es)); {remedy}, or give more images"
        )


def _check_output(output: Path, dataset_path: str) -> None:
    """A run gets a folder of its own: an empty one, a new one, or that of the run it goes on with."""
    if reason := obstacle(output):
        raise ConfigError(f"train.output_dir={output} cannot be written to: {reason}; give another folder")
    images = Path(dataset_path.removeprefix("file://")).expanduser()
    here = output.resolve()
    if dataset_path and images.is_dir() and images.resolve() in (here, *here.parents):
        raise ConfigError(
            f"train.output_dir={output} lies in train.dataset_path={dataset_path}, whose folder is read again at every "
            "start: pictures of the run would become images to train on. Type train.output_dir=output/NAME"
        )
    if not output.is_dir() or any((output / name).exists() for name in _OF_A_RUN):
        return
    others = sorted(
        path.name
        for path in output.iterdir()
        if path.name[0] != "." and path.suffix not in _BESIDE and path.name != "lost+found"
    )
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise ConfigError(
            f"train.output_dir={output} holds other things ({shown}), among which a run would scatter its files. "
            f"Give it a folder of its own: train.output_dir={output / 'NAME'}"
        )


def _check_teacher(output: Path) -> None:
    """Refuses a folder with a teacher and no checkpoint: a fresh start would write over all that is left of a run."""
    if (output / TEACHER).exists():
        raise ConfigError(
            f"{output / TEACHER} is there, but no checkpoint to go on from: starting from scratch would write over it. "
            "Give another train.output_dir (with MODEL.WEIGHTS set to that file, to start from it), put the "
            "checkpoints back, or move the file away."
        )


def _check_weights(config: Config) -> None:
    """Reads the files to start from into networks without memory: whatever is wrong with them shows as it would later.

    Raises:
        WeightsError: naming the key.
    """
    named = {"MODEL.WEIGHTS": config.MODEL.WEIGHTS, "student.pretrained_weights": config.student.pretrained_weights}
    for key, path in named.items():
        if path:
            _check_path(key, path)
    for key, path in named.items():
        if not path:
            continue
        with torch.device("meta"):
            student, teacher = build_networks(config), build_networks(config)
        try:
            with warnings.catch_warnings():  # that nothing is copied into them
                warnings.simplefilter("ignore")
                if key == "MODEL.WEIGHTS":
                    parts = [
                        {n: net for n, net in vars(nets).items() if net is not None} for nets in (student, teacher)
                    ]
                    load_run(*parts, {}, path)
                else:
                    load_backbone(student.backbone, path)
        except WeightsError as error:
            raise WeightsError(f"{key}: {error}") from error


def _check_path(key: str, text: str) -> None:
    path = Path(text).expanduser()
    if path.is_file() or has_state(path) or (path / "config.json").is_file():
        return
    if "://" in text:
        what = "weights are read from a file. Download it and give its path"
    elif path.is_dir():
        inside = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.pt*"))
        what = f"this is a folder; give a file, such as {key}={inside[0] if inside else path / 'teacher.safetensors'}"
    elif path.parent == Path("."):
        what = f"{missing(path)} Weights have no names here; give the path of a .safetensors, .pt or .pth file"
    else:
        what = f"{missing(path)} Give the path of a .safetensors, .pt or .pth file"
    raise WeightsError(f"{key}={text}: {what}")


def _iteration_to_keep(config: Config) -> int:
    iteration, total = read_iteration(config.MODEL.WEIGHTS), derive.total_iterations(config)
    if iteration >= total:
        raise ConfigError(
            f"MODEL.KEEP_ITERATION=true: {config.MODEL.WEIGHTS} is of iteration {iteration}, and the run has {total}. "
            "Raise optim.epochs, or type MODEL.KEEP_ITERATION=false to start at 0."
        )
    return iteration
