"""The backbone beyond the recorded numbers."""

import json
import math
from pathlib import Path

import pytest
import torch

from dinocomp.models import Tokens, VisionTransformer
from dinocomp.models.block import kept_rows


def tiny(**settings) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3} | settings
    )


def test_published_layouts() -> None:
    """Names and shapes of the eight published backbones."""
    layouts = json.loads((Path(__file__).parents[1] / "golden" / "data" / "pretrained_layouts.json").read_text())
    sizes = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant2": (1536, 40, 24)}
    for name, layout in layouts.items():
        size = next(key for key in sizes if key in name)
        embed_dim, depth, num_heads = sizes[size]
        with torch.device("meta"):
            model = VisionTransformer(
                img_size=518,
                patch_size=14,
                embed_dim=embed_dim,
                depth=depth,
                num_heads=num_heads,
                ffn_layer="swiglufused" if size == "giant2" else "mlp",
                init_values=1.0,
                num_register_tokens=4 if "reg4" in name else 0,
            )
        ours = {weight: list(tensor.shape) for weight, tensor in model.state_dict().items()}
        assert ours == layout, name


def test_parameter_counts() -> None:
    """Sizes of a ViT-S/16 and a ViT-L/14 with SwiGLU, in millions."""
    with torch.device("meta"):
        small = VisionTransformer(embed_dim=384, depth=12, num_heads=6, init_values=1e-5)
        large = VisionTransformer(
            patch_size=14, embed_dim=1024, depth=24, num_heads=16, ffn_layer="swiglu", init_values=1e-5
        )
    assert sum(p.numel() for p in small.parameters()) / 1e6 == pytest.approx(21.68, abs=0.01)
    assert sum(p.numel() for p in large.parameters()) / 1e6 == pytest.approx(303.66, abs=0.01)


def test_packed_crops_do_not_see_each_other() -> None:
    model = tiny().eval()
    large, small = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)
    together = model([large, small])
    for packed, alone in zip(together, (model(large), model(small)), strict=True):
        torch.testing.assert_close(packed.prenorm, alone.prenorm)
    changed = model([large, small + torch.tensor([1.0, 0, 0]).view(3, 1, 1, 1)])
    torch.testing.assert_close(changed[0].prenorm, together[0].prenorm)
    torch.testing.assert_close(changed[1].prenorm[1:], together[1].prenorm[1:])
    assert not torch.allclose(changed[1].prenorm[0], together[1].prenorm[0])


def test_masks_hide_patches() -> None:
    model = tiny().eval()
    torch.nn.init.normal_(model.mask_token)
    image = torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 0] = True
    other = image.clone()
    other[..., :8, :8] += 1  # the first patch
    torch.testing.assert_close(model(image, mask).prenorm, model(other, mask).prenorm)
    assert not torch.allclose(model(image).prenorm, model(other).prenorm)


def test_registers_come_after_the_class_token() -> None:
    tokens = tiny(num_register_tokens=2).eval()(torch.randn(2, 3, 32, 32))
    assert tokens.registers.shape == (2, 2, 24) and tokens.patches.shape == (2, 16, 24)
    assert tokens.prenorm.shape == (2, 19, 24)


def test_intermediate_layers() -> None:
    model, image = tiny().eval(), torch.randn(2, 3, 32, 16)
    ((patches, cls),) = model.get_intermediate_layers(image, n=[1], reshape=True)
    assert patches.shape == (2, 24, 4, 2)
    torch.testing.assert_close(cls, model(image).cls)
    torch.testing.assert_close(patches.flatten(2).transpose(1, 2), model(image).patches)
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        model.get_intermediate_layers(image, n=[2])


def test_an_image_that_is_no_whole_number_of_patches() -> None:
    with pytest.raises(ValueError, match="30 x 32 pixels is not a whole number of 8-pixel patches"):
        tiny()(torch.zeros(1, 3, 30, 32))


def test_initial_weights() -> None:
    """Which distribution each weight starts from."""
    model = tiny(embed_dim=192, num_register_tokens=4, init_values=1e-5)
    assert not model.mask_token.any()
    assert model.cls_token.detach().std() < 1e-5 and model.register_tokens.detach().std() < 1e-5
    assert model.pos_embed.detach().std() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[0].attn.qkv.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    assert not model.blocks[0].attn.qkv.bias.any()
    assert (model.blocks[0].ls1.gamma == 1e-5).all()
    bound = 1 / (3 * 8 * 8) ** 0.5
    assert bound * 0.95 < model.patch_embed.proj.weight.abs().max() <= bound


def test_no_weight_starts_a_hundred_deviations_away() -> None:
    """In these draws torch's `trunc_normal_` has a -2."""
    positions = tiny(embed_dim=1536, img_size=64).pos_embed.detach()
    assert positions.abs().max() <= 6 * 0.02
    assert positions.std() == pytest.approx(0.02, rel=0.02)


def test_position_embeddings_may_start_larger() -> None:
    """The draws are the same, and so is every other weight."""
    torch.manual_seed(0)
    usual = tiny(embed_dim=192).state_dict()
    torch.manual_seed(0)
    larger = tiny(embed_dim=192, pos_embed_std=0.5).state_dict()
    torch.testing.assert_close(larger["pos_embed"], usual["pos_embed"] * 25)
    assert larger["pos_embed"].std() == pytest.approx(0.5, rel=0.1)
    assert all(torch.equal(larger[name], usual[name]) for name in usual if name != "pos_embed")


def test_position_embeddings_may_start_alike_where_patches_are_near() -> None:
    """By the distance, at the edges too, and as large as without; what is drawn is the same."""
    torch.manual_seed(0)
    usual = tiny(embed_dim=1536, img_size=64).state_dict()
    torch.manual_seed(0)
    blurred = tiny(embed_dim=1536, img_size=64, pos_embed_blur=1 / 8).state_dict()
    assert all(torch.equal(blurred[name], usual[name]) for name in usual if name != "pos_embed")
    assert torch.equal(blurred["pos_embed"][:, 0], usual["pos_embed"][:, 0]), "the class token's has no neighbours"
    grid = blurred["pos_embed"][0, 1:].unflatten(0, (8, 8))  # [8, 8, 1536]
    torch.testing.assert_close(grid.std(-1), torch.full((8, 8), 0.02), rtol=0.1, atol=0)

    def alike(y: int, x: int) -> float:
        return torch.cosine_similarity(grid[3, 3], grid[y, x], dim=0).item()

    for step in (1, 2, 3):  # exp(-step^2 / 4) of two Gaussians of one patch
        expected = math.exp(-(step**2) / 4)
        assert alike(3 + step, 3) == pytest.approx(expected, abs=0.08)
        assert alike(3, 3 + step) == pytest.approx(expected, abs=0.08)
    assert abs(alike(7, 7)) < 0.08


def test_linear_layers_may_keep_the_scale_of_what_goes_through_them() -> None:
    model = tiny(embed_dim=192, linear_init="lecun_normal")
    block = model.blocks[0]
    for layer, inputs in ((block.attn.qkv, 192), (block.attn.proj, 192), (block.mlp.fc1, 192), (block.mlp.fc2, 768)):
        assert layer.weight.detach().std() == pytest.approx(inputs**-0.5, rel=0.05) and not layer.bias.any()
    assert model.pos_embed.detach().std() == pytest.approx(0.02, rel=0.1)


def test_the_keys_bias_is_without_effect_and_without_gradient() -> None:
    """Adding it, as torch's own layer does, changes the output by rounding alone."""
    model, image = tiny().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.bias)
    ours = model(image).cls
    (ours * torch.randn_like(ours)).sum().backward()  # a plain sum of normalised tokens has no gradient
    for block in model.blocks:
        query, key, value = block.attn.qkv.bias.grad.chunk(3)
        assert query.any() and not key.any() and value.any()
    for block in model.blocks:
        block.attn.qkv.forward = lambda x, qkv=block.attn.qkv: torch.nn.Linear.forward(qkv, x)
    torch.testing.assert_close(model(image).cls, ours)


def test_drop_path_rates() -> None:
    assert [block.drop_path for block in tiny(drop_path_rate=0.2, drop_path_uniform=True).blocks] == [0.2, 0.2]
    assert [block.drop_path for block in tiny(drop_path_rate=0.2).blocks] == [0.0, 0.2]


def test_drop_path_keeps_a_subset_and_its_mean() -> None:
    """s = max(int(b * (1 - r)), 1) sequences, scaled by b / s, drawn for each crop size by itself."""
    torch.manual_seed(0)
    groups = [(7, 5), (3, 2)]
    cpu = torch.device("cpu")
    model = tiny(drop_path_rate=0.3, drop_path_uniform=True).train()
    drawn = [model.draw_kept(sequences, cpu)[0] for sequences, _ in groups]
    assert [pair.shape for pair in drawn] == [(2, 4), (2, 2)]
    rows, scale, kept = kept_rows(groups, [pair[0] for pair in drawn], cpu)
    assert kept == [(4, 5), (2, 2)]
    assert len(rows) == 24 == len(set(rows.tolist()))
    assert set(scale[:20].flatten().tolist()) == {7 / 4} and set(scale[20:].flatten().tolist()) == {3 / 2}
    sequence = rows[:20].view(4, 5)
    assert (sequence == sequence[:, :1] + torch.arange(5)).all() and (sequence[:, 0] % 5 == 0).all()
    assert (rows[20:] >= 35).all()

    model = tiny(depth=1, drop_path_rate=0.5, drop_path_uniform=True).double().train()
    block = model.blocks[0]
    x = torch.randn(8 * 4, model.embed_dim, dtype=torch.float64)
    whole = block(x, [(8, 4)])
    mean = torch.stack([block(x, [(8, 4)], model.draw_kept(8, cpu)) for _ in range(3000)]).mean(0)
    # The second branch sees what the first dropped, so the mean is near the whole, not at it.
    assert (mean - whole).norm() < 0.05 * (whole - x).norm()


def test_drop_path_of_one_sequence_keeps_it() -> None:
    drawn = tiny(drop_path_rate=0.9).train().draw_kept(1, torch.device("cpu"))[-1]
    assert drawn.tolist() == [[0], [0]]
    _, scale, kept = kept_rows([(1, 3)], [drawn[0]], torch.device("cpu"))
    assert kept == [(1, 3)] and (scale == 1).all()


def test_every_branch_draws_for_itself_and_all_sequences_alike() -> None:
    torch.manual_seed(0)
    model = tiny(depth=3, drop_path_rate=0.5, drop_path_uniform=True).train()
    drawn = torch.stack([torch.stack(list(model.draw_kept(8, torch.device("cpu")))) for _ in range(500)])
    assert drawn.shape == (500, 3, 2, 4)
    assert all(len(set(kept)) == 4 for kept in drawn.flatten(0, 2).tolist())
    counts = drawn.flatten().bincount()
    torch.testing.assert_close(counts / len(drawn.flatten()), torch.full((8,), 1 / 8), atol=0.01, rtol=0)
    branches = drawn.flatten(1, 2).sort(dim=-1).values  # [500, 6, 4]
    for other in range(1, 6):  # of 70 subsets two are the same in one of 70 draws
        assert (branches[:, 0] == branches[:, other]).all(-1).float().mean() < 0.05


def branch_by_branch(model: VisionTransformer, crops: list[torch.Tensor], kept: list) -> torch.Tensor:
    """Tokens [T, D] before the final norm, as the formula has them: each branch on what is kept for it."""
    embedded = [model._embed(images, None) for images in crops]
    groups = [tuple(x.shape[:2]) for x in embedded]
    x = torch.cat([x.flatten(0, 1) for x in embedded])
    for i, block in enumerate(model.blocks):

        def residual(x, compute, branch, i=i, rate=block.drop_path):
            if rate == 0:
                return x + compute(x, groups)
            rows, scale, packing = kept_rows(groups, [of_group[i][branch] for of_group in kept], x.device)
            return x.index_add(0, rows, compute(x[rows], packing) * scale)

        x = residual(x, lambda y, packing, block=block: block.ls1(block.attn(block.norm1(y), packing)), 0)
        x = residual(x, lambda y, packing, block=block: block.ls2(block.mlp(block.norm2(y))), 1)
    return x


def two_sizes() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(5, 3, 32, 32), torch.randn(7, 3, 16, 16)]


def packed(tokens: list[Tokens]) -> torch.Tensor:
    return torch.cat([t.prenorm.flatten(0, 1) for t in tokens])


@pytest.mark.parametrize("uniform", [True, False])  # False: the first block drops nothing
def test_what_is_kept_is_that_of_dropping_inside_each_branch(uniform: bool) -> None:
    model, crops = tiny(depth=3, drop_path_rate=0.4, drop_path_uniform=uniform).train(), two_sizes()
    kept = [model.draw_kept(len(images), torch.device("cpu")) for images in crops]
    assert torch.equal(packed(model(crops, kept=kept)), branch_by_branch(model, crops, kept))


def test_given_kept_sequences_are_kept_and_only_the_others_drawn() -> None:
    model, crops = tiny(depth=3, drop_path_rate=0.4).train(), two_sizes()
    cpu = torch.device("cpu")
    first, second = model.draw_kept(5, cpu), model.draw_kept(7, cpu)
    assert [None if pair is None else tuple(pair.shape) for pair in first] == [None, (2, 4), (2, 3)]

    before = torch.get_rng_state()
    whole = model(crops, kept=[first, second])
    assert torch.equal(torch.get_rng_state(), before), "nothing was left to draw"
    assert torch.equal(packed(model(crops, kept=[first, second])), packed(whole))
    torch.testing.assert_close(model(crops[0], kept=first).prenorm, whole[0].prenorm)
    other = model(crops, kept=[model.draw_kept(5, cpu), second])
    assert not torch.equal(other[0].prenorm, whole[0].prenorm)
    torch.testing.assert_close(other[1].prenorm, whole[1].prenorm)

    torch.manual_seed(3)
    mixed = model(crops, kept=[first, None])
    torch.manual_seed(3)
    drawn = model.draw_kept(7, cpu)
    assert torch.equal(packed(mixed), packed(model(crops, kept=[first, drawn])))


def test_a_group_may_keep_all_where_another_drops() -> None:
    model, crops = tiny(drop_path_rate=0.4, drop_path_uniform=True).train(), two_sizes()
    kept = model.draw_kept(7, torch.device("cpu"))
    mixed = model(crops, kept=[[None, None], kept])
    torch.testing.assert_close(mixed[0].prenorm, model.eval()(crops[0]).prenorm)
    torch.testing.assert_close(mixed[1].prenorm, model(crops[1], kept=kept).prenorm)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_rows_that_are_asked_for_are_those_of_all_tokens(rate: float, recompute: str) -> None:
    """And so are their gradients."""
    model = tiny(depth=2, drop_path_rate=rate, num_register_tokens=2, recompute=recompute).double().train()
    crops = [images.double() for images in two_sizes()]
    kept = [model.draw_kept(len(images), torch.device("cpu")) for images in crops]
    asked = torch.tensor([3, 0, 17, 11, 19])  # of 5 images of 4 patches
    tokens = model(crops, kept=kept)
    rows = model(crops, kept=kept, patches=[asked, None])
    torch.testing.assert_close([r.cls for r in rows], [t.cls for t in tokens])
    torch.testing.assert_close(rows[0].patches, tokens[0].patches.flatten(0, 1)[asked])
    assert rows[1].patches.shape == (0, model.embed_dim)

    def gradients(first: torch.Tensor, second: torch.Tensor, patches: torch.Tensor) -> tuple:
        loss = first.square().sum() + second.sum() + patches.pow(3).sum()
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    by_rows = gradients(rows[0].cls, rows[1].cls, rows[0].patches)
    by_tokens = gradients(tokens[0].cls, tokens[1].cls, tokens[0].patches.flatten(0, 1)[asked])
    for ours, theirs in zip(by_rows, by_tokens, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_nothing_is_drawn_in_evaluation() -> None:
    model, crops = tiny(drop_path_rate=0.4, drop_path_uniform=True).eval(), two_sizes()
    before = torch.get_rng_state()
    assert model.draw_kept(5, torch.device("cpu")) == [None, None]
    model(crops)
    assert torch.equal(torch.get_rng_state(), before)


def test_kept_sequences_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match="entries for 1 blocks, this network has 2"):
        tiny()(torch.zeros(1, 3, 32, 32), kept=[None])


def test_gradients_flow_through_what_drop_path_keeps() -> None:
    model = tiny(drop_path_rate=0.5, drop_path_uniform=True).train()
    model([torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)])[0].cls.sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == ["mask_token"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Half precision changes little and loses no type on the way."""
    model, image = tiny(drop_path_rate=0.3, init_values=0.5).train(), torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", dtype):
        tokens = model(image)
    assert torch.isfinite(tokens.cls).all()
    model.eval()
    with torch.autocast("cpu", dtype):
        half = model(image).cls.float()
    torch.testing.assert_close(half, model(image).cls, rtol=0.1, atol=0.1)
