"""The projection head beyond the recorded numbers."""

import pytest
import torch

from dinocomp.models import DINOHead


def test_size_and_start() -> None:
    with torch.device("meta"):
        head = DINOHead(1024, 65536)
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(23.66, abs=0.01)
    head = DINOHead(16, 400, hidden_dim=32, bottleneck_dim=64)
    assert (head.last_layer.weight_g == 1).all()
    assert head.last_layer.weight_v.detach().std() == pytest.approx(1 / (3 * 64) ** 0.5, rel=0.05)


def test_logits_are_cosines() -> None:
    head = DINOHead(16, 400, hidden_dim=32, bottleneck_dim=8)
    assert head(torch.randn(50, 16)).abs().max() <= 1 + 1e-6


def test_one_layer() -> None:
    head = DINOHead(16, 40, bottleneck_dim=8, nlayers=1)
    assert sorted(head.state_dict()) == ["last_layer.weight_g", "last_layer.weight_v", "mlp.bias", "mlp.weight"]
    assert head(torch.randn(5, 16)).shape == (5, 40)


def test_weights_load_into_torch_weight_norm() -> None:
    """The parametrisation is that of torch's own weight norm."""
    head = DINOHead(16, 40, hidden_dim=32, bottleneck_dim=8)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 40, bias=False), dim=0)
    with torch.no_grad():
        reference.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
        reference.parametrizations.weight.original1.copy_(head.last_layer.weight_v)
    x = torch.randn(5, 8)
    torch.testing.assert_close(head.last_layer(x), reference(x))
