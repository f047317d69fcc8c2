"""Gauges of collapse: their formulas."""

import math

import pytest
import torch

from dinocomp.method.gauges import feature_std, feature_sums, target_gauges, target_sums


def test_entropy_and_prototypes_in_use() -> None:
    uniform, one_hot = torch.full((6, 8), 1 / 8), torch.eye(8)[[0, 0, 0, 5, 5, 5]]
    found = target_gauges(target_sums(uniform))
    assert found["entropy"] == pytest.approx(math.log(8)) and found["prototypes"] == pytest.approx(8)
    found = target_gauges(target_sums(one_hot))
    assert found["entropy"] == 0 and found["prototypes"] == pytest.approx(2)
    assert target_gauges(target_sums(torch.eye(8)[[3, 3]]))["prototypes"] == pytest.approx(1)
    padded = torch.cat([one_hot, uniform])
    valid = torch.arange(12) < 6
    assert target_gauges(target_sums(padded, valid))["prototypes"] == pytest.approx(2), "padding has no say"
    nothing = torch.zeros(12, dtype=torch.bool)
    assert target_gauges(target_sums(padded, nothing))["entropy"] == 0


def test_spread_of_features() -> None:
    torch.manual_seed(0)
    assert feature_std(feature_sums(torch.randn(4096, 64))) == pytest.approx(1, abs=0.02)
    assert feature_std(feature_sums(torch.randn(1, 64).expand(10, 64) * torch.rand(10, 1))) == pytest.approx(
        0, abs=1e-4
    )
    assert feature_std(feature_sums(torch.randn(64)[None])) == pytest.approx(0, abs=1e-4), "one image has no spread"


def test_sums_of_parts_are_sums_of_the_whole() -> None:
    features, targets = torch.randn(9, 5), torch.rand(9, 7)
    for sums, rows in ((feature_sums, features), (target_sums, targets)):
        parts = sum(sums(part) for part in rows.split([2, 3, 4]))
        torch.testing.assert_close(parts, sums(rows), rtol=1e-5, atol=1e-6)


def test_uniform_targets_are_seen_under_autocast() -> None:
    """Half precision would round the entropy below what counts as a sign of collapse."""
    targets = torch.full((128, 65536), 1 / 65536)
    with torch.autocast("cpu", torch.bfloat16):
        gauges = target_gauges(target_sums(targets))
    assert float(gauges["entropy"]) == pytest.approx(math.log(65536), rel=1e-5)
