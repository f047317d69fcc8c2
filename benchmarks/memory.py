"""What a training step needs, estimated (dinocomp/config/memory.py) and measured. `python -m benchmarks.memory --help`.

Measured are two optimizer steps of the real model on random images: on a GPU by torch's allocator; on a CPU by counting
the bytes of all living tensors at every operator, and for networks too large for that with tensors without memory,
which run every operator's shape and type and nothing else.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.live import LiveMemory
from dinocomp.build.data import mask_settings
from dinocomp.build.model import build_model, count_parameters
from dinocomp.build.optim import build_optimizer
from dinocomp.config import Config, derive, load_config
from dinocomp.config.memory import Memory, estimate
from dinocomp.data import Batch, max_masked_patches, split_batch
from dinocomp.data.crops import CropParameters
from dinocomp.data.device import pack
from dinocomp.data.masks import batch_masks
from dinocomp.method import DINOv2
from dinocomp.method.parts import PatchRows

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Measured:
    """Peaks in bytes of the second step, from its phases."""

    before: int  # weights and the optimizer's averages
    forward: int
    loss: int
    backward: int
    optimizer: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.loss, self.backward, self.optimizer)


def random_batch(config: Config, masks: torch.Tensor, device: str) -> Batch:
    """A batch of noise."""
    images, crops = config.train.batch_size_per_gpu, config.crops
    sides = {
        "global_crops": (2, crops.global_crops_size),
        "local_crops": (crops.local_crops_number, crops.local_crops_size),
    }
    pixels = {
        name: torch.randint(256, (images, number, 3, side, side), dtype=torch.uint8, device=device)
        for name, (number, side) in sides.items()
    }
    if config.performance.device_augment:
        nothing = CropParameters((0, 0, 1, 1), False, (), False, None, False)
        unchanged = torch.tensor(pack(nothing), device=device)  # [P]
        for name, (number, _) in sides.items():
            pixels[name.replace("crops", "colours")] = unchanged.expand(images, number, -1)
    index = torch.arange(images, device=device)
    return Batch(**pixels, masks=masks.to(device), index=index, replaced=torch.full_like(index, -1))


class _Live:
    """Peaks by counting tensors."""

    def __init__(self, model: DINOv2, optimizer: torch.optim.Optimizer) -> None:
        self.memory = LiveMemory([*model.parameters(), *model.buffers()])

    def now(self) -> int:
        return self.memory.now

    def peak_of(self, work: Callable[[], object]) -> tuple[object, int]:
        self.memory.reset_peak()
        done = work()
        return done, self.memory.peak


class _Allocator:
    """Peaks by what torch's allocator on the GPU has handed out."""

    def __init__(self, model: DINOv2, optimizer: torch.optim.Optimizer) -> None:
        self.memory = nullcontext()

    def now(self) -> int:
        return torch.cuda.memory_allocated()

    def peak_of(self, work: Callable[[], object]) -> tuple[object, int]:
        torch.cuda.reset_peak_memory_stats()
        done = work()
        return done, torch.cuda.max_memory_allocated()


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors have no memory, and so no values: the rows of masked patches are as many as there can be."""
    from torch._subclasses import FakeTensorMode

    counted = PatchRows.of

    def of(masks: torch.Tensor, limit: int | None) -> PatchRows:
        index = torch.zeros(masks.numel(), dtype=torch.int64, device=masks.device)[:limit]
        return PatchRows(index, index == 0, index.float())

    PatchRows.of = of
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        PatchRows.of = counted


def measure(config: Config, *, precision: str = "fp32", device: str = "cpu", fake: bool = False) -> Measured:
    """Peaks of a training step of one process.

    Args:
        precision: fp32, bf16 or fp16 (by autocast, as Composer does).
        device: cpu or cuda.
        fake: with tensors without memory (cpu only).
    """
    around: AbstractContextManager = without_memory() if fake else nullcontext()
    images = config.train.batch_size_per_gpu
    masks = torch.from_numpy(batch_masks(mask_settings(config), 0, 0, images, list(range(images))))
    autocast = partial(torch.autocast, device, _TYPES.get(precision), enabled=precision in _TYPES)
    with around:
        model = build_model(config).to(device).train()
        model.teacher_temp, model.momentum = 0.07, 0.99
        optimizer, _ = build_optimizer(config, model)
        meter = (_Allocator if device == "cuda" else _Live)(model, optimizer)
        with meter.memory:
            for _ in range(2):
                found = _step(config, model, optimizer, masks, autocast, meter, device)
    return found


def _step(
    config: Config,
    model: DINOv2,
    optimizer: torch.optim.Optimizer,
    masks: torch.Tensor,
    autocast: Callable[[], AbstractContextManager],
    meter: _Live | _Allocator,
    device: str,
) -> Measured:
    before = meter.now()
    batch = random_batch(config, masks, device)
    peaks = {"forward": 0, "loss": 0, "backward": 0}

    def phase(name: str, work: Callable[[], object]) -> object:
        done, peak = meter.peak_of(work)
        peaks[name] = max(peaks[name], peak)
        return done

    parts = split_batch(batch, derive.micro_batch(config))
    with autocast():
        phase("forward", lambda: model.begin_step(parts))
    for part in parts:
        with autocast():
            outputs = [phase("forward", lambda part=part: model(part))]
        with autocast():
            loss = phase("loss", lambda part=part, outputs=outputs: model.loss(outputs[0], part)["total"])
        outputs.clear()  # as `MicroBatches` does
        phase("backward", (loss / len(parts)).backward)
    _, peaks["optimizer"] = meter.peak_of(optimizer.step)
    model.update_teacher()
    optimizer.zero_grad()
    return Measured(before, **peaks)


CHECKPOINTING = "parallelism.activation_checkpointing="
CASES = [  # (run, words)
    ("quickstart", ()),
    ("vits16", ("train.batch_size_per_gpu=64",)),
    ("vits16", ("train.batch_size_per_gpu=64", "dino.head_n_prototypes=2048")),
    ("vits16", ("train.batch_size_per_gpu=64", "recipes=[swiglu,separate_heads,sinkhorn]", "train.microbatch_size=16")),
    ("vitl16_short", ()),
    ("vitl16_short", (CHECKPOINTING + "selective",)),
    ("vitl16_short", (CHECKPOINTING + "full",)),
    ("vitl16_short", (CHECKPOINTING + "full", "parallelism.activation_checkpointing_every=2")),
    ("vitl16_short", ("train.microbatch_size=16",)),
    ("vitl16_short", (CHECKPOINTING + "full", "train.microbatch_size=16")),
    ("vitg14", ()),
    ("vitg14", (CHECKPOINTING + "selective",)),
    ("vitg14", (CHECKPOINTING + "full",)),
]


def estimated(config: Config, precision: str, *, gpu: bool) -> Memory:
    """The estimate of one process."""
    images = config.train.batch_size_per_gpu
    masked = max_masked_patches(mask_settings(config), images, images // derive.micro_batch(config))
    return estimate(config, count_parameters(config), masked, compute=precision, gpu=gpu)


def main() -> None:
    """Prints a table; on a GPU of what fits there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", help="a path, or the name of a shipped run (default: a list of cases)")
    parser.add_argument("words", nargs="*", help="key=value")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--memory", action="store_true", help="on a CPU, with real tensors (default: without memory)")
    arguments = parser.parse_args()
    cases = [(arguments.run, arguments.words)] if arguments.run else CASES
    gpu = arguments.device == "cuda"
    print("| run | precision | estimated GB | measured GB | estimated / measured |\n|---|---|---|---|---|")
    for run, words in cases:
        config = load_config(run, list(words)).config
        for precision in arguments.precision:
            guess = estimated(config, precision, gpu=gpu)
            tensors = guess.total - guess.allowance
            if gpu and guess.total > torch.cuda.get_device_properties(0).total_memory:
                continue
            found = measure(config, precision=precision, device=arguments.device, fake=not (gpu or arguments.memory))
            print(
                f"| {' '.join([run, *words])} | {precision} | {tensors / 1e9:.2f} | {found.peak / 1e9:.2f} "
                f"| {tensors / found.peak:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
