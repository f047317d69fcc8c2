"""The switches under `performance:` change when and how things are computed, and not what."""

import gc
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Logger, State, Trainer
from composer.core import Precision
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from dinocomp.build import build_model
from dinocomp.build.compile import check_compiler, compile_networks
from dinocomp.build.optim import choose_kernel
from dinocomp.build.trainer import AsyncTrainer
from dinocomp.callbacks import CollectGarbage, MicroBatches, UpdateTeacher
from dinocomp.callbacks.bad_steps import _Copy
from dinocomp.config import Config, load_config
from dinocomp.errors import ConfigError
from dinocomp.train import main

from . import processes
from .helpers import CURRICULUM, load_checkpoint, metrics, words, yaml_of_nothing
from .sharding import shard_on_cpu

pytestmark = pytest.mark.usefixtures("one_cache")

COMPILED = {"performance__compile": "true"}
FUSED = {"performance__fused_optimizer": "true"}
ASYNC = {"performance__async_step": "true", "performance__collect_garbage_every": 2}


# LayerScale's start of 1e-5 makes all features so alike that the nearest of them is a matter of rounding.
PLAIN = {"student__layerscale": "null"}


def train(folder: Path, name: str, **changes: object) -> Path:
    assert main([yaml_of_nothing(folder), *words(folder / name, **PLAIN, **changes)]) == 0
    return folder / name


def assert_near(one: Path, other: Path, rel: float = 1e-5) -> None:
    """The losses and gradient norms of two runs."""
    ours, theirs = metrics(one), metrics(other)
    assert [line["iteration"] for line in ours] == [line["iteration"] for line in theirs] == list(range(1, 13))
    for a, b in zip(ours, theirs, strict=True):
        for name in (name for name in a if name.startswith(("loss/", "grad_norm/", "teacher/"))):
            assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-7), (a["iteration"], name)


def config(*more: str, **changes: object) -> Config:
    return load_config(None, [*words(Path("unused"), **changes), *more]).config


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every switch off."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))  # as `one_cache`
        return train(folder, "run")


def test_a_step_that_does_not_wait_is_the_same_step(plain: Path, tmp_path: Path) -> None:
    other = train(tmp_path, "async", **ASYNC)
    assert gc.isenabled()
    one, two = load_checkpoint(plain, 12)["state"], load_checkpoint(other, 12)["state"]
    assert all(torch.equal(weight, two["model"][name]) for name, weight in one["model"].items())
    for name in ("sample", "batch"):
        assert one["timestamp"]["Timestamp"][name] == two["timestamp"]["Timestamp"][name]
    assert_near(plain, other, rel=0)


class Reads(TorchDispatchMode):
    """Counts the numbers that Python reads of tensors, by who asks; on a GPU each would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frame = sys._getframe(1)
            while f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
                frame = frame.f_back
            self.seen[frame.f_code.co_name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("switches", "readers"),
    [
        ({}, {"_accumulate_time_across_ranks", "_iter_dataloader", "_train_microbatches", "after_train_batch"}),
        (ASYNC, {"after_train_batch"}),
        (ASYNC | FUSED, {"batch_end"}),
    ],
    ids=["plain", "async", "async-fused"],
)
def test_what_is_read_of_the_device_in_every_step(
    switches: dict, readers: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = _Copy.numbers

    def numbers(copy: _Copy) -> list[float]:
        reads.seen["batch_end"] += 1  # which dispatches no operator
        return arrived(copy)

    monkeypatch.setattr(_Copy, "numbers", numbers)
    with Reads() as reads:
        train(tmp_path, "run", loggers__period_iterations=100, checkpoint__save_frequency=100, **switches)
    every_step = {name for name, number in reads.seen.items() if number >= 12}
    every_step -= {"of"}  # of PatchRows, which looks on a CPU only
    every_step -= {"_train_batch", "<lambda>", "<dictcomp>"} if not switches else {"_train_batch"}  # AdamW's counters
    assert every_step == readers


def test_micro_batches_of_a_step_that_does_not_wait(tmp_path: Path) -> None:
    four = {"train__microbatch_size": 2, "student__drop_path_rate": 0}
    one, other = train(tmp_path, "sync", **four), train(tmp_path, "async", **four, **ASYNC)
    assert_near(one, other, rel=0)


def test_a_fused_optimizer_takes_the_same_steps_and_goes_on_from_one_that_is_not(plain: Path, tmp_path: Path) -> None:
    assert_near(plain, train(tmp_path, "fused", **FUSED))
    train(tmp_path, "both", optim__epochs=2)
    both = train(tmp_path, "both", **FUSED)  # a longer run, whose schedules are others from here on
    train(tmp_path, "neither", optim__epochs=2)
    assert_near(train(tmp_path, "neither"), both)


@pytest.mark.parametrize("fused", [True, False])
def test_a_loaded_optimizer_computes_as_this_run_wants(fused: bool) -> None:
    def stepped(fused: bool) -> torch.optim.AdamW:
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        optimizer = torch.optim.AdamW([weight], fused=fused or None)
        optimizer.step()
        return optimizer

    ours = stepped(fused)
    ours.load_state_dict(stepped(not fused).state_dict())
    choose_kernel(ours, fused=fused)
    assert ours.param_groups[0]["fused"] is (True if fused else None)
    ours.step()
    (state,) = ours.state.values()
    assert state["step"] == 2


def test_another_composer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "_use_closures")
    with pytest.raises(ConfigError, match=r"no _use_closures\. Type performance\.async_step=false"):
        AsyncTrainer()


def test_garbage_is_looked_for_when_told() -> None:
    gauge: list[int] = []
    callback = CollectGarbage(2)

    def note(phase: str, info: dict) -> None:
        if phase == "start":
            gauge.append(info["generation"])

    class Now:
        timestamp = type("Timestamp", (), {"batch": 0})

    gc.callbacks.append(note)
    try:
        callback.fit_start(Now, None)
        assert not gc.isenabled()
        for Now.timestamp.batch in range(1, 6):
            callback.batch_end(Now, None)
        assert gauge == [1, 1]
        gauge.clear()
        for Now.timestamp.batch in range(6, 41):
            callback.batch_end(Now, None)
        assert gauge.count(2) == 2 and gauge.count(1) == 16, "in every tenth search what has lived long, too"
    finally:
        gc.callbacks.remove(note)
        callback.close(Now, None)
    assert gc.isenabled()


def test_no_tensor_waits_to_be_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's tensors are in no circle: without any search for garbage, memory stays what it is."""
    update, living = UpdateTeacher.batch_end, []

    def batch_end(self: UpdateTeacher, state: State, logger: Logger) -> None:
        update(self, state, logger)
        living.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    monkeypatch.setattr(UpdateTeacher, "batch_end", batch_end)
    switches = {"performance__collect_garbage_every": 1000, "train__microbatch_size": 4}
    train(tmp_path, "run", **switches, parallelism__activation_checkpointing="selective")
    assert len(living) == 12 and living[-1] < living[2] + 5, living  # less than one a step


def test_a_batch_that_is_begun_anew_is_looked_at_whole() -> None:
    """Composer leaves the micro-batch that did not fit in the state."""
    seen = []

    class Model:
        def begin_step(self, parts: list, to_device: object) -> None:
            seen.append([len(part["index"]) for part in parts])

    state = SimpleNamespace(batch={"index": torch.arange(8)}, device_train_microbatch_size=4)
    state.device = SimpleNamespace(batch_to_device=None)
    state.precision, state.precision_config = Precision.FP32, None
    callback = MicroBatches(Model())
    callback.batch_start(state, None)
    callback.before_train_batch(state, None)
    state.batch, state.device_train_microbatch_size = {"index": torch.arange(4)}, 2
    callback.before_train_batch(state, None)
    assert seen == [[4, 4], [2, 2, 2, 2]]


@pytest.mark.parametrize(
    ("keys", "fix"),
    [
        (["performance.cuda_graphs=true"], "performance.compile=true"),
        (["performance.compile=true", "performance.cuda_graphs=true"], "performance.cuda_graphs=false"),
        (["performance.compile=true", "performance.attention=xformers", "train.device=auto"], "attention=auto"),
        (["performance.compile=true", "parallelism.activation_cpu_offload=true"], "activation_checkpointing=full"),
        (
            ["performance.compile=true", "performance.cuda_graphs=true", "train.microbatch_size=2", "train.device=gpu"],
            "train.microbatch_size=0",
        ),
        (["performance.attention=varlen"], "performance.attention=sdpa"),
        (["performance.attention=varlen", "student.num_heads=2", "train.device=gpu"], "performance.attention=sdpa"),
        (["performance.compile=true", "train.microbatch_size=auto", "train.device=gpu"], "type that number"),
        (["performance.async_step=true", "train.microbatch_size=auto", "train.device=gpu"], "type that number"),
        (["curriculum.global_crops_size=8"], "curriculum.fraction=0.75"),
        (["curriculum.fraction=0.99"], "curriculum.fraction=0.75"),
        (
            ["performance.attention=varlen", "performance.precision=fp32", "train.device=gpu"],
            "performance.precision=bf16",
        ),
    ],
)
def test_switches_that_do_not_go_together(keys: list[str], fix: str) -> None:
    with pytest.raises(ConfigError, match="type ") as refused:
        config(*keys)
    assert fix in str(refused.value)


def test_nothing_to_compile_with_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    check_compiler(config(), gpu=False)
    with pytest.raises(ConfigError, match=r"a compiler, such as gcc.*performance\.compile=false"):
        check_compiler(config(**COMPILED), gpu=False)


def test_graphs_of_weights_that_move_are_refused_where_sharding_is_chosen() -> None:
    graphs = config(**COMPILED, performance__cuda_graphs="true", train__device="gpu")
    with pytest.raises(ConfigError, match=r"strategy=fsdp2.*Type performance\.cuda_graphs=false"):
        check_compiler(graphs, gpu=True, strategy="fsdp2")


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_alike_blocks_are_compiled_once(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced, without the compiler behind it; whole graphs, and the same losses and gradients."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiler(function, **how, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    settings = config(f"parallelism.activation_checkpointing={recompute}", "student.drop_path_uniform=true")
    crops = [torch.randn(4, 3, 16, 16), torch.randn(6, 3, 8, 8)]
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build_model(settings).train()
        names = list(model.state_dict())
        if compiled:
            compile_networks(config(**COMPILED), model)
        assert list(model.state_dict()) == names
        for role in ("student", "teacher"):
            with torch.set_grad_enabled(role == "student"):
                nets = model.networks(role)
                tokens = nets["backbone"](crops)
                logits = nets["dino_head"](torch.cat([t.cls for t in tokens]))
                loss = logits.square().sum() + sum(t.patches.square().mean() for t in tokens)
            if role == "student":
                loss.backward()
            found.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert counters["stats"]["unique_graphs"] == 2 * 4, "a block, a head, patches of two sizes; with gradients, without"
    for (loss, gradients), (expected, known) in zip(found[2:], found[:2], strict=True):
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(gradients, known, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_run_is_an_eager_one_but_for_rounding(tmp_path: Path) -> None:
    """With blocks that differ and are computed again in part, colours on the device and crops of four sizes."""
    changes = {"parallelism__activation_checkpointing": "selective", "student__drop_path_uniform": "false"}
    changes |= {"performance__device_augment": "true", **CURRICULUM}
    run = processes.start([yaml_of_nothing(tmp_path), "recipes=[fast]", *words(tmp_path / "fast", **PLAIN, **changes)])
    assert processes.finish(run, 600) == 0
    assert_near(train(tmp_path, "eager", **changes), tmp_path / "fast", rel=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("ddp", {"train__centering": "sinkhorn_knopp", "ibot__separate_head": "true", "train__microbatch_size": 2}),
        ("fsdp2", {"student__ffn_layer": "swiglu"}),
    ],
)
def test_compiled_ranks_are_one_eager_process(strategy: str, changes: dict, tmp_path: Path, free_port: int) -> None:
    same = {"student__drop_path_rate": 0, "dino__koleo_loss_weight": 0, **changes}
    ours = same | {"train__batch_size_per_gpu": 4, "parallelism__strategy": strategy}
    arguments = [yaml_of_nothing(tmp_path), "recipes=[fast]", *words(tmp_path / "two", **PLAIN, **ours)]
    ranks = processes.start_ranks(arguments, 2, free_port, shard_on_cpu)
    assert [processes.finish(rank, 600) for rank in ranks] == [0, 0]
    assert_near(train(tmp_path, "one", **same), tmp_path / "two", rel=3e-5)
