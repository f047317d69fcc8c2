"""The ComposerModel beyond the recorded steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dinocomp.build import build_model, crop_settings, mask_settings
from dinocomp.config import load_config
from dinocomp.data import Batch, batch_masks, max_masked_patches
from dinocomp.data.crops import draw_crops
from dinocomp.data.device import pack
from dinocomp.method import DINOv2
from dinocomp.method.ema import ema_update
from dinocomp.method.parts import PatchRows
from dinocomp.pictures import coloured

from ..helpers import CURRICULUM, TINY


def tiny(batch_size: int = 4, **changes) -> tuple[DINOv2, Batch]:
    """A small model in fp32 and a batch of noise for it."""
    keys = TINY | {"train.batch_size_per_gpu": batch_size, "student.drop_path_rate": 0}
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    config = load_config(None, [f"{name}={value}" for name, value in keys.items()]).config
    torch.manual_seed(0)
    model = build_model(config)
    model.teacher_temp, model.momentum = 0.05, 0.99  # as a callback would
    return model, noise(config, batch_size, step=0)


def noise(config, batch_size: int, step: int) -> Batch:
    def pixels(count: int, side: int) -> torch.Tensor:
        return torch.randint(256, (batch_size, count, 3, side, side), dtype=torch.uint8)

    masks = batch_masks(mask_settings(config), 0, step, batch_size, np.arange(batch_size))
    batch = Batch(
        global_crops=pixels(2, config.crops.global_crops_size),
        local_crops=pixels(config.crops.local_crops_number, config.crops.local_crops_size),
        masks=torch.from_numpy(masks),
        index=torch.arange(batch_size),
    )
    if config.performance.device_augment:
        settings, rng = crop_settings(config), np.random.default_rng(step)
        drawn = torch.tensor(
            [[pack(crop) for crop in draw_crops(32, 32, settings, rng)] for _ in range(batch_size)]
        )  # [B, 2 + L, P]
        batch |= {"global_colours": drawn[:, :2], "local_colours": drawn[:, 2:]}
    return batch


def test_masked_rows_and_their_weights() -> None:
    masks = torch.zeros(4, 6, dtype=torch.bool)
    masks[1, 2], masks[3, [0, 1, 4]] = True, True
    exact, padded = PatchRows.of(masks, None), PatchRows.of(masks, 7)
    assert exact.index.tolist() == [8, 18, 19, 22] == padded.index[:4].tolist()
    assert padded.valid.tolist() == [True] * 4 + [False] * 3
    assert exact.weight.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert padded.weight.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0])
    assert len(PatchRows.of(masks, 100).index) == 24, "no more rows than patches"


def test_colours_are_changed_before_the_networks_see_the_crops() -> None:
    """Of the global and the local crops alike: the terms are those of a model that is shown the changed ones."""
    ours, batch = tiny(performance__device_augment="true")
    terms = ours.loss(ours(batch), batch)
    plain, _ = tiny()
    shown = coloured(batch, ours.colours)
    assert not torch.equal(shown["global_crops"], batch["global_crops"])
    assert not torch.equal(shown["local_crops"], batch["local_crops"])
    assert plain.loss(plain(shown), shown).keys() == terms.keys()
    for name, term in ours.terms.items():
        assert torch.equal(term, plain.terms[name]), name


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_padding_changes_neither_terms_nor_gradients(centering: str) -> None:
    results = []
    for limit in (None, 40):
        model, batch = tiny(train__centering=centering, ibot__separate_head="true")
        model.max_masked = {} if limit is None else {(4, 16): limit}
        for _ in range(2):  # the second time with a centre
            model.zero_grad()
            total = model.loss(model(batch), batch)["total"]
            total.backward()
            model.update_teacher()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((dict(model.terms), gradients))
    for name, term in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], term, rtol=1e-6, atol=0)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-7)


def test_the_configured_limit_is_never_exceeded() -> None:
    model, _ = tiny(batch_size=8)
    config = load_config(None, [f"{name}={value}" for name, value in TINY.items()]).config
    most = max_masked_patches(mask_settings(config), 8, 1)
    assert model.max_masked == {(8, 16): most}
    counts = [int(noise(config, 8, step)["masks"].sum()) for step in range(50)]
    assert 0.7 * most < max(counts) <= most


def test_smaller_crops_at_first_have_a_limit_of_their_own() -> None:
    model, _ = tiny(batch_size=8, **CURRICULUM)
    config = load_config(None, [f"{name}={value}" for name, value in TINY.items()]).config
    whole, small = mask_settings(config), replace(mask_settings(config), grid=(3, 3))
    limits = {16: max_masked_patches(whole, 8, 1), 9: max_masked_patches(small, 8, 1)}
    assert model.max_masked == {(8, patches): limit for patches, limit in limits.items()}
    for side, settings in ((16, whole), (12, small)):
        batch = noise(config, 8, 0) | {
            "global_crops": torch.randint(256, (8, 2, 3, side, side), dtype=torch.uint8),
            "masks": torch.from_numpy(batch_masks(settings, 0, 0, 8, np.arange(8))),
        }
        outputs = model(batch)
        assert len(outputs.ibot_logits) == len(outputs.asked.index) == limits[settings.patches]
        assert torch.isfinite(model.loss(outputs, batch)["total"])


def test_only_the_student_learns_and_all_of_it() -> None:
    model, batch = tiny(ibot__separate_head="true")
    model.loss(model(batch), batch)["total"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("student_"), name


@pytest.mark.parametrize(
    "changes",
    [
        {"ibot__loss_weight": 0},
        {"crops__local_crops_number": 0},
        {"dino__loss_weight": 0},
        {"dino__loss_weight": 0, "ibot__separate_head": "true"},
        {"ibot__mask_sample_probability": 0.01, "ibot__separate_head": "true"},
    ],
    ids=str,
)
def test_every_trainable_parameter_has_a_gradient_with_a_loss_off(changes: dict) -> None:
    """Else data-parallel training stops with an error about unused parameters."""
    model, batch = tiny(**changes)
    model.loss(model(batch), batch)["total"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_total_is_the_sum_of_the_weighted_terms() -> None:
    model, batch = tiny()
    model.loss(model(batch), batch)
    plain = dict(model.terms)
    weighted, _ = tiny(dino__loss_weight=2, ibot__loss_weight=0.5, dino__koleo_loss_weight=0.3)
    total = weighted.loss(weighted(batch), batch)["total"]
    factors = {"dino_global": 2, "dino_local": 2, "ibot": 0.5, "koleo": 3}
    for name, term in weighted.terms.items():
        torch.testing.assert_close(term, factors[name] * plain[name])
    torch.testing.assert_close(total.detach(), sum(weighted.terms.values()))


def test_teacher_follows() -> None:
    model, _ = tiny()
    before = {n: p.clone() for n, p in model.networks("teacher")["backbone"].named_parameters()}
    student = dict(model.networks("student")["backbone"].named_parameters())
    with torch.no_grad():
        for p in student.values():
            p.add_(1)
    model.momentum = 0.9
    model.update_teacher()
    for name, p in model.networks("teacher")["backbone"].named_parameters():
        torch.testing.assert_close(p, before[name] + 0.1)
    model.momentum = 1.0
    after = {n: p.clone() for n, p in model.networks("teacher")["backbone"].named_parameters()}
    model.update_teacher()
    assert all(torch.equal(p, after[n]) for n, p in model.networks("teacher")["backbone"].named_parameters())


def test_ema_without_foreach(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = [torch.randn(5), torch.randn(2, 3)], [torch.randn(5), torch.randn(2, 3)]
    expected = [0.75 * t + 0.25 * s for t, s in zip(teacher, student, strict=True)]
    slow = [t.clone() for t in teacher]
    ema_update(teacher, student, 0.75)
    monkeypatch.delattr(torch, "_foreach_lerp_")
    ema_update(slow, student, 0.75)
    for ours in (teacher, slow):
        for t, e in zip(ours, expected, strict=True):
            torch.testing.assert_close(t, e)


def test_layout_that_sharding_needs() -> None:
    """Children are flat and hold everything; shells have no parameter of their own."""
    model, _ = tiny(ibot__separate_head="true")
    assert not list(model.parameters(recurse=False)) and not list(model.buffers(recurse=False))
    children = dict(model.named_children())
    for role in ("student", "teacher"):
        for name in ("backbone", "dino_head", "ibot_head"):
            shell = children[f"{role}_{name}"]
            assert not list(shell.parameters(recurse=False)) and list(shell.net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_losses_in_fp32(dtype: torch.dtype) -> None:
    model, batch = tiny(student__drop_path_rate=0.3, train__centering="sinkhorn_knopp")
    with torch.autocast("cpu", dtype):
        outputs = model(batch)
        total = model.loss(outputs, batch)["total"]
    assert {total.dtype, outputs.dino_targets.dense().dtype, outputs.ibot_targets.dense().dtype} == {torch.float32}
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_first_steps_of_a_run() -> None:
    """65,536 prototypes behind a bottleneck of 256 start near 10.03 (local), 1.25 (global), 5.64 (iBOT).

    These are the terms of targets that know nothing of the student's logits. In the very first step they do: the
    teacher is the student, and LayerScale hides the image from the class token, so both have the same logits (9.2
    instead of 10.0). A few steps later the centre has taken what all images share, before anything is learnt.
    """
    changes = {"dino__head_n_prototypes": 65536, "dino__head_bottleneck_dim": 256, "crops__local_crops_number": 8}
    model, batch = tiny(**changes)
    model.teacher_temp = 0.04
    with torch.no_grad():
        for _ in range(40):
            model.loss(model(batch), batch)
            model.update_teacher()
    assert float(model.terms["dino_local"]) == pytest.approx(10.03, abs=0.05)
    assert float(model.terms["dino_global"]) == pytest.approx(1.254, abs=0.01)
    assert float(model.terms["ibot"]) == pytest.approx(5.64, abs=0.1)
