"""Counts what a running training step really sends: every collective of a process, its bytes, and who asked for it."""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinocomp.callbacks import ApplySchedules
from dinocomp.config import Config, load_config
from dinocomp.method import DINOv2
from dinocomp.method.ema import local
from tests import processes
from tests.helpers import words, yaml_of_nothing
from tests.sharding import shard_on_cpu

STEPS = [3, 4]  # by then DDP has its buckets, FSDP its order
_RUN = {  # of 5 iterations of 8 images, with gauges in every second one, and no checkpoint before the last
    "train__OFFICIAL_EPOCH_LENGTH": 5,
    "optim__epochs": 1,
    "optim__warmup_epochs": 0,
    "loggers__period_iterations": 2,
}

# Each collective that torch has, by the name of its operator -> what it is, and which argument says how large it is:
# a reduction its input, a gathering its output, so that all are the bytes of the whole tensor.
_OPERATORS = {
    "c10d.allreduce_": ("all_reduce", 0),
    "c10d.allreduce_coalesced_": ("all_reduce", 0),
    "c10d.broadcast_": ("broadcast", 0),
    "c10d.allgather_": ("all_gather", 0),
    "c10d._allgather_base_": ("all_gather", 0),
    "c10d.allgather_into_tensor_coalesced_": ("all_gather", 0),
    "c10d.reduce_scatter_": ("reduce_scatter", 1),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d.barrier": ("barrier", None),
    "_c10d_functional.all_reduce": ("all_reduce", 0),
    "_c10d_functional.all_reduce_": ("all_reduce", 0),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", None),  # its result
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional.broadcast": ("broadcast", 0),
}
_NOT_SENT = ("_c10d_functional.wait_tensor", "_c10d_functional._wrap_tensor_autograd")


class CountCollectives(TorchDispatchMode):
    """Notes every collective that this thread starts while it is on, those of C++ (DDP's) among them.

    Attributes:
        seen: (collective, bytes, who asked).
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor takes the operator apart, and what it sends for it comes by here
        result = func(*args, **(kwargs or {}))
        name = str(func.name()).replace("::", ".").removesuffix(".default")
        if name in _OPERATORS:
            kind, place = _OPERATORS[name]
            sized = (result if name.startswith("_c10d_functional") else None) if place is None else args[place]
            tensors = [leaf for leaf in tree_leaves(sized) if isinstance(leaf, torch.Tensor)]
            self.seen.append((kind, sum(t.numel() * t.element_size() for t in tensors), _asker()))
        elif func.namespace in ("c10d", "_c10d_functional") and name not in _NOT_SENT:
            raise NotImplementedError(f"{name} is not among the collectives that are counted")
        return result


def _asker() -> str:
    """The innermost function of dinocomp, else of Composer, else of torch's parallelism, on the stack."""
    frame, found = sys._getframe(2), {}
    while frame:
        path = frame.f_code.co_filename
        for package in ("dinocomp", "composer", "torch/distributed", "torch/nn/parallel"):
            if f"/{package}/" in path and package not in found:
                found[package] = f"{package}/{path.rpartition('/')[2].removesuffix('.py')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return " < ".join(found.values())


def count_steps(steps: list[int], folder: Path, before: Any = None) -> None:
    """Makes this process write what each of these steps (from 1) sends, from a step's start to the next one's.

    Args:
        folder: gets `R-N.json` of rank R and step N, and `R-held.json`: bytes that the rank keeps, see `_held`.
        before: called first.
    """
    if before:
        before()
    original, counting = ApplySchedules.batch_start, CountCollectives()

    def batch_start(self: ApplySchedules, state: Any, logger: Any) -> None:
        step = int(state.timestamp.batch) + 1
        if step - 1 in steps:
            counting.__exit__(None, None, None)
            rank = torch.distributed.get_rank()
            (folder / f"{rank}-{step - 1}.json").write_text(json.dumps(counting.seen))
            (folder / f"{rank}-held.json").write_text(json.dumps(_held(self.model, state.optimizers[0])))
            counting.seen = []
        if step in steps:
            counting.__enter__()
        original(self, state, logger)

    ApplySchedules.batch_start = batch_start


def _held(model: DINOv2, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the tensors that this rank keeps, named as `benchmarks.cost.state_bytes` does."""
    student, teacher = (
        [p for net in model.networks(role).values() for p in net.parameters()] for role in ("student", "teacher")
    )
    averages = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    kept = {
        "student, fp32": student,
        "gradients, fp32": [p.grad for p in student if p.grad is not None],
        "AdamW's averages, fp32": averages,
        "teacher, fp32": teacher,
    }
    return {name: sum(local(t).numel() * t.element_size() for t in tensors) for name, tensors in kept.items()}


@dataclass
class Measured:
    """What `measure` has seen.

    Attributes:
        seen: what was sent, as in `CountCollectives.seen`, by (rank, step).
        held: bytes that each rank keeps, by what they are.
    """

    config: Config
    seen: dict[tuple[int, int], list[tuple[str, int, str]]]
    held: list[dict[str, int]]


def measure(folder: Path, strategy: str, ranks: int, port: int, changes: dict[str, Any]) -> Measured:
    """Trains a tiny network on processes of this machine's CPU.

    Args:
        changes: of the configuration, as in `tests.helpers.words`.
    """
    changes = {"train__batch_size_per_gpu": 8 // ranks, "parallelism__strategy": strategy, **_RUN, **changes}
    arguments = words(folder / "run", **changes)
    started = processes.start_ranks(
        [yaml_of_nothing(folder), *arguments], ranks, port, count_steps, STEPS, folder, shard_on_cpu
    )
    codes = [processes.finish(rank) for rank in started]
    if any(codes):
        raise RuntimeError(f"the processes ended with {codes}")
    seen = {}
    for rank in range(ranks):
        for step in STEPS:
            seen[rank, step] = [tuple(entry) for entry in json.loads((folder / f"{rank}-{step}.json").read_text())]
    held = [json.loads((folder / f"{rank}-held.json").read_text()) for rank in range(ranks)]
    return Measured(load_config(None, arguments).config, seen, held)


def is_measured(step: int) -> bool:
    """Whether gauges and metrics are taken in this step of `measure`."""
    return step % 2 == 0


def tally(seen: list[tuple[str, int, str]]) -> Counter[tuple[str, int]]:
    """How often each (collective, bytes) was sent."""
    return Counter((kind, size) for kind, size, _ in seen)
