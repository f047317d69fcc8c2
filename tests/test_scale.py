"""The same mathematics on any number of processes, with any strategy, in any number of micro-batches."""

import json
import shutil
from itertools import permutations
from pathlib import Path
from signal import SIGTERM

import pytest
import torch

from dinocomp.checkpoints.folder import SHARES
from dinocomp.checkpoints.manifest import folder_name
from dinocomp.checkpoints.shapes import read_shares
from dinocomp.interop import read_teacher
from dinocomp.interop.weights import read_tensors
from dinocomp.train import main

from . import processes
from .helpers import launch, metrics, words, yaml_of_nothing
from .sharding import shard_on_cpu

pytestmark = pytest.mark.usefixtures("one_cache")

# What is drawn on a process is another thing on another process; and LayerScale's start of 1e-5 makes all features so
# alike that the nearest of them is a matter of rounding.
SAME = {
    "student__drop_path_rate": 0,
    "student__layerscale": "null",
    "dino__koleo_distributed": "true",
    "evaluation__at_start": "true",
}
CENTERING = SAME | {"train__centering": "centering", "ibot__separate_head": "true"}
SINKHORN = SAME | {"train__centering": "sinkhorn_knopp"}
SHAPES = [("single", 1), ("ddp", 2), ("fsdp", 2), ("fsdp2", 2), ("fsdp2", 4)]


def run(folder: Path, name: str, strategy: str, ranks: int, port: int, changes: dict, stop: int = 0) -> Path:
    """A run of 12 iterations of 8 images; told to stop in iteration `stop`, if there is one."""
    output = folder / name
    changes = {"train__batch_size_per_gpu": 8 // ranks, "parallelism__strategy": strategy, **changes}
    signals = (processes.signal_at_iteration, stop, SIGTERM) if stop else ()
    started = processes.start_ranks(
        [yaml_of_nothing(folder), *words(output, **changes)], ranks, port, shard_on_cpu, *signals
    )
    assert [processes.finish(rank) for rank in started] == [75 if stop else 0] * ranks
    return output


def assert_same(one: Path, other: Path, rel: float = 1e-5) -> None:
    """Every loss, gradient norm and gauge of two runs, and what the evaluation says of the teacher."""
    ours, theirs = metrics(one), metrics(other)
    assert [line["iteration"] for line in ours] == [line["iteration"] for line in theirs] == list(range(1, 13))
    names = [name for name in ours[0] if name.startswith(("loss/", "grad_norm/", "teacher/", "lr", "momentum"))]
    assert {"loss/koleo", "loss/ibot", "loss/dino_local", "grad_norm/backbone", "teacher/feature_std"} < {*names}
    for a, b in zip(ours, theirs, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-9), (a["iteration"], name)
    lines = [(output / "evaluation.jsonl").read_text().splitlines() for output in (one, other)]
    for a, b in zip(*lines, strict=True):
        a, b = json.loads(a), json.loads(b)
        assert a["knn_top1"]["5"] == pytest.approx(b["knn_top1"]["5"], abs=0.01), "rounding may turn an image or two"
    ours, theirs = (json.loads(text[0])["pixels_top1"]["5"] for text in lines)
    assert ours == pytest.approx(theirs, abs=0.003) and ours > 0.9, "of raw pixels, all ranks together"


@pytest.fixture(scope="module", params=[CENTERING, SINKHORN], ids=["centering", "sinkhorn"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The run on one process, and its settings."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))  # as `one_cache`
        assert main([yaml_of_nothing(folder), *words(folder / "run", **request.param)]) == 0
    return folder / "run", request.param


@pytest.mark.parametrize(
    ("alone", "strategy", "ranks"),
    [
        (SINKHORN, "ddp", 2),
        (SINKHORN, "fsdp2", 2),
        *(
            pytest.param(CENTERING, *shape, marks=pytest.mark.slow)
            for shape in [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp2", 2)]
        ),
        *(pytest.param(SINKHORN, *shape, marks=pytest.mark.slow) for shape in [("fsdp", 2), ("fsdp2", 4)]),
    ],
    indirect=["alone"],
    ids=lambda value: value["train__centering"] if isinstance(value, dict) else value,
)
def test_processes_are_one(alone: tuple, strategy: str, ranks: int, tmp_path: Path, free_port: int) -> None:
    """W ranks of 8 / W images train as one of 8, networks whole or sharded."""
    reference, changes = alone
    output = run(tmp_path, "run", strategy, ranks, free_port, changes)
    assert_same(output, reference)
    ours, theirs = (read_teacher(path / "teacher.safetensors")[0] for path in (output, reference))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_are_one_batch(alone: tuple, size: int, tmp_path: Path) -> None:
    """1 x 8 images are 2 x 4 and 4 x 2, in all terms, gradients and gauges of the targets."""
    reference, changes = alone
    words_ = words(tmp_path / "run", **changes, train__microbatch_size=size)
    assert main([yaml_of_nothing(tmp_path), *words_]) == 0
    ours, theirs = metrics(tmp_path / "run"), metrics(reference)
    for a, b in zip(ours, theirs, strict=True):
        for name in (name for name in a if name.startswith(("loss/", "grad_norm/", "teacher/"))):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["iteration"], name)


@pytest.mark.parametrize(
    ("alone", "strategy", "recompute"),
    [
        (CENTERING, "ddp", "none"),
        pytest.param(CENTERING, "fsdp", "full", marks=pytest.mark.slow),
        pytest.param(SINKHORN, "fsdp2", "selective", marks=pytest.mark.slow),
    ],
    indirect=["alone"],
    ids=["ddp", "fsdp-full", "fsdp2-selective"],
)
def test_micro_batches_on_ranks(alone: tuple, strategy: str, recompute: str, tmp_path: Path, free_port: int) -> None:
    """With the student's weights kept from forward to backward, and parts of it computed again."""
    reference, changes = alone
    changes = changes | {"train__microbatch_size": 2, "parallelism__activation_checkpointing": recompute}
    changes |= {"parallelism__reshard_after_forward": "false"}
    output = run(tmp_path, "run", strategy, 2, free_port, changes)
    for a, b in zip(metrics(output), metrics(reference), strict=True):
        for name in (name for name in a if name.startswith(("loss/", "grad_norm/", "teacher/"))):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["iteration"], name)


@pytest.mark.slow
@pytest.mark.parametrize("first", SHAPES, ids=str)
@pytest.mark.parametrize("alone", [CENTERING], indirect=True, ids=["centering"])
def test_every_shape_goes_on_from_every_other(alone: tuple, first: tuple, tmp_path: Path, free_port: int) -> None:
    """Six iterations under one strategy, six under another."""
    reference, changes = alone
    half = run(tmp_path, "half", *first, free_port, changes, 6)
    theirs = read_tensors(reference / "checkpoints" / folder_name(12))
    sharded = first[0].startswith("fsdp")
    assert (half / "checkpoints" / folder_name(6) / SHARES).is_file() == sharded
    for strategy, ranks in SHAPES:
        if (strategy, ranks) == first:
            continue
        shutil.copytree(half, tmp_path / f"{strategy}{ranks}")
        output = run(tmp_path, f"{strategy}{ranks}", strategy, ranks, free_port, changes)
        assert_same(output, reference)
        rewritten = "rewriting the state of" in (output / "train.log").read_text()
        assert rewritten == (strategy.startswith("fsdp") != sharded)
        assert not list((output / "checkpoints").glob(".*")), "nothing that was made for loading stays"
        # AdamW's averages went along: the weights are where those of the uninterrupted run are.
        for name, weight in read_tensors(output / "checkpoints" / folder_name(12)).items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_weights_of_a_sharded_run(tmp_path: Path, free_port: int) -> None:
    """A checkpoint in shares is where another run can start, and says what a file of weights says."""
    sharded = run(tmp_path, "sharded", "fsdp2", 2, free_port, SINKHORN) / "checkpoints" / folder_name(12)
    teacher, _ = read_teacher(sharded / "teacher.safetensors")
    shares = read_shares(sharded)
    for name, weight in teacher.items():
        network, _, rest = name.partition(".")
        torch.testing.assert_close(shares[f"teacher_{network}.net.{rest}"], weight, rtol=0, atol=0)
    changes = SINKHORN | {"MODEL__WEIGHTS": sharded, "optim__epochs": 1}
    assert main([yaml_of_nothing(tmp_path), *words(tmp_path / "next", **changes)]) == 0
    first = metrics(tmp_path / "next")[0]
    assert first["loss/total"] < metrics(sharded.parents[1])[3]["loss/total"], "it goes on from what was learnt"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_a_bad_step_is_skipped_by_sharded_networks(strategy: str, tmp_path: Path, free_port: int) -> None:
    """A gradient that is not finite on one rank is left out by all, as with whole networks."""
    runs = {}
    for name in ("ddp", strategy):
        output = tmp_path / name
        changes = CENTERING | {"train__batch_size_per_gpu": 4, "parallelism__strategy": name}
        ranks = processes.start_ranks(
            [yaml_of_nothing(tmp_path), *words(output, **changes)],
            *(2, free_port, shard_on_cpu, processes.spoil, [5, 6], 1, "gradient"),
        )
        assert [processes.finish(rank) for rank in ranks] == [0, 0]
        runs[name] = metrics(output)
    ours, theirs = runs[strategy], runs["ddp"]
    assert [line["bad_steps"] for line in ours] == [0] * 4 + [1] + [2] * 7
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss/dino_local", "loss/ibot", "grad_norm/backbone"):
            if a["iteration"] not in (5, 6):
                assert a[name] == pytest.approx(b[name], rel=1e-5), (a["iteration"], name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_all_ranks_start_from_the_same_centre(strategy: str, tmp_path: Path, free_port: int) -> None:
    """Rank 0 alone reads the weights to start from, and networks on other ranks have no memory until then."""
    first = run(tmp_path, "first", "single", 1, free_port, CENTERING | {"optim__epochs": 1})
    changes = CENTERING | {"MODEL__WEIGHTS": first / "checkpoints" / folder_name(4), "optim__epochs": 1}
    changes |= {"train__batch_size_per_gpu": 4, "parallelism__strategy": strategy}
    folder = tmp_path / "centres"
    folder.mkdir()
    ranks = processes.start_ranks(
        [yaml_of_nothing(tmp_path), *words(tmp_path / "run", **changes)],
        *(2, free_port, shard_on_cpu, processes.write_centres, folder),
    )
    assert [processes.finish(rank) for rank in ranks] == [0, 0]
    saved = read_tensors(first / "checkpoints" / folder_name(4))["dino_targets.center"]
    for rank in range(2):
        assert torch.equal(torch.load(folder / f"{rank}.pt"), saved) and saved.any()


@pytest.mark.slow
def test_a_disk_that_is_full_while_shares_are_written(tmp_path: Path, free_port: int) -> None:
    """All ranks say so and end together; the checkpoint before it stays, and the run goes on from there."""
    changes = SINKHORN | {"train__batch_size_per_gpu": 4, "parallelism__strategy": "fsdp2"}
    settings = [yaml_of_nothing(tmp_path), *words(tmp_path / "run", **changes)]
    full = (processes.limit_file_size_from, 7, 20_000)
    ranks = processes.start_ranks(settings, 2, free_port, shard_on_cpu, *full)
    assert [processes.finish(rank) for rank in ranks] == [3, 3]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [folder_name(4)]
    ranks = processes.start_ranks(settings, 2, free_port, shard_on_cpu)
    assert [processes.finish(rank) for rank in ranks] == [0, 0]
    assert len(metrics(tmp_path / "run")) == 12


@pytest.mark.slow
def test_no_rank_draws_what_another_draws(tmp_path: Path, free_port: int) -> None:
    """Masks are those of the ranks' own places in the global batch, and drop path is drawn on each rank for itself."""
    changes = {"train__batch_size_per_gpu": 4, "student__drop_path_rate": 0.5, "optim__epochs": 1}
    for number, size in ((4, 4), (1, 16)):
        folder = tmp_path / str(number)
        folder.mkdir()
        settings = words(folder / "run", **changes | {"train__batch_size_per_gpu": size})
        ranks = processes.start_ranks(
            [yaml_of_nothing(tmp_path), *settings], number, free_port, processes.write_draws, folder
        )
        assert [processes.finish(rank) for rank in ranks] == [0] * number
    drawn = [torch.load(tmp_path / "4" / f"{rank}.pt") for rank in range(4)]
    whole = torch.load(tmp_path / "1" / "0.pt")
    assert torch.equal(torch.cat([one["masks"] for one in drawn]), whole["masks"])
    assert torch.equal(torch.cat([one["index"] for one in drawn]), whole["index"])
    for one, other in permutations(drawn, 2):
        assert not torch.equal(one["masks"], other["masks"]) and not torch.equal(one["kept"], other["kept"])


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 2), ("ddp", 4), ("fsdp2", 4)])
@pytest.mark.parametrize("alone", [SINKHORN], indirect=True, ids=["sinkhorn"])
def test_through_the_launcher(alone: tuple, strategy: str, ranks: int, tmp_path: Path) -> None:
    """`composer -n`: the same numbers, one set of files, one voice."""
    reference, changes = alone
    changes = changes | {"train__batch_size_per_gpu": 8 // ranks, "parallelism__strategy": strategy}
    settings = words(tmp_path / "run", **changes)
    done = launch("shard", yaml_of_nothing(tmp_path), *settings, processes=ranks, script="tests/launched.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[12/12]") == 1 and f"({strategy})" in done.stdout
    assert_same(tmp_path / "run", reference)


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_and_shows_its_traceback(tmp_path: Path) -> None:
    settings = words(tmp_path / "run", train__batch_size_per_gpu=4)
    done = launch("fail", yaml_of_nothing(tmp_path), *settings, processes=2, script="tests/launched.py")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "[rank1]: Traceback" in said and "[rank1]: ArithmeticError: nobody has foreseen this" in said
