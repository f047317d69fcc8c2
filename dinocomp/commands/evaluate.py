"""`dinocomp evaluate`: what frozen weights are worth."""

import argparse
import logging
import os
import re
from pathlib import Path

from dinocomp.commands.types import above_zero, fraction, positive, positives, whole
from dinocomp.errors import ConfigError

TEXT = "measure frozen weights: k-NN, linear probe, logistic regression, retrieval, segmentation"
_DAY = 86400  # seconds that a rank may wait for another one's logistic regression


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a run's folder, a teacher or DINOv2 file, a checkpoint, a Hugging Face folder, timm:NAME, hf:NAME",
    )
    parser.add_argument("--train", metavar="PATH", help="labelled images to fit to (default: the run's)")
    parser.add_argument(
        "--val", metavar="PATH", help="labelled images to score (default: the run's, or those of --train)"
    )
    parser.add_argument(
        "--protocols",
        type=_protocols,
        metavar="A,B",
        help="knn,linear,logreg,retrieval,segmentation (default: all that can)",
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the results (default: RUN/evaluate)")
    parser.add_argument("--cache-dir", default="", metavar="DIR", help="folder for converted images, as data.cache_dir")

    seen = parser.add_argument_group("how images are seen")
    seen.add_argument("--resize", type=positive, metavar="PX", help="shorter side (default: what the weights expect)")
    seen.add_argument("--crop", type=positive, metavar="PX", help="side of the centre crop (default: the same)")
    seen.add_argument("--limit-train", type=whole, default=0, metavar="N", help="a fixed draw of so many (0 = all)")
    seen.add_argument("--limit-val", type=whole, default=0, metavar="N", help="a fixed draw of so many (0 = all)")
    seen.add_argument("--batch-size", type=positive, default=256, metavar="N", help="images of a forward pass (256)")
    seen.add_argument("--workers", type=whole, metavar="N", help="data workers of a process (default: its cores, to 8)")
    seen.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: a GPU if there is one")
    seen.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: bf16 on GPUs, else fp32"
    )
    seen.add_argument("--keep-features", action="store_true", help="keep class tokens on the disk, for the next time")

    knn = parser.add_argument_group("k-NN")
    knn.add_argument("--k", type=positives, metavar="K,K", help="neighbours that vote (10,20,100,200)")
    knn.add_argument("--temperature", type=above_zero, default=0.07, metavar="T", help="of the votes (0.07)")
    knn.add_argument("--shots", type=positives, default=(), metavar="N,N", help="also with N images of each class")
    knn.add_argument("--tries", type=positive, default=5, metavar="N", help="draws of those (5)")

    linear = parser.add_argument_group("linear probe")
    linear.add_argument("--linear-epochs", type=positive, default=10, metavar="N", help="passes over train (10)")
    linear.add_argument("--linear-iterations", type=positive, metavar="N", help="instead of that")
    linear.add_argument(
        "--linear-batch", type=positive, metavar="N", help="images of all processes (1024; few images: less)"
    )
    linear.add_argument("--linear-rates", type=_rates, metavar="R,R", help="learning rates, for a batch of 256")
    linear.add_argument("--linear-blocks", type=positives, metavar="N,N", help="last blocks that heads see (1,4)")
    linear.add_argument(
        "--linear-views",
        choices=("random", "centre"),
        default="random",
        help="train on random crops, or on the view that is scored: faster, and for small networks better",
    )
    linear.add_argument(
        "--linear-crop-scale", type=_share, default=0.08, metavar="F", help="smallest crop's area (0.08)"
    )
    linear.add_argument(
        "--linear-flip", type=_chance, metavar="P", help="probability of mirroring (default: the run's, or 0.5)"
    )
    linear.add_argument(
        "--linear-save-iterations", type=positive, default=250, metavar="N", help="between states (250)"
    )
    linear.add_argument(
        "--select-on",
        choices=("train", "val"),
        default="train",
        help="choose a head on 10%% of train, held out; or on val, as the reference does, which is optimistic",
    )

    logreg = parser.add_argument_group("logistic regression")
    logreg.add_argument(
        "--c-values", type=positive, default=12, metavar="N", help="from 1e-6 to 1e5 (12; reference: 45)"
    )
    logreg.add_argument("--logreg-iterations", type=positive, default=1000, metavar="N", help="at most, a fit (1000)")

    masks = parser.add_argument_group("segmentation")
    masks.add_argument("--segmentation-train", metavar="IMAGES:MASKS", help="two folders, masks named like images")
    masks.add_argument("--segmentation-val", metavar="IMAGES:MASKS", help="the same, to score")
    masks.add_argument("--segmentation-iterations", type=positive, default=2000, metavar="N", help="steps (2000)")
    masks.add_argument("--segmentation-batch", type=positive, default=16, metavar="N", help="images of a step (16)")
    masks.add_argument("--segmentation-rate", type=above_zero, default=1e-3, metavar="R", help="learning rate (1e-3)")

    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of held-out parts, first weights and crops")


def run(arguments: argparse.Namespace) -> None:
    import torch
    from composer.utils import dist

    from dinocomp.build.machine import join_processes
    from dinocomp.commands.evaluate_plan import make_plan
    from dinocomp.evaluate.results import table
    from dinocomp.evaluate.run import Evaluation

    gpu = _on_gpu(arguments.device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if not gpu and processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if processes > 1:
        join_processes(gpu, timeout_seconds=_DAY)
    first = dist.get_global_rank() == 0
    if not first:
        logging.getLogger("dinocomp").addHandler(logging.NullHandler())  # rank 0 speaks for all

    def say(line: str) -> None:
        if first:
            print(line, flush=True)

    backbone, plan = make_plan(arguments, gpu, say)
    folder = output_folder(arguments)
    say(f"{', '.join(plan.protocols)} of {plan.weights}; results in {folder}")
    content = Evaluation(backbone, plan, folder, say).run()
    say("\n" + table(content) + f"\n\n{folder / 'results.json'}")
    if processes > 1:
        dist.barrier()  # a rank that ended earlier would have the launcher end all of them


def output_folder(arguments: argparse.Namespace) -> Path:
    """`--output`; else RUN/evaluate, RUN/evaluate-NAME for its other weights, or evaluate-NAME beside them, or here."""
    from dinocomp.checkpoints.folder import STATE, TEACHER
    from dinocomp.commands.evaluate_plan import run_of

    if arguments.output:
        return Path(arguments.output).expanduser()
    path, run = Path(arguments.weights).expanduser(), run_of(arguments.weights)
    if not path.exists():
        return Path(f"evaluate-{re.sub(r'[^a-zA-Z0-9_.-]+', '-', arguments.weights)}")
    if run is not None and path.absolute() in (run.absolute(), run.absolute() / "teacher.safetensors"):
        return run / "evaluate"
    # A checkpoint's folder is not written to; all teachers of a run have the same name, and so have its checkpoints.
    name = path.stem
    if path.is_dir() or (run and path.name in (TEACHER, STATE)):
        name = path.absolute().name if path.is_dir() else path.absolute().parent.name
    return (run or path.parent) / f"evaluate-{name}"


def _on_gpu(device: str) -> bool:
    import torch

    available = torch.cuda.is_available()
    if device == "gpu" and not available:
        raise ConfigError("--device gpu, but torch sees no CUDA device on this machine; type --device cpu")
    gpu = available and device != "cpu"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpu and processes > torch.cuda.device_count():
        raise ConfigError(
            f"{processes} processes were started on this machine, which has {torch.cuda.device_count()} GPU(s); type "
            f"composer -n {torch.cuda.device_count()}, or --device cpu"
        )
    return gpu


def _protocols(text: str) -> tuple[str, ...]:
    from dinocomp.evaluate.plan import PROTOCOLS  # takes seconds, so not for --help
    from dinocomp.hints import did_you_mean

    names = tuple(text.split(","))
    for name in names:
        if name not in PROTOCOLS:
            hint = did_you_mean(name, PROTOCOLS)
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PROTOCOLS)}.{hint}")
    return names


def _rates(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(above_zero(part) for part in text.split(",")))


def _share(text: str) -> float:
    value = above_zero(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from above 0 to 1")
    return value


def _chance(text: str) -> float:
    return 1.0 if text in ("1", "1.0") else fraction(text)
