"""The machine that a run is started on: its GPUs, its processes, its packages."""

import importlib.util
import os
import signal

import torch
from composer.utils import dist, get_device

from dinocomp.config import Config
from dinocomp.errors import ConfigError
from dinocomp.models.attention import varlen_available, xformers_available


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


def check_attention(config: Config, gpu: bool) -> None:
    """Refuses a kernel that is not there.

    Raises:
        ConfigError: xformers or varlen is asked for, without a GPU or not installed.
    """
    kernel = config.performance.attention
    there = {"xformers": xformers_available, "varlen": varlen_available}.get(kernel)
    if there is None or (gpu and there()):
        return
    why = f"there is no GPU, and {kernel} has no kernels for a CPU"
    if gpu:
        absent = {"xformers": "xformers cannot be imported", "varlen": f"torch {torch.__version__} is too old for it"}
        why = absent[kernel]
    raise ConfigError(f"performance.attention={kernel}: {why}. Type performance.attention=sdpa (or auto).")


def check_loggers(config: Config) -> None:
    """Refuses loggers that could not log.

    Raises:
        ConfigError: a package or a key to log in with is missing.
    """
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
