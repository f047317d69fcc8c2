"""Steps in micro-batches, and losses over the rows of several ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinocomp.data import split_batch
from dinocomp.distributed import all_gather
from dinocomp.method.losses import SinkhornKnopp, koleo_gradient, koleo_loss, with_gradient

from .test_dinov2 import tiny

SEPARATE = {"train__centering": "sinkhorn_knopp", "ibot__separate_head": "true"}


def step(size: int, *, number: int = 8, **changes) -> tuple[dict, dict, object]:
    """Terms and gradients of one optimizer step in micro-batches of `size`, and the model."""
    model, batch = tiny(number, student__layerscale="null", **changes)
    parts = split_batch(batch, size)
    model.begin_step(parts)
    for part in parts:
        loss = model.loss(model(part), part)["total"]
        (loss * len(part["index"]) / number).backward()
    return dict(model.terms), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__centering": "sinkhorn_knopp"},
        SEPARATE,
        {"dino__loss_weight": 0},
        {"ibot__loss_weight": 0},
        {"performance__device_augment": "true"},
    ],
    ids=["centering", "sinkhorn", "separate heads", "no DINO", "no iBOT", "colours on the device"],
)
@pytest.mark.parametrize("size", [4, 2, 1, 3])
def test_terms_and_gradients_are_those_of_the_whole_batch(changes: dict, size: int) -> None:
    """On each loss, also where micro-batches are of unequal size."""
    terms, gradients, whole = step(8, **changes)
    ours, our_gradients, parts = step(size, **changes)
    assert ours.keys() == terms.keys() and our_gradients.keys() == gradients.keys()
    for name, term in terms.items():
        torch.testing.assert_close(ours[name], term, rtol=1e-6, atol=1e-7, msg=name)
    for name, gradient in gradients.items():
        error = (our_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < 2e-5, (name, float(error))
    for model in (whole, parts):
        model.momentum = 0.9
        model.update_teacher()
    if "train__centering" not in changes:
        torch.testing.assert_close(parts.dino_targets.center, whole.dino_targets.center)
        torch.testing.assert_close(parts.ibot_targets.center, whole.ibot_targets.center)


def test_a_step_that_is_begun_again_forgets_its_first_try() -> None:
    """As where a micro-batch did not fit in memory."""
    model, batch = tiny(8, student__layerscale="null")
    for size, passes in ((8, 1), (4, 1), (2, 4)):
        model.zero_grad()
        parts = split_batch(batch, size)
        model.begin_step(parts)
        for part in parts[:passes]:
            (model.loss(model(part), part)["total"] * len(part["index"]) / 8).backward()
    model.update_teacher()
    terms, gradients, whole = step(8)
    whole.update_teacher()
    for name, term in terms.items():
        torch.testing.assert_close(model.terms[name], term)
    torch.testing.assert_close(model.dino_targets.center, whole.dino_targets.center)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found["student_backbone.net.norm.weight"], gradients["student_backbone.net.norm.weight"])


def test_drop_path_is_the_same_when_looking_ahead() -> None:
    """KoLeo's neighbours are found among the very features that are trained on."""
    model, batch = tiny(8, student__layerscale="null", student__drop_path_rate=0.5)
    model.train()
    parts = split_batch(batch, 2)
    model.begin_step(parts)
    seen, said = [], None
    for part in parts:
        outputs = model(part)
        seen.append(outputs.cls.detach())  # [2, b, D]
        said = [loss for loss, _ in outputs.part.koleo]
    for loss, view in zip(said, torch.cat(seen, dim=1), strict=True):
        torch.testing.assert_close(loss, koleo_loss(view))


def test_koleos_gradient_is_that_of_its_loss() -> None:
    x = torch.randn(9, 6, requires_grad=True)
    expected = koleo_loss(x)
    (gradient,) = torch.autograd.grad(expected, x)
    loss, ours = koleo_gradient(x, all_ranks=False)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, gradient)
    scalar = with_gradient(loss, ours, x)
    assert float(scalar) == float(loss)
    torch.testing.assert_close(torch.autograd.grad(scalar, x)[0], gradient)


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 0, 6], [2, 2, 2, 1]])
def test_sinkhorn_in_parts(sizes: list[int]) -> None:
    """Rows of very different size, and padding, in parts of which one may be empty."""
    logits = torch.randn(7, 12) * torch.tensor([1, 30, 0.1, 3, 100, 1, 1])[:, None]
    valid = torch.tensor([True, True, False, True, True, True, False])
    maker, swept = SinkhornKnopp(3), 0

    def sweep():
        nonlocal swept
        swept += 1
        return zip(logits.split(sizes), valid.split(sizes), strict=True)

    columns = maker.columns(sweep, 0.05)
    assert swept == 3, "once an iteration"
    ours = [maker(part, 0.05, rows, columns) for part, rows in sweep()]
    torch.testing.assert_close(
        torch.cat([part.dense() for part in ours]), maker(logits, 0.05, valid).dense(), rtol=1e-4, atol=1e-7
    )


def _rank(rank: int, world: int, port: int, x: torch.Tensor, results: dict) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    mine = x.chunk(world)[rank]
    rows, found, ranks = all_gather(mine)
    assert torch.equal(rows, x) and (found, ranks) == (rank, world)
    results[rank] = koleo_gradient(mine, all_ranks=True)
    dist.destroy_process_group()


def test_koleo_over_ranks_is_koleo_over_rows(free_port: int) -> None:
    x = torch.randn(8, 5)
    x[6] = x[1] + 1e-3  # neighbours on other ranks
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (2, free_port, x, results), nprocs=2)
        losses, gradients = zip(*(results[rank] for rank in range(2)), strict=True)
    expected, gradient = koleo_gradient(x, all_ranks=False)
    for loss in losses:
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient)  # DDP averages over ranks
