"""What can be known, and refused, before images are read or files written."""

import importlib.util
import os
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from composer.utils import dist, get_device

from dinocomp.build.model import backbone_arguments, build_networks
from dinocomp.config import Config, derive, load_config
from dinocomp.config.keys import walk
from dinocomp.data import check_images
from dinocomp.errors import ConfigError, WeightsError
from dinocomp.hints import missing, obstacle
from dinocomp.interop import load_backbone, load_run
from dinocomp.models.attention import xformers_available
from dinocomp.resume import find_checkpoint

_OF_A_RUN = ("train.log", "checkpoints")  # what every run writes first, and what is worth going on from
_BESIDE = (".yaml", ".yml", ".sh", ".txt", ".md", ".log", ".out", ".err")  # what people put beside a run


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
        ConfigError: GPUs are asked for and there are none, or there are fewer than processes.
    """
    available = torch.cuda.is_available()
    if config.train.device == "gpu" and not available:
        raise ConfigError(
            "train.device=gpu, but torch sees no CUDA device on this machine. Type train.device=cpu to train on the "
            "CPU, or mend the driver (see `nvidia-smi`) or install a CUDA build of torch (see torch.version.cuda)."
        )
    gpu = available and config.train.device != "cpu"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpu and processes > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(
            f"{processes} processes were started on this machine, and torch sees {count} GPU(s); each needs one. "
            f"Type composer -n {count}, or train.device=cpu (CUDA_VISIBLE_DEVICES may hide some)."
        )
    return gpu


def join_processes(gpu: bool, timeout_seconds: float = 1800) -> None:
    """Connects the processes that the launcher started.

    Raises:
        ConfigError: the port is taken, the others cannot be reached, or the launcher's variables are incomplete.
    """
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    # A rank that waits for rank 0 does not come back to Python, where Composer's handler of SIGTERM would run: when
    # another rank has failed, the launcher would wait 30 s for it. Nothing has been begun, so it may simply die.
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        dist.initialize_dist(get_device("gpu" if gpu else "cpu"), timeout=timeout_seconds)
    except (torch.distributed.DistError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason or "address already in use" in reason:
            raise ConfigError(
                f"the port of {place} is in use, perhaps by another run. Leave --master_port out, and composer takes a "
                "free one; or type another one (the same on every machine)."
            ) from error
        if isinstance(error, ValueError):
            raise ConfigError(
                f"the processes cannot find each other: {reason}. Start with composer, which sets this: "
                "composer -n PROCESSES dinocomp/train.py ..."
            ) from error
        raise ConfigError(
            f"the processes cannot reach each other at {place}: {reason}. Check that the command runs on every machine "
            "with the same --master_addr and --master_port, and that a firewall lets them through; then start again."
        ) from error
    finally:
        signal.signal(signal.SIGTERM, handler)


def check_start(config: Config) -> Start:
    """Everything that can be refused before images are converted or files written. The process group must be up.

    What is known at once comes first, reading weights and listing images last.

    Raises:
        DinocompError: the machine, the output folder, the images or a file of weights do not go with the configuration.
    """
    gpu, output = on_gpu(config), Path(config.train.output_dir).expanduser()
    precision = derive.precision(config, gpu)
    _check_attention(config, gpu)
    _check_loggers(config)
    _check_output(output, config.train.dataset_path)
    checkpoint = find_checkpoint(output / "checkpoints", config.checkpoint.resume)
    changed: list[str] = []
    if checkpoint is None:
        _check_weights(config)
    elif (output / "config.yaml").is_file():
        earlier = load_config(str(output / "config.yaml")).config
        changed = differences(earlier, config)
        if any(describe(earlier) != describe(config) for describe in (backbone_arguments, derive.head_sizes)):
            networks = [line for line in changed if line.startswith(("student.", "dino.", "ibot.", "crops."))]
            raise ConfigError(
                f"{checkpoint} holds other networks: {'; '.join(networks)}. "
                f"Give another train.output_dir, or the settings of {output / 'config.yaml'}."
            )
    count = check_images(
        config.train.dataset_path,
        config.evaluation.train_dataset_path,
        config.evaluation.val_dataset_path,
        config.data.cache_dir,
    )
    if count is not None:
        check_enough(config, count)
    return Start(gpu, precision, output, checkpoint, tuple(changed))


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


def _check_attention(config: Config, gpu: bool) -> None:
    if config.performance.attention != "xformers" or (gpu and xformers_available()):
        return
    why = "xformers cannot be imported" if gpu else "there is no GPU, and xformers has no kernels for a CPU"
    raise ConfigError(f"performance.attention=xformers: {why}. Type performance.attention=sdpa (or auto).")


def _check_loggers(config: Config) -> None:
    for key in ("tensorboard", "wandb", "mlflow"):
        if getattr(config.loggers, key) and importlib.util.find_spec(key) is None:
            raise ConfigError(
                f"loggers.{key} is on, but the package {key} is not installed. Type pip install 'dinocomp[{key}]' "
                f"(in a checkout: pip install -e '.[{key}]'), or leave loggers.{key} out."
            )
    if config.loggers.wandb and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.api.api_key:
            raise ConfigError(
                f"loggers.wandb={config.loggers.wandb}, but there is no key to log in with. Type `wandb login` once, "
                "set WANDB_API_KEY, or set WANDB_MODE=offline to keep the records here."
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
    if path.is_file():
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


def differences(earlier: Config, now: Config) -> list[str]:
    """ "KEY was A, is B" for every key whose value differs, but for the output folder."""
    before = {spec.name: spec.default for spec in walk(earlier)}
    return [
        f"{spec.name} was {before[spec.name]}, is {spec.default}"
        for spec in walk(now)
        if before[spec.name] != spec.default and spec.name != "train.output_dir"
    ]
