"""What a step sends is what `benchmarks/communication.py` says, to the byte and the message."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.communication import FP32, Step, collectives
from benchmarks.cost import operations, state_bytes
from benchmarks.counters import STEPS, is_measured, measure, tally
from dinocomp.build.model import build_networks
from dinocomp.config import Config, load_config
from dinocomp.method import Networks
from dinocomp.models import Rows

from .helpers import words

pytestmark = pytest.mark.usefixtures("one_cache")

CENTERING = {"train__centering": "centering"}
SINKHORN = {"train__centering": "sinkhorn_knopp", "ibot__separate_head": "true", "dino__koleo_distributed": "true"}
PASSES = SINKHORN | {"train__microbatch_size": 1}
ASYNC = {"performance__async_step": "true"}
DEFERRED = ASYNC | {"performance__fused_optimizer": "true"}
KEPT = {"parallelism__reshard_after_forward": "false"}
# Weights of odd sizes, whose padding shows; neither KoLeo nor iBOT, whose mask token then has no gradient.
UNTRAINED = {"gradients, fp32": 1, "AdamW's averages, fp32": 2}  # numbers of each weight that it then does not have
SWIGLU = ["student.ffn_layer=swiglu", "ibot.separate_head=true"]
ODD = {"student__embed_dim": 27, "dino__koleo_loss_weight": 0, "ibot__loss_weight": 0}


def messages(config: Config, strategy: str, ranks: int, step: int) -> Counter[tuple[str, int]]:
    said: Counter[tuple[str, int]] = Counter()
    for message in collectives(Step(config, strategy, ranks, element=4, measured=is_measured(step))):
        said[message.kind, message.bytes] += message.times
    return said


def assert_as_said(folder: Path, strategy: str, ranks: int, port: int, changes: dict) -> None:
    found = measure(folder, strategy, ranks, port, changes)
    for step in STEPS:
        said = messages(found.config, strategy, ranks, step)
        for rank in range(ranks):
            assert tally(found.seen[rank, step]) == said, f"step {step}, rank {rank}"
    if strategy == "fsdp":
        return  # its padding belongs to no weight
    mask_token = FP32 * found.config.student.embed_dim  # a single row, all of it on rank 0
    said = state_bytes(Step(found.config, strategy, ranks, element=4))
    for name, held in found.held[0].items():  # where shares are uneven, rank 0 has the most
        untrained = mask_token * (0 if found.config.ibot.loss_weight else UNTRAINED.get(name, 0))
        assert held == said[name] - untrained, name


@pytest.mark.parametrize(("targets", "micro_batches"), [(CENTERING, 1), (SINKHORN, 2)], ids=["centering", "sinkhorn"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_bytes_of_a_step(strategy: str, targets: dict, micro_batches: int, tmp_path: Path, free_port: int) -> None:
    changes = targets | {"train__microbatch_size": 4 // micro_batches}
    assert_as_said(tmp_path, strategy, 2, free_port, changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "strategy", "ranks"),
    [
        *[(PASSES, "ddp", 4), (PASSES, "fsdp", 2), (ODD, "fsdp", 4)],
        *[(ODD, "fsdp2", 4), (KEPT, "fsdp", 2), (KEPT, "fsdp2", 4), (ASYNC, "ddp", 2), (DEFERRED, "ddp", 2)],
    ],
    ids=["passes-ddp", "passes-fsdp", "odd-fsdp", "odd-fsdp2", "kept-fsdp", "kept-fsdp2", "async-ddp", "deferred-ddp"],
)
def test_bytes_of_other_steps(strategy: str, ranks: int, changes: dict, tmp_path: Path, free_port: int) -> None:
    assert_as_said(tmp_path, strategy, ranks, free_port, changes)


@pytest.mark.slow
def test_gradients_in_several_buckets(tmp_path: Path, free_port: int) -> None:
    """Which of two neighbouring weights is in which message is DDP's affair; their number and sum are not."""
    large = {"dino__head_hidden_dim": 1024, "dino__head_n_prototypes": 80000, "dino__head_bottleneck_dim": 256}
    found = measure(tmp_path, "ddp", 2, free_port, large)
    said, seen = messages(found.config, "ddp", 2, STEPS[0]), tally(found.seen[0, STEPS[0]])
    gradients = [{size: n for (_, size), n in counts.items() if size > 10**6} for counts in (said, seen)]
    assert len(gradients[0]) == len(gradients[1]) == 2
    assert sum(gradients[0]) == sum(gradients[1])


@pytest.mark.parametrize("changes", [[], SWIGLU], ids=["mlp", "swiglu"])
def test_operations_are_those_that_torch_counts(changes: list[str], tmp_path: Path) -> None:
    words_ = [*words(tmp_path), "student.drop_path_uniform=false", *changes]
    config, images, masked = load_config(None, words_).config, 4, 12
    said = operations(config, images, masked)
    student = build_networks(config, drop_path_rate=config.student.drop_path_rate)
    teacher = build_networks(config)
    crops, small = torch.randn(2 * images, 3, 16, 16), torch.randn(2 * images, 3, 8, 8)
    mask = torch.zeros(2 * images, 16, dtype=torch.bool)
    asked = torch.arange(masked)
    mask[:, 0] = True  # so that the mask token has a gradient

    def through(networks: Networks, rows: list[Rows]) -> Tensor:
        cls, patches = torch.cat([r.cls for r in rows]), rows[0].patches
        if networks.ibot_head is None:
            return networks.dino_head(torch.cat([cls, patches])).sum()
        return networks.dino_head(cls).sum() + networks.ibot_head(patches).sum()

    def count(action: Callable[[], Tensor]) -> tuple[int, Tensor]:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = action()
        return counter.get_total_flops(), result

    forward, loss = count(
        lambda: through(student, student.backbone([crops, small], [mask, None], patches=[asked, None]))
    )
    assert forward == said.student
    assert count(lambda: loss.backward() or loss)[0] == said.backward
    with torch.no_grad():
        teacher_forward, _ = count(lambda: through(teacher, teacher.backbone([crops], patches=[asked])))
        assert teacher_forward == said.teacher
