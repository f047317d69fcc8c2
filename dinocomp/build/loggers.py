"""The loggers beside metrics.jsonl, from a configuration."""

import os
from pathlib import Path

from composer.loggers import LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger

from dinocomp.config import Config
from dinocomp.errors import ConfigError


def build_loggers(config: Config, output: Path) -> list[LoggerDestination]:
    """The loggers beside metrics.jsonl; each is on by one key.

    Raises:
        ConfigError: a logger's package is not installed.
    """
    wanted, name = config.loggers, output.resolve().name
    # MLflow's own variable wins; else it would write into the working directory.
    tracking = None if "MLFLOW_TRACKING_URI" in os.environ else (output.resolve() / "mlruns").as_uri()
    makers = {
        "tensorboard": lambda: TensorboardLogger(log_dir=str(output / "tensorboard")),
        "wandb": lambda: WandBLogger(project=wanted.wandb, name=name, init_kwargs={"dir": str(output)}),
        "mlflow": lambda: MLFlowLogger(experiment_name=wanted.mlflow, run_name=name, tracking_uri=tracking),
    }
    loggers = []
    for key, make in makers.items():
        if getattr(wanted, key):
            try:
                loggers.append(make())
            except ImportError as error:
                raise ConfigError(
                    f"loggers.{key} is on, but its package cannot be imported ({error}). "
                    f"Type pip install 'dinocomp[{key}]' (in a checkout: pip install -e '.[{key}]')."
                ) from error
    return loggers
