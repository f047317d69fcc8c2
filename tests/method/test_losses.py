"""Loss terms and targets in the corners."""

import math

import pytest
import torch
import torch.multiprocessing as mp

from dinocomp.method.losses import (
    Centering,
    SinkhornKnopp,
    Targets,
    build_targets,
    dino_loss,
    ibot_loss,
    koleo_loss,
)
from dinocomp.method.losses.cross_entropy import cross_entropy


def softmax(logits: torch.Tensor) -> Targets:
    """softmax(logits) as targets, [rows, K]."""
    zeros = torch.zeros(logits.shape)
    return Targets(logits, torch.ones(()), zeros[:, 0], zeros[0], logits.float().logsumexp(-1))


def test_dino_without_local_crops_is_the_mean_over_two_pairs() -> None:
    targets, student = softmax(torch.randn(6, 5)), torch.randn(2, 3, 5)
    part, local = dino_loss(targets, student, None, 0.1)
    expected = -(targets.dense().view(2, 3, 5) * torch.log_softmax(student / 0.1, -1)).sum(-1).mean()
    assert local is None
    torch.testing.assert_close(part, expected)


def test_dino_is_the_mean_over_all_pairs() -> None:
    """Written out pair by pair: 2 global and 2 * L local ones, each pair a mean over the images."""
    known = softmax(torch.randn(6, 5))
    targets = known.dense().view(2, 3, 5)
    globals_, locals_ = torch.randn(2, 3, 5), torch.randn(4, 3, 5)
    pairs = [(targets[v], globals_[v]) for v in range(2)] + [(targets[v], crop) for v in range(2) for crop in locals_]
    expected = sum(-(t * torch.log_softmax(s / 0.1, -1)).sum(-1).mean() for t, s in pairs) / len(pairs)
    assert len(pairs) == 10
    torch.testing.assert_close(sum(dino_loss(known, globals_, locals_, 0.1)), expected)


def test_ibot_weighs_crops_alike_and_counts_unmasked_ones() -> None:
    masks = torch.zeros(4, 6, dtype=torch.bool)
    masks[0, :1], masks[2, :4] = True, True
    targets, logits = softmax(torch.randn(5, 7)), torch.randn(5, 7)
    terms = -(targets.dense() * torch.log_softmax(logits / 0.1, -1)).sum(-1)
    expected = (terms[0] + terms[1:].mean()) / 4
    weight = torch.tensor([1.0, 0.25, 0.25, 0.25, 0.25])
    torch.testing.assert_close(ibot_loss(targets, logits, weight, 4, 0.1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient_are_those_of_autograd(dtype: torch.dtype, monkeypatch) -> None:
    """Some rows at a time or all at once, several crops, several views, and a row of zeros."""
    views, crops = softmax(torch.randn(2 * 7, 11).to(dtype)).unflatten(2, 7), torch.randn(3, 7, 11).to(dtype)
    views.row[1, 4] = torch.inf
    grad = torch.rand(3, 7)
    plain = crops.clone().requires_grad_()
    terms = -(views.dense().sum(0) * torch.log_softmax(plain.float() / 0.1, -1)).sum(-1)
    terms.backward(grad)
    for at_a_time in (1, 120, 1 << 20):
        monkeypatch.setattr("dinocomp.method.losses.cross_entropy.AT_A_TIME", {"cpu": at_a_time})
        ours = crops.clone().requires_grad_()
        found = cross_entropy(views, ours, 0.1)
        found.backward(grad)
        torch.testing.assert_close(found, terms, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-4)


def test_targets_of_some_rows() -> None:
    known = Centering(11, 0.9)(torch.randn(6, 11), 0.1)
    assert len(known) == 6 and torch.equal(known[2:4].dense(), known.dense()[2:4])


def test_koleo_of_twins_and_of_one_image_is_finite() -> None:
    x = torch.randn(8, 16)
    x[1] = x[0]
    for rows in (x, x[:1], torch.ones(4, 16), torch.zeros(4, 16)):
        rows = rows.clone().requires_grad_()
        loss = koleo_loss(rows)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(rows.grad).all()
    # Its own neighbour, at a distance of the epsilon alone: 15.4 for the 384 channels of a ViT-S.
    torch.testing.assert_close(koleo_loss(torch.randn(1, 384)), torch.tensor(-math.log((384**0.5 + 1) * 1e-8)))


def test_koleo_looks_for_others_also_when_they_point_away() -> None:
    """Two rows at 120 degrees: their cosine is below 0, and they are each other's nearest all the same."""
    x = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5]])
    torch.testing.assert_close(koleo_loss(x), torch.tensor(-math.log(3**0.5)))


def test_koleo_is_fp32_under_autocast() -> None:
    x = torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(koleo_loss(x), koleo_loss(x.double()).float())


@pytest.mark.parametrize("name", ["centering", "sinkhorn_knopp"])
def test_padding_rows_change_nothing(name: str) -> None:
    logits = torch.randn(6, 9)
    padded = torch.cat([logits, torch.full((3, 9), 50.0)])
    valid = torch.arange(9) < 6
    plain, with_padding = (build_targets(name, 9, momentum=0.9, iterations=3) for _ in range(2))
    for _ in range(2):
        expected, ours = plain(logits, 0.05).dense(), with_padding(padded, 0.05, valid).dense()
        torch.testing.assert_close(ours[:6], expected)
        assert torch.isfinite(ours).all()
        plain.step()
        with_padding.step()


def test_centre_moves_once_a_step_by_all_rows() -> None:
    a, b = torch.randn(4, 5), torch.randn(2, 5)
    centering = Centering(5, 0.9)
    for rows in (a, b):  # micro-batches of unequal size
        torch.testing.assert_close(centering(rows, 0.1).dense(), torch.softmax(rows / 0.1, -1))
    centering.step()
    torch.testing.assert_close(centering.center[0], 0.1 * torch.cat([a, b]).mean(0))
    before = centering.center.clone()
    centering(a, 0.1, torch.zeros(4, dtype=torch.bool))  # nothing masked: nothing known
    centering.step()
    torch.testing.assert_close(centering.center, before)


@pytest.mark.parametrize("name", ["centering", "sinkhorn_knopp"])
def test_targets_are_fp32_under_autocast(name: str) -> None:
    logits = torch.randn(6, 9) + 3
    plain, cast = (build_targets(name, 9, momentum=0.9, iterations=3) for _ in range(2))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            ours = cast(logits, 0.05).dense()
            cast.step()
        assert torch.equal(ours, plain(logits, 0.05).dense())
        plain.step()


def test_sinkhorn_balances() -> None:
    targets = SinkhornKnopp(50)(torch.randn(40, 8), 0.3).dense()
    torch.testing.assert_close(targets.sum(1), torch.ones(40))
    torch.testing.assert_close(targets.sum(0), torch.full((8,), 5.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1e2, 1e4])
def test_sinkhorn_of_any_logits_gives_distributions(scale: float) -> None:
    """Also for rows far below the batch's largest logit, and where one row is far above all others."""
    logits = scale * torch.randn(12, 20)
    logits[0, 0] += 100 * scale
    targets = SinkhornKnopp(3)(logits, 0.04).dense()
    torch.testing.assert_close(targets.sum(1), torch.ones(12))
    assert SinkhornKnopp(3)(torch.zeros(0, 20), 0.04).dense().shape == (0, 20)


def test_unknown_targets() -> None:
    with pytest.raises(ValueError, match="centering and sinkhorn_knopp"):
        build_targets("center", 4, momentum=0.9, iterations=3)


def test_step_zero_values() -> None:
    """With K prototypes and bottleneck d, cross-entropy starts near ln K + 50 / d."""
    torch.manual_seed(0)
    prototypes, bottleneck, batch, local = 65536, 256, 4, 8

    def logits(rows: int) -> torch.Tensor:
        x = torch.nn.functional.normalize(torch.randn(rows, bottleneck), dim=1)
        return x @ weight.T

    weight = torch.nn.functional.normalize(torch.randn(prototypes, bottleneck), dim=1)
    targets = Centering(prototypes, 0.9)(logits(2 * batch), 0.04)
    parts = dino_loss(
        targets, logits(2 * batch).unflatten(0, (2, batch)), logits(local * batch).view(local, batch, -1), 0.1
    )
    assert math.log(prototypes) + 50 / bottleneck == pytest.approx(11.286, abs=1e-3)
    assert parts[0] == pytest.approx(1.254, abs=0.02) and parts[1] == pytest.approx(10.032, abs=0.03)


def _rank(rank: int, world: int, port: int, logits: torch.Tensor, results) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    mine = logits[:3] if rank == 0 else logits[3:]  # unequal shares
    centering = Centering(logits.shape[1], 0.9)
    centering(mine, 0.05)
    centering.step()
    results[rank] = (SinkhornKnopp(3)(mine, 0.05).dense(), centering.center)
    torch.distributed.destroy_process_group()


def test_two_ranks_with_unequal_shares_are_one(free_port: int) -> None:
    """Sinkhorn and the centre are over all ranks' rows, whoever has how many."""
    logits = torch.randn(8, 12)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (2, free_port, logits, results), nprocs=2)
        targets = torch.cat([results[0][0], results[1][0]])
        centers = [results[0][1], results[1][1]]
    torch.testing.assert_close(targets, SinkhornKnopp(3)(logits, 0.05).dense())
    for center in centers:
        torch.testing.assert_close(center[0], 0.1 * logits.mean(0))


@pytest.mark.slow
def test_compiled_losses_are_eager_ones_but_for_rounding() -> None:
    """In half precision; of fp32 and of centring whole runs are compared (tests/test_performance.py)."""
    teacher, student, local = (torch.randn(40, 512).bfloat16() for _ in range(3))
    valid, weight = torch.arange(40) < 37, torch.rand(40)
    found = []
    for by_compiled in (False, True):
        maker = build_targets("sinkhorn_knopp", 512, momentum=0.9, iterations=3, by_compiled=by_compiled)
        masked, crops = student.clone().requires_grad_(), local[:30].clone().requires_grad_()
        targets = maker(teacher, 0.05, valid)
        views, of_local = crops.unflatten(0, (5, 6)).split([2, 3])
        parts = dino_loss(maker(teacher[:12], 0.05), views, of_local, 0.1)
        loss = ibot_loss(targets, masked, weight, 12, 0.1) + sum(parts)
        loss.backward()
        found.append([targets.dense(), loss.detach(), masked.grad.float(), crops.grad.float()])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
