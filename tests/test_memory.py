"""The estimate of a step's memory against what steps of the real model take, counted tensor by tensor on a CPU."""

from dataclasses import replace

import pytest

from benchmarks.memory import estimated, measure
from dinocomp.build.memory import plan_memory
from dinocomp.config import Config, load_config, sizes
from dinocomp.config.memory import estimate
from dinocomp.method.losses import cross_entropy

SMALL = ["train.batch_size_per_gpu=8", "student.depth=6", "student.embed_dim=192", "student.num_heads=3"]
SMALL += ["dino.head_n_prototypes=4096", "dino.head_hidden_dim=512", "train.device=cpu", "student.arch=custom"]


def small(*words: str) -> Config:
    return load_config("vits16", [*SMALL, *words]).config


CASES = {
    "plain": (),
    "selective": ("parallelism.activation_checkpointing=selective",),
    "full": ("parallelism.activation_checkpointing=full",),
    "every-second": ("parallelism.activation_checkpointing=full", "parallelism.activation_checkpointing_every=2"),
    "micro-batches": ("train.microbatch_size=2",),
    "micro-batches-full": ("train.microbatch_size=2", "recipes=[low_memory]"),
    "logits": ("dino.head_n_prototypes=65536", "train.batch_size_per_gpu=4"),
    "long-recipe": ("recipes=[swiglu,separate_heads,sinkhorn]", "student.drop_path_rate=0", "student.layerscale=0"),
    "device-augment": ("performance.device_augment=true", "recipes=[low_memory]"),
    "no-local-crops": ("crops.local_crops_number=0", "ibot.loss_weight=0"),
    "rising-drop-path": ("student.drop_path_uniform=false", "student.drop_path_rate=0.6"),
}


@pytest.mark.parametrize("words", CASES.values(), ids=CASES.keys())
def test_the_estimate_is_within_a_tenth_of_what_is_measured(words: tuple[str, ...]) -> None:
    config = small(*words)
    guess = estimated(config, "fp32", gpu=False).total
    assert guess == pytest.approx(measure(config, fake=True).peak, rel=0.1)


@pytest.mark.parametrize("words", [("recipes=[activation_checkpointing]",), ("train.microbatch_size=2",)])
def test_tensors_without_memory_measure_what_real_steps_take(words: tuple[str, ...]) -> None:
    """Which is why the other tests, of larger networks, do without."""
    config = small("student.depth=2", "train.batch_size_per_gpu=4", "dino.head_n_prototypes=512", *words)
    real, fake = measure(config), measure(config, fake=True)
    assert fake.peak == pytest.approx(real.peak, rel=1e-3)
    assert estimated(config, "fp32", gpu=False).total == pytest.approx(real.peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["vitl16_short", "vitg14"])
def test_full_size_in_bf16(run: str) -> None:
    """Every operator of two steps at full size, without memory."""
    config = load_config(run).config
    assert estimated(config, "bf16", gpu=False).total == pytest.approx(
        measure(config, precision="bf16", fake=True).peak, rel=0.05
    )


PARAMETERS = {"backbone": 300_000_000, "dino_head": 30_000_000}


def of(world_size: int = 8, strategy: str = "ddp", *words: str):
    return estimate(
        load_config("vitl16_short", list(words)).config, PARAMETERS, 3000, world_size=world_size, strategy=strategy
    )


def test_sharding_divides_what_is_kept_of_weights() -> None:
    whole, parts, more = of(8, "ddp"), of(8, "fsdp2"), of(16, "fsdp2")
    assert whole.weights == whole.optimizer == 8 * 330e6
    assert parts.weights == parts.optimizer == whole.weights / 8 == 2 * more.weights
    assert whole.gradients >= 4 * 330e6, "DDP's buckets"
    gathered = of(8, "fsdp2", "parallelism.reshard_after_forward=false")
    assert gathered.copies == pytest.approx(parts.copies + 2 * 330e6)
    assert parts.total < whole.total
    assert of(1, "fsdp2") == of(1, "single"), "one process has nobody to share with"


def test_an_estimate_has_an_allowance_on_a_gpu_alone() -> None:
    on_gpu = of(1, "single")
    assert on_gpu.allowance > 1e9
    assert on_gpu.total == pytest.approx(sum(vars(on_gpu).values()))
    assert estimated(load_config("vits16").config, "fp32", gpu=False).allowance == 0


def test_the_plan_names_the_first_thing_that_makes_it_fit() -> None:
    config = load_config("vitl16_short").config
    needed = plan_memory(config, 8)
    assert needed.fits and needed.strategy == "ddp" and needed.remedy == ""
    assert plan_memory(config, 8, needed.memory.total).fits
    tight = plan_memory(config, 8, 40e9)
    assert not tight.fits and tight.remedy.startswith("type recipes=[activation_checkpointing] (about ")
    assert "recipes=[low_memory]" in plan_memory(config, 8, 20e9).remedy
    tiny = plan_memory(config, 8, 6e9)  # a third of it is less than the networks take: they are sharded
    assert tiny.strategy == "fsdp2" and "train.microbatch_size=" in tiny.remedy
    assert plan_memory(config, 1, 3e9).remedy == ""


def test_what_the_plan_advises_does_fit() -> None:
    config = load_config("vitl16_short").config
    words = plan_memory(config, 8, 12e9).remedy.removeprefix("type ").split(" (about")[0].split()
    changed = load_config("vitl16_short", words).config
    assert words and plan_memory(changed, 8, 12e9).fits
    assert plan_memory(replace(changed, train=replace(changed.train, microbatch_size="auto")), 8).memory.total > 12e9


def test_losses_have_as_many_numbers_at_a_time_as_the_estimate_says() -> None:
    assert sizes.AT_A_TIME == cross_entropy.AT_A_TIME
