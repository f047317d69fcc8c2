"""Speed of whole training steps: Composer's Trainer with all that a run has around it, on one process.

    python -m benchmarks.step vitl16_short performance.precision=bf16 --json step.json

Takes a run, recipes and key=value words as training does. Nothing is evaluated, saved or sent to loggers; weights are
random, for speed does not depend on them. Batches are noise that lies on the device already, or with --real what
train.dataset_path names, through the run's loader.
"""

import argparse
import contextlib
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from composer import Callback, Logger, State
from composer.utils import dist, reproducibility
from torch.utils.data import DataLoader

from benchmarks.flops import count_flops
from benchmarks.kernels import ProfileStep
from benchmarks.memory import random_batch
from benchmarks.phases import time_phases
from benchmarks.record import write
from benchmarks.step_report import Steps, row, table
from dinocomp.build import Run, Start, build_loader, build_model, build_training, join_processes, mask_settings, on_gpu
from dinocomp.build.compile import check_compiler
from dinocomp.build.data import training_images
from dinocomp.build.machine import check_attention
from dinocomp.build.start import check_enough
from dinocomp.config import Config, derive, load_config
from dinocomp.data import batch_masks
from dinocomp.errors import ConfigError, DinocompError, TrainingError

# Operations a second, dense bf16, by the device's name.
PEAKS = {"NVIDIA H100 80GB HBM3": 798e12}  # the SXM card, measured on large products; NVIDIA's figure is 989e12


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        iterations: that are measured.
        warm_up: iterations before them, in which kernels are chosen and code is compiled.
        real: on images; else on noise.
        profile: file for a table of what one further step consists of, or None.
    """

    iterations: int = 30
    warm_up: int = 10
    real: bool = False
    profile: Path | None = None


class StopAfter(Callback):
    """Ends training after so many iterations."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self.iterations:
            state.stop_training()


def for_measuring(config: Config, output: Path) -> Config:
    """The same steps, with nothing between them and nothing left behind but in `output`."""
    return replace(
        config,
        train=replace(config.train, output_dir=str(output)),
        evaluation=replace(config.evaluation, eval_period_iterations=0, at_start=False),
        checkpoint=replace(config.checkpoint, save_frequency=config.optim.epochs + 1, remote=""),
        loggers=replace(config.loggers, tensorboard=False, wandb="", mlflow=""),
    )


def synthetic_loader(config: Config, device: str) -> DataLoader:
    """The same batch of noise, which lies on the device, again and again; masks are as in training."""
    images = config.train.batch_size_per_gpu
    masks = torch.from_numpy(batch_masks(mask_settings(config), config.train.seed, 0, images, range(images)))
    batch = random_batch(config, masks, device)
    del batch["replaced"]  # which of the images had to be replaced is looked at on the CPU
    places = range(derive.total_iterations(config) * images)
    return DataLoader(places, batch_size=images, collate_fn=partial(_always, batch))


def _always(batch: dict[str, torch.Tensor], places: list[int]) -> dict[str, torch.Tensor]:
    return batch


def measure(config: Config, settings: Settings, output: Path) -> Steps:
    """Trains for as long as the settings say.

    Args:
        output: a folder for what a run writes.

    Raises:
        ConfigError: the run is too short, of several processes, or does not go with this machine.
        DataError: there are no images where `train.dataset_path` points (with `real`).
        TrainingError: a signal has ended it early, or its numbers are not finite.
    """
    config = for_measuring(config, output)
    last = settings.warm_up + settings.iterations
    wanted = last + (settings.profile is not None)
    if wanted >= derive.total_iterations(config):
        raise ConfigError(
            f"the run has {derive.total_iterations(config)} iterations, too few to measure {wanted} before its last "
            "one. Type optim.epochs=1000, or fewer --iterations and --warm-up"
        )
    gpu = on_gpu(config)
    join_processes(gpu)
    if dist.get_world_size() > 1:
        raise ConfigError(
            f"{dist.get_world_size()} processes were started; a step is measured on one. Type python -m benchmarks.step"
        )
    run = _build(config, output, gpu=gpu, real=settings.real)
    laps = time_phases(run)
    run.trainer.state.callbacks.append(StopAfter(wanted))
    profiler = ProfileStep(wanted, settings.profile, gpu=gpu) if settings.profile else None
    if profiler:
        run.trainer.state.callbacks.append(profiler)
    try:
        run.trainer.fit()
        run.trainer.close()
    finally:
        run.callbacks.stop.restore()
    steps = laps.steps()
    if len(steps) < wanted:
        raise TrainingError(f"stopped after {len(steps)} of {wanted} iterations; nothing is recorded")
    return Steps(
        run.start.precision,
        config.train.batch_size_per_gpu,
        run.trainer.state.device_train_microbatch_size,  # what `auto` has come to
        warm_up=steps[: settings.warm_up],
        measured=steps[settings.warm_up : last],
        memory_bytes=_peak_memory(gpu),
        reserved_bytes=torch.cuda.max_memory_reserved() if gpu else None,
        bad_steps=run.callbacks.bad_steps.count,
        profile=profiler and profiler.found,
    )


def _build(config: Config, output: Path, *, gpu: bool, real: bool) -> Run:
    """As `build_run` does, but for weights, images to evaluate on, and, without `real`, images."""
    check_attention(config, gpu)
    check_compiler(config, gpu)
    start = Start(gpu, derive.precision(config, gpu), "single", output, checkpoint=None)
    reproducibility.seed_all(config.train.seed)
    model = build_model(config, initial_weights=False)
    if real:
        images = training_images(config)
        check_enough(config, len(images))
        loader = build_loader(config, images, pin_memory=gpu)
    else:
        loader = synthetic_loader(config, "cuda" if gpu else "cpu")
    return build_training(config, start, model, loader)


def _peak_memory(gpu: bool) -> int:
    return torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; the run's own lines go to standard error. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a path, or the name of a shipped run")
    parser.add_argument("words", nargs="*", help="recipes=[a,b] and key=value, as in training")
    parser.add_argument("--iterations", type=_positive, default=Settings.iterations, help="measured (%(default)s)")
    parser.add_argument("--warm-up", type=_positive, default=Settings.warm_up, help="before them (%(default)s)")
    parser.add_argument("--real", action="store_true", help="images of train.dataset_path, not noise on the device")
    parser.add_argument(
        "--peak-tflops", type=float, help="the device's peak, for MFU (known: " + ", ".join(PEAKS) + ")"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a table of one more step's kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    given = parser.parse_intermixed_args(arguments)
    settings = Settings(given.iterations, given.warm_up, given.real, given.profile)
    try:
        config = load_config(given.run, given.words).config
        gpu = on_gpu(config)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            steps = measure(config, settings, Path(folder))
    except DinocompError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {config.train.batch_size_per_gpu} images do not fit in memory ({error})", file=sys.stderr)
        return 3
    name = torch.cuda.get_device_name() if gpu else "cpu"
    peak = given.peak_tflops * 1e12 if given.peak_tflops else PEAKS.get(name)
    found = {
        "run": " ".join([given.run, *given.words]),
        "device": name,
        "batches": "images" if given.real else "noise on the device",
        **row(steps, count_flops(config).total, peak),
    }
    if given.json:
        write(given.json, [found])
    print(f"{found['run']}, {found['precision']}, {found['batches']}, {name}\n\n{table(found, gpu=gpu)}")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give a number from 1 on")
    return number


if __name__ == "__main__":
    sys.exit(main())
