"""Losses that were measured in KoLeo's place."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.rivals import RIVALS, kde


@pytest.mark.parametrize("name", RIVALS)
def test_features_that_are_alike_cost_more_and_are_moved_apart(name: str) -> None:
    torch.manual_seed(0)
    spread = torch.randn(64, 16)
    alike = (1 + 0.01 * torch.randn(64, 16)).requires_grad_()
    loss = RIVALS[name](alike)
    assert loss > RIVALS[name](spread) + 0.1
    (gradient,) = torch.autograd.grad(loss, alike)

    def similarity(x: torch.Tensor) -> torch.Tensor:
        z = F.normalize(x, dim=-1)
        return (z @ z.T).mean()

    assert similarity(alike - 0.1 * gradient / gradient.norm()) < similarity(alike)


def test_kde_of_two_orthogonal_rows() -> None:
    """Each has one neighbour, at a cosine of 0."""
    assert kde(torch.eye(2), kappa=4.0) == pytest.approx(-4)
