"""What values given as `auto` are chosen by, found out before anything is built."""

import re
from pathlib import Path

from composer.utils import dist

from dinocomp.build.data import opening
from dinocomp.build.start import open_remote
from dinocomp.checkpoints.find import Found, find_checkpoint
from dinocomp.checkpoints.folder import list_checkpoints
from dinocomp.config import Config, load_config
from dinocomp.config.auto import Facts
from dinocomp.config.keys import walk
from dinocomp.data import check_images, survey_images
from dinocomp.distributed import on_rank_0
from dinocomp.errors import DataError
from dinocomp.output import CONFIG

_REASON = re.compile(r"^# auto: (\S+?)=\S+: (.*)$", re.MULTILINE)


def known_facts(config: Config) -> tuple[Facts, Found]:
    """The facts, the same on every rank, and the checkpoint to go on from. All ranks must call it.

    A run that goes on keeps what it has begun with; a new one is told by its images, which rank 0 looks at.

    Raises:
        DinocompError: as `find_checkpoint`; or nothing can be known of the images, and so nothing be chosen.
    """
    found = find_checkpoint(_output(config) / "checkpoints", config.checkpoint.resume, open_remote(config))
    facts = on_rank_0(lambda: (found.checkpoint and _begun(config, dist.get_world_size())) or _of_images(config))
    return facts, found


def facts_of_the_run_here(config: Config, world_size: int) -> Facts | None:
    """What the run in the output folder has begun with; None where none with a checkpoint is there."""
    return _begun(config, world_size) if list_checkpoints(_output(config) / "checkpoints") else None


def _output(config: Config) -> Path:
    return Path(config.train.output_dir).expanduser()


def _begun(config: Config, world_size: int) -> Facts | None:
    """What a run has begun with; None where its configuration was lost."""
    path = _output(config) / CONFIG
    if not path.is_file():
        return None
    settled = {key.name: key.default for key in walk(load_config(str(path)).config)}
    return Facts(world_size=world_size, settled=settled, reasons=dict(_REASON.findall(path.read_text())))


def _of_images(config: Config) -> Facts:
    train, evaluation = config.train, config.evaluation
    check_images(train.dataset_path, evaluation.train_dataset_path, evaluation.val_dataset_path, config.data.cache_dir)
    try:
        found = survey_images(train.dataset_path, **opening(config))
    except DataError as error:
        raise DataError(f"train.dataset_path={train.dataset_path}: {error}") from error
    return Facts(found.images, found.side, dist.get_world_size())
