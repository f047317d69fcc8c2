"""The class token's attention, against what the attention module itself makes of it."""

import pytest
import torch
from torch import nn

from dinocomp.errors import WeightsError
from dinocomp.models import VisionTransformer
from dinocomp.pictures import attention_picture, watch_attention
from dinocomp.pictures.attention import heat


def network(registers: int = 0, heads: int = 3) -> VisionTransformer:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 8 * heads, "depth": 2, "num_heads": heads}
    net = VisionTransformer(**sizes, num_register_tokens=registers).eval().requires_grad_(False)
    for block in net.blocks:  # so that attention is not even
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
        nn.init.normal_(block.attn.qkv.bias, std=0.5)
    return net


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("side", [16, 24])
def test_values_so_weighted_are_what_the_module_gives(registers: int, side: int) -> None:
    net, images = network(registers), torch.randn(4, 3, side, side)
    attention, seen = net.blocks[-1].attn, {}
    attention.qkv.register_forward_hook(lambda module, given, out: seen.update(qkv=out))
    attention.proj.register_forward_hook(lambda module, given, out: seen.update(mixed=given[0]))
    with watch_attention(net) as watched:
        net(images)
        weights = watched.read(4)  # [B, heads, T]
    tokens = 1 + registers + (side // 4) ** 2
    assert weights.shape == (4, 3, tokens) and watched.prefix == 1 + registers
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 3))
    assert weights.std() > 0.01
    values = seen["qkv"].view(4, tokens, 3, 3, 8)[:, :, 2]  # [B, T, heads, d]
    of_class = torch.einsum("bht,bthd->bhd", weights, values).flatten(1)  # [B, D]
    torch.testing.assert_close(of_class, seen["mixed"].view(4, tokens, -1)[:, 0], atol=1e-5, rtol=1e-4)


def test_it_is_fp32_within_autocast_and_the_hook_is_gone_behind_it() -> None:
    net, images = network(), torch.randn(2, 3, 16, 16)
    with watch_attention(net) as whole:
        net(images)
        expected = whole.read(2)
    with torch.autocast("cpu", torch.bfloat16), watch_attention(net) as watched:
        net(images)
        found = watched.read(2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.2)
    assert not net.blocks[-1].attn.qkv._forward_hooks


def test_other_networks_are_refused_in_words() -> None:
    with pytest.raises(WeightsError, match="--pictures pca"), watch_attention(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("heads", [1, 3, 6, 12, 16, 24])
def test_the_picture(heads: int) -> None:
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    attention = torch.rand(2, heads, 1 + 2 + 16).softmax(dim=-1)
    picture = attention_picture(images, attention, (4, 4), prefix=3)
    assert picture.width == 780 and picture.height > 200


def test_heat() -> None:
    assert heat(torch.full((4, 4), 1 / 16)).max() < 5, "a map that is the same everywhere is dark"
    peak = torch.zeros(4, 4)
    peak[1, 2] = 1.0
    assert heat(peak)[1, 2].min() > 150 and heat(peak)[0, 0].max() < 5
