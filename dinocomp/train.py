"""The entry: ``composer dinocomp/train.py yamls/vits16.yaml [recipes=[a,b]] [key=value ...]``.

Without a checkout: ``composer -m dinocomp.train vits16 ...``. Exit status 0: the run is finished; 2: the command or the
data are wrong, and the message says what to change (``--debug`` adds the traceback).
"""

import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinocomp.build import Run


def main(arguments: Sequence[str]) -> int:
    """Trains as the command line says. Returns the exit status."""
    # Imported here, for `python dinocomp/train.py` must first make way for other packages' names (see the end).
    from dinocomp.errors import DinocompError

    if {"-h", "--help"} & set(arguments):
        from dinocomp.config.overrides import HELP

        print(HELP)
        return 0
    try:
        train([word for word in arguments if word != "--debug"])
    except DinocompError as error:
        logging.getLogger("dinocomp").debug("error: %s", error)  # to train.log, where there is one
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        _stop_log()
    return 0


def train(arguments: Sequence[str]) -> None:
    """Reads the configuration, builds the run, trains it to its end and says what came of it.

    Raises:
        DinocompError: what is wrong and what to type instead.
    """
    from dinocomp.config import load_config, split_arguments, to_yaml
    from dinocomp.errors import ConfigError

    loaded = load_config(*split_arguments(arguments))  # before the slow imports, so that a slip shows at once
    config = loaded.config

    from composer.utils import dist

    from dinocomp.build import build_run, check_start, join_processes, on_gpu

    gpu = on_gpu(config)
    if not gpu:
        _share_cores()
    join_processes(gpu)
    start = check_start(config)
    log = logging.getLogger("dinocomp")
    try:
        start.output.mkdir(parents=True, exist_ok=True)
        if dist.get_global_rank() == 0:
            _start_log(start.output)
    except OSError as error:
        raise ConfigError(f"train.output_dir={start.output} cannot be written to: {error}; give another one") from error
    for notice in loaded.notices:
        log.info("note: %s", notice)

    run = build_run(config, start)
    finished = int(run.trainer.state.timestamp.batch)
    if start.checkpoint:
        log.info("resuming from %s", start.checkpoint)
        if config.MODEL.WEIGHTS or config.student.pretrained_weights:
            log.info("note: weights to start from are not read again; a new train.output_dir starts from them")
        for line in start.changed:
            log.info("note: %s", line)
    if finished < run.iterations and dist.get_global_rank() == 0:
        path = start.output / "config.yaml"
        made_of = f"Made by: composer dinocomp/train.py {' '.join(arguments)}\nThis file alone reproduces the run."
        if start.changed:
            until = start.output / f"config-until-{finished:08d}.yaml"
            if not until.exists():  # else an earlier try from here has put it there, and got no further
                path.rename(until)
            made_of += f"\nUp to iteration {finished} it was another: {until.name}"
        path.write_text(to_yaml(config, header=made_of))
    if finished >= run.iterations:
        log.info("this run is finished: %d of %d iterations", run.iterations, run.iterations)
        run.evaluation.fit_end(run.trainer.state, run.trainer.logger)  # a run may have been killed in between
    else:
        log.info(
            "training: %d iterations of %d images on %d %s; output in %s",
            run.iterations,
            config.train.batch_size_per_gpu * dist.get_world_size(),
            dist.get_world_size(),
            "GPU(s)" if gpu else "CPU process(es)",
            start.output,
        )
        run.trainer.fit()
    run.trainer.close()
    if dist.get_global_rank() == 0:
        for line in summary(run):
            log.info("%s", line)


def summary(run: "Run") -> list[str]:
    """What a finished run leaves, and what its features are worth, in words."""
    lines = [f"teacher: {run.start.output / 'teacher.safetensors'}"]
    accuracy, pair = run.evaluation.accuracy, run.evaluation.pair
    if pair:
        first, last = min(accuracy), max(accuracy)
        k = next(iter(accuracy[last]))
        line = f"k-NN accuracy on {len(pair.val)} held-out images (k={k}): "
        if first == 0 and last > 0:
            line += f"{accuracy[first][k]:.1%} before training, {accuracy[last][k]:.1%} after"
        else:
            line += f"{accuracy[last][k]:.1%} after {last} iterations"
        lines.append(line)
    else:
        lines.append(
            "not evaluated: there is no labelled pair of images; give one as evaluation.train_dataset_path and "
            "evaluation.val_dataset_path"
        )
    return lines


def _share_cores() -> None:
    """Gives each of several CPU processes its share of the cores; the launcher leaves them all with all of them."""
    import torch

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


class _Terminal(logging.StreamHandler):
    """Clears the moving progress line before a message."""

    def format(self, record: logging.LogRecord) -> str:
        clear = "\r\x1b[2K" if self.stream.isatty() else ""
        return clear + super().format(record)


def _stop_log() -> None:
    log = logging.getLogger("dinocomp")
    for handler in log.handlers[:]:
        handler.close()
        log.removeHandler(handler)


def _start_log(output: Path) -> None:
    """Messages to the terminal; those, every progress line and the versions to train.log."""
    import composer
    import torch

    from dinocomp import __version__

    to_file = logging.FileHandler(output / "train.log")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    to_terminal = _Terminal(sys.stdout)
    to_terminal.setLevel(logging.INFO)
    log = logging.getLogger("dinocomp")
    log.setLevel(logging.DEBUG)
    log.handlers[:] = [to_file, to_terminal]
    log.debug(
        "dinocomp %s, python %s, torch %s, composer %s, %s",
        __version__,
        platform.python_version(),
        torch.__version__,
        composer.__version__,
        platform.platform(),
    )


if __name__ == "__main__":
    # Of a script, Python puts the folder first on its search path. There, our `data` or `evaluate` would hide other
    # packages of those names; one folder up is what a checkout needs.
    here = Path(__file__).resolve().parent
    if Path(sys.path[0]).resolve() == here:
        sys.path[0] = str(here.parent)
    sys.exit(main(sys.argv[1:]))
