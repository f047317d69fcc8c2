"""Activation checkpointing: the same numbers from less memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.live import LiveMemory
from dinocomp.build.model import build_model
from dinocomp.config import load_config
from dinocomp.models import VisionTransformer
from dinocomp.models.block import Block
from dinocomp.models.recompute import _saves
from tests.helpers import TINY

MODES = [
    {"recompute": "selective"},
    {"recompute": "full"},
    {"recompute": "full", "recompute_every": 2},
    {"offload": True},
    {"recompute": "full", "offload": True},
    {"recompute": "selective", "offload": True},
]


def network(**settings) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "init_values": 0.5}
    return VisionTransformer(**sizes, drop_path_rate=0.3, drop_path_uniform=True, **settings).train()


def step(model: VisionTransformer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of two packed crop sizes, some patches masked."""
    torch.manual_seed(1)
    crops, masks = [torch.randn(6, 3, 32, 32), torch.randn(9, 3, 16, 16)], [torch.rand(6, 16) < 0.3, None]
    large, small = model(crops, masks)
    loss = large.cls.pow(3).mean() + large.patches.pow(4).mean() + small.cls.pow(2).mean() + large.cls.var()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("settings", MODES, ids=lambda s: "-".join(map(str, s.values())))
def test_loss_and_gradients_stay_bit_for_bit(settings: dict) -> None:
    loss, gradients = step(network())
    again, of_mode = step(network(**settings))
    assert torch.equal(again, loss)
    assert gradients.keys() == of_mode.keys()
    assert [name for name, gradient in gradients.items() if not torch.equal(gradient, of_mode[name])] == []


@pytest.mark.parametrize("settings", MODES, ids=lambda s: "-".join(map(str, s.values())))
def test_autocast_is_the_same_in_backward(settings: dict) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = step(network())
        again, of_mode = step(network(**settings))
    assert torch.equal(again, loss)
    assert [name for name, gradient in gradients.items() if not torch.equal(gradient, of_mode[name])] == []


def kept_bytes(**settings) -> int:
    """Of all tensors that live between forward and backward besides weights and images."""
    model, crops = network(**settings), [torch.randn(6, 3, 32, 32), torch.randn(9, 3, 16, 16)]
    with LiveMemory([*model.parameters(), *crops]) as memory:
        start = memory.now
        loss = sum(tokens.cls.sum() for tokens in model(crops))
        kept = memory.now - start
        loss.backward()
    return kept


def test_less_is_kept() -> None:
    """A block of width D keeps, for each token, at least its input where all is computed again."""
    kept = {mode: kept_bytes(recompute=mode) for mode in ("none", "selective", "full")}
    every_second = kept_bytes(recompute="full", recompute_every=2)
    assert kept["none"] > 1.2 * kept["selective"] > 2 * kept["full"]
    assert kept["full"] < every_second < kept["none"]
    assert every_second == pytest.approx((kept["none"] + kept["full"]) / 2, rel=0.05)
    of_blocks = 4 * (6 * 17 + 9 * 5) * 48 * 4  # depth * tokens * width * bytes
    assert of_blocks < kept["full"] < 3 * of_blocks


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_offload_takes_what_is_kept_from_the_device(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's copies as stand-ins for those in another memory."""
    taken: list[torch.Tensor] = []

    class Hooks(saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            assert not pin_memory, "a tensor of the CPU is not pinned"
            super().__init__(lambda t: taken.append(t) or t, lambda t: t)

    monkeypatch.setattr("dinocomp.models.recompute.save_on_cpu", Hooks)
    model = network(recompute=recompute, offload=True)
    step(model)
    if recompute == "none":
        assert len(taken) > 4 * 10
    else:  # each block's input [tokens, D]; the rest of what it is called with are rows
        assert [len(t) for t in taken if t.is_floating_point() and t.numel()] == 4 * [6 * 17 + 9 * 5]


def computed_again(monkeypatch: pytest.MonkeyPatch, run) -> int:
    """How often a block's body runs while `run()` does."""
    calls, body = [], Block._compute
    monkeypatch.setattr(Block, "_compute", lambda *args: calls.append(1) or body(*args))
    run()
    return len(calls)


def test_nothing_is_computed_again_without_gradients_or_out_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(recompute="full")
    assert computed_again(monkeypatch, lambda: step(model)) == 8
    with torch.no_grad():
        assert computed_again(monkeypatch, lambda: model(torch.randn(2, 3, 32, 32))) == 4
    model.eval()
    assert computed_again(monkeypatch, lambda: step(model)) == 4


def test_what_selective_saves() -> None:
    aten = torch.ops.aten
    saved = (aten.mm, aten.addmm, aten.bmm, aten._scaled_dot_product_flash_attention_for_cpu)
    saved += (aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention)
    assert all(_saves(packet.default) for packet in saved)
    assert not any(_saves(packet.default) for packet in (aten.gelu, aten.native_layer_norm, aten.index_add))

    class Kernel:
        namespace = "xformers_flash3"

    assert _saves(Kernel())


def test_selective_does_no_matrix_product_twice() -> None:
    """Forward products and their two gradients each: the same number with and without."""

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names = ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu")
            self.products += func._schema.name.removeprefix("aten::") in names
            return func(*args, **(kwargs or {}))

    counts = {}
    for mode in ("none", "selective", "full"):
        with Count() as count:
            step(network(recompute=mode))
        counts[mode] = count.products
    assert counts["none"] == counts["selective"]
    # Early stop spares each block its last product, whose result backward does not read without LayerScale.
    assert counts["full"] >= counts["none"] + 4 * (3 + 2)  # qkv, proj and fc1; attention of two groups


def test_the_student_alone_is_built_with_it_and_names_stay() -> None:
    words = [f"{name}={value}" for name, value in TINY.items()]
    plain = build_model(load_config(None, words).config)
    words += ["parallelism.activation_checkpointing=full", "parallelism.activation_checkpointing_every=2"]
    model = build_model(load_config(None, [*words, "parallelism.activation_cpu_offload=true"]).config)
    blocks = model.networks("student")["backbone"].blocks
    assert [(block.recompute, block.offload) for block in blocks] == [("full", True), ("none", True)]
    assert list(model.state_dict()) == list(plain.state_dict())


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="no recomputation called 'all'; there are none, selective, full"):
        network(recompute="all")
