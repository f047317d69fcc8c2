"""Activation checkpointing: the same numbers from less memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

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
    """Of all tensors that live between forward and backward because of the blocks, weights aside."""
    model = network(**settings)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = live_bytes()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        tokens = model([torch.randn(6, 3, 32, 32), torch.randn(9, 3, 16, 16)])
    cached = live_bytes() - before  # selective keeps results where these hooks do not see them
    tokens[0].cls.sum().backward()
    return max(sum(kept.values()), cached)


def live_bytes() -> int:
    """Of the storages of all tensors that Python can reach."""
    import gc

    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())
