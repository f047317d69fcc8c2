"""How prototypes are used, by hand."""

import pytest
import torch

from dinocomp.pictures import prototype_usage, prototypes_picture

# Three images prefer the prototypes 2, 2 and 0; number 3 is all but impossible.
LOGITS = torch.tensor([[0.0, 0.1, 0.3, -9.0], [0.1, 0.0, 0.2, -9.0], [0.4, 0.1, 0.0, -9.0]])


def test_counts_and_effective_number() -> None:
    usage = prototype_usage(LOGITS, temperature=0.1)
    assert usage.picked.tolist() == [1, 0, 2, 0] and usage.images == 3 and usage.unpicked == 2
    mean = (LOGITS.double() / 0.1).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(usage.probability / 3, mean, atol=1e-6, rtol=1e-5)
    expected = torch.exp(-(mean[:3] * mean[:3].log()).sum())
    assert usage.effective == pytest.approx(float(expected), rel=1e-4) and 1 < usage.effective < 3


def test_batches_add_up() -> None:
    whole, parts = prototype_usage(LOGITS, 0.1), prototype_usage(LOGITS[:1], 0.1) + prototype_usage(LOGITS[1:], 0.1)
    assert torch.equal(whole.picked, parts.picked) and whole.images == parts.images
    torch.testing.assert_close(whole.probability, parts.probability)


def test_extremes() -> None:
    assert prototype_usage(torch.zeros(5, 64), 0.04).effective == pytest.approx(64)
    collapsed = torch.zeros(5, 64)
    collapsed[:, 7] = 100.0
    usage = prototype_usage(collapsed, 0.04)
    assert usage.effective == pytest.approx(1) and usage.unpicked == 63
    for some in (usage, prototype_usage(torch.zeros(5, 64), 0.04), prototype_usage(torch.randn(50, 5000), 0.07)):
        assert prototypes_picture(some, note="By the way.").width == 780
