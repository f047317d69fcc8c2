"""The entry: ``composer dinocomp/train.py yamls/vits16.yaml [recipes=[a,b]] [key=value ...]``.

Without a checkout: ``composer -m dinocomp.train vits16 ...``. Exit status:

- 0: the run is finished.
- 2: the command or the data are wrong; the message says what to change.
- 3: training could not go on (its numbers, the disk, the object store); the message says what to try.
- 75: a signal has stopped it (SIGTERM, SIGINT, SIGUSR1), with a checkpoint; the same command goes on.
- 1: an error that nobody has foreseen, with its traceback. ``--debug`` adds one to the others, too.
"""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinocomp.build import Run, Start
    from dinocomp.config import LoadedConfig

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
_GRACE = 20  # seconds after a signal: the launcher ends everything after 30


def main(arguments: Sequence[str]) -> int:
    """Trains as the command line says. Returns the exit status."""
    # Imported here, for `python dinocomp/train.py` must first make way for other packages' names (see the end).
    from dinocomp.errors import DinocompError, TrainingError

    if {"-h", "--help"} & set(arguments):
        from dinocomp.config.overrides import HELP

        print(HELP)
        return 0
    try:
        return train([word for word in arguments if word != "--debug"])
    except DinocompError as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, TrainingError) else 2


def train(arguments: Sequence[str]) -> int:
    """Reads the configuration, builds the run, trains it to its end and says what came of it.

    Returns:
        0 where the run is finished, 75 where a signal has stopped it.

    Raises:
        DinocompError: what is wrong and what to type instead.
    """
    from dinocomp.config import load_config, split_arguments

    yaml, words = split_arguments(arguments)
    loaded = load_config(yaml, words)  # before the slow imports, so that a slip shows at once

    from composer.utils import dist

    from dinocomp.build import build_run, check_start, join_processes, known_facts, on_gpu
    from dinocomp.checkpoints.folder import list_checkpoints
    from dinocomp.errors import ConfigError
    from dinocomp.output import keep_config, open_output

    gpu = on_gpu(loaded.config)
    if not gpu:
        _share_cores()
    join_processes(gpu)
    found = None
    if loaded.chosen:
        facts, found = known_facts(loaded.config)
        loaded = load_config(yaml, words, facts)
    start = check_start(loaded.config, found)
    first = dist.get_global_rank() == 0
    if not first:
        logging.getLogger("dinocomp").addHandler(logging.NullHandler())  # rank 0 speaks for all
    with open_output(start.output) if first else nullcontext():
        if first and tuple(list_checkpoints(start.output / "checkpoints")) != start.seen:
            raise ConfigError(f"another run was at work in {start.output} just now. Give the same command again.")
        _say_start(loaded, start)
        made_of = f"composer dinocomp/train.py {' '.join(arguments)}"
        run = build_run(loaded.config, start, made_of)
        if first and start.iteration < run.iterations:
            keep_config(
                start.output,
                loaded.config,
                made_of=made_of,
                chosen=[str(choice) for choice in loaded.chosen],
                changed_at=start.iteration if start.changed else None,
            )
        try:
            return _train(run)
        except BaseException as error:
            run.callbacks.report.fail(error, int(run.trainer.state.timestamp.batch))
            raise


def _say_start(loaded: "LoadedConfig", start: "Start") -> None:
    from dinocomp.config.derive import total_iterations

    log = logging.getLogger("dinocomp")
    config = loaded.config
    for notice in loaded.notices:
        log.info("note: %s", notice)
    for choice in loaded.chosen:
        log.info("auto: %s", choice)
    for line in start.passed_over:
        log.warning("%s", line)
    if config.teacher.distil_from:
        log.info("distilling from the frozen teacher %s (%s…)", config.teacher.distil_from, start.distilled_from[:12])
    if start.checkpoint:
        log.info("resuming from %s", start.checkpoint)
        if config.MODEL.WEIGHTS or config.student.pretrained_weights:
            log.info("note: weights to start from are not read again; a new train.output_dir starts from them")
    elif config.MODEL.WEIGHTS:
        log.info("starting at iteration %d from the weights in %s", start.iteration, config.MODEL.WEIGHTS)
    elif config.student.pretrained_weights:
        log.info("starting from the backbone in %s", config.student.pretrained_weights)
    if start.iteration >= total_iterations(config):
        return  # nothing is trained, with whatever settings
    for line in (*start.notes, *start.changed):
        log.info("note: %s", line)


def _train(run: "Run") -> int:
    import torch
    from composer.utils import dist

    from dinocomp.errors import DataError, TrainingError

    log, start = logging.getLogger("dinocomp"), run.start
    missing = None
    try:
        if start.iteration >= run.iterations:
            log.info(
                "this run is finished: %d of %d iterations (optim.epochs=%d)",
                start.iteration,
                run.iterations,
                run.config.optim.epochs,
            )
            # The process that finished it may have been killed before it was done with these.
            run.callbacks.checkpoints.fit_start(run.trainer.state, run.trainer.logger)
            run.callbacks.evaluation.fit_end(run.trainer.state, run.trainer.logger)
            run.callbacks.report.fit_end(run.trainer.state, run.trainer.logger)
        else:
            log.info(
                "training: %d iterations of %d images on %d %s%s; output in %s",
                run.iterations,
                run.config.train.batch_size_per_gpu * dist.get_world_size(),
                dist.get_world_size(),
                "GPU(s)" if start.gpu else "CPU process(es)",
                f" ({start.strategy})" if dist.get_world_size() > 1 else "",
                start.output,
            )
            run.trainer.fit()
        run.trainer.close()
        missing = _finish_copies(run)
    except DataError as error:  # the command was right
        raise TrainingError(str(error)) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError(_out_of_memory(run, error)) from error
    except RuntimeError as error:
        if "internal microbatch of size 1" not in str(error):
            raise
        raise TrainingError(_out_of_memory(run, error)) from error  # the end of Composer's search
    finally:
        if missing is None and run.callbacks.checkpoints.copies:  # an error; perhaps on this rank alone
            for line in run.callbacks.checkpoints.copies.finish(_GRACE):
                log.warning("not copied to %s yet: %s; the next start does it", start.remote.address, line)
        run.callbacks.stop.restore()
    told_to_stop = run.callbacks.stop.received is not None
    if missing and told_to_stop:
        log.warning("not copied to %s yet: %s", start.remote.address, "; ".join(missing))
    if run.callbacks.stop.requested or (missing and told_to_stop):
        finished = int(run.trainer.state.timestamp.batch)
        log.info("stopped at iteration %d of %d; the same command goes on", finished, run.iterations)
        return STOPPED
    if missing:
        raise TrainingError(
            f"the run is finished, but not all of it was copied to {start.remote.address}: {'; '.join(missing)}. "
            f"It is whole in {start.output}; give the same command again to copy the rest."
        )
    for line in summary(run):
        log.info("%s", line)
    return 0


def _out_of_memory(run: "Run", error: BaseException) -> str:
    from dinocomp.config.derive import micro_batch

    batch, images = run.config.train.batch_size_per_gpu, micro_batch(run.config)
    smaller = max((size for size in range(1, images // 2 + 1) if batch % size == 0), default=1)
    return (
        f"out of memory with {images} images at a time on each process: type train.microbatch_size={smaller} (the "
        "mathematics stay those of the batch), recipes=[activation_checkpointing] or recipes=[low_memory], "
        "parallelism.strategy=fsdp2 on several GPUs, recipes=[bf16] on a GPU, or fewer train.num_workers where it is "
        f"the machine's own memory; then give the same command again ({error})"
    )


def _finish_copies(run: "Run") -> list[str]:
    """Waits, on all ranks, for what is still being copied to the object store; gives what did not get there."""
    from composer.utils import dist

    from dinocomp.distributed import any_rank

    copies, stop = run.callbacks.checkpoints.copies, run.callbacks.stop
    missing = []
    if copies:
        seconds = run.config.checkpoint.remote_wait_seconds
        if copies.pending:
            logging.getLogger("dinocomp").info(
                "waiting up to %d s (checkpoint.remote_wait_seconds) for copies to %s: %s",
                *(seconds, run.start.remote.address, ", ".join(copies.pending)),
            )
        # A rank that ended earlier would have the launcher end all of them: the others are told to wait.
        missing = copies.finish(seconds, go_on=lambda: any_rank(True) and not stop.is_over(_GRACE))
        any_rank(False)
    elif dist.get_world_size() > 1:
        while any_rank(False):
            pass
    return missing


def summary(run: "Run") -> list[str]:
    """What a finished run leaves, and what its features are worth, in words."""
    from dinocomp.evaluate.label_free import label_free_words
    from dinocomp.evaluate.online import pixels_of

    lines = [f"teacher: {run.start.output / 'teacher.safetensors'}"]
    evaluation = run.callbacks.evaluation
    found = [evaluation.found[i] for i in sorted(evaluation.found)]
    accuracy = {evaluated.iteration: evaluated for evaluated in found if evaluated.knn}
    if accuracy:
        first, last = min(accuracy), max(accuracy)
        k = next(iter(accuracy[last].knn))
        line = f"k-NN accuracy on {len(evaluation.measures.pair.val)} held-out images (k={k}): "
        if first == 0 and last > 0:
            line += f"{accuracy[first].score:.1%} before training, {accuracy[last].score:.1%} after"
        else:
            line += f"{accuracy[last].score:.1%} after {last} iterations"
        best = max(accuracy.values(), key=lambda evaluated: evaluated.score)
        if best.score > accuracy[last].score:
            line += f"; best {best.score:.1%} at iteration {best.iteration} (best_teacher.safetensors)"
        if (pixels := pixels_of(evaluation.found, k)) is not None:
            line += f"; raw pixels {pixels:.1%}"
        lines.append(line)
    elif found and found[-1].label_free:
        shown = label_free_words(found[-1].label_free, evaluation.measures.directions)
        lines.append(
            f"without labels: {shown}. For an accuracy give a labelled pair of images as "
            "evaluation.train_dataset_path and evaluation.val_dataset_path"
        )
    else:
        lines.append(
            "not evaluated: there is no labelled pair of images (evaluation.train_dataset_path and "
            "evaluation.val_dataset_path), and evaluation.label_free is never"
        )
    return lines


def _share_cores() -> None:
    """Gives each of several CPU processes its share of the cores; the launcher leaves them all with all of them."""
    import torch

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


if __name__ == "__main__":
    # Of a script, Python puts the folder first on its search path. There, our `data` or `evaluate` would hide other
    # packages of those names; one folder up is what a checkout needs.
    here = Path(__file__).resolve().parent
    if Path(sys.path[0]).resolve() == here:
        sys.path[0] = str(here.parent)
    sys.exit(main(sys.argv[1:]))
