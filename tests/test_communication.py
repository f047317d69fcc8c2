"""What a step sends is what `benchmarks/communication.py` says, to the byte and the message."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.communication import Step, collectives
from benchmarks.counters import STEPS, is_measured, measure, tally

pytestmark = pytest.mark.usefixtures("one_cache")

CENTERING = {"train__centering": "centering"}
SINKHORN = {"train__centering": "sinkhorn_knopp", "ibot__separate_head": "true", "dino__koleo_distributed": "true"}
PASSES = SINKHORN | {"train__microbatch_size": 1}
KEPT = {"parallelism__reshard_after_forward": "false"}
# Weights of odd sizes, whose padding shows; neither KoLeo nor iBOT, whose mask token then has no gradient.
ODD = {"student__embed_dim": 27, "dino__koleo_loss_weight": 0, "ibot__loss_weight": 0}


def assert_as_said(folder: Path, strategy: str, ranks: int, port: int, changes: dict) -> None:
    config, seen = measure(folder, strategy, ranks, port, changes)
    for step in STEPS:
        said: Counter[tuple[str, int]] = Counter()
        for message in collectives(Step(config, strategy, ranks, element=4, measured=is_measured(step))):
            said[message.kind, message.bytes] += message.times
        for rank in range(ranks):
            assert tally(seen[rank, step]) == said, f"step {step}, rank {rank}"


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("targets", [CENTERING, SINKHORN], ids=["centering", "sinkhorn"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_bytes_of_a_step(strategy: str, targets: dict, micro_batches: int, tmp_path: Path, free_port: int) -> None:
    changes = targets | {"train__microbatch_size": 4 // micro_batches}
    assert_as_said(tmp_path, strategy, 2, free_port, changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [SINKHORN | {"train__microbatch_size": 1}, ODD, KEPT], ids=["passes", "odd", "kept"]
)
@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("fsdp2", 4)])
def test_bytes_of_other_steps(strategy: str, ranks: int, changes: dict, tmp_path: Path, free_port: int) -> None:
    assert_as_said(tmp_path, strategy, ranks, free_port, changes)


@pytest.mark.slow
def test_gradients_in_several_buckets(tmp_path: Path, free_port: int) -> None:
    large = {"dino__head_hidden_dim": 1024, "dino__head_n_prototypes": 80000, "dino__head_bottleneck_dim": 256}
    assert_as_said(tmp_path, "ddp", 2, free_port, large)
