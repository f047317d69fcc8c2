"""Options of the whole suite."""

import os
import socket
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    shipped = Path(__file__).parent / "golden" / "data"
    parser.addoption("--golden-dir", default=str(shipped), help="folder of recorded reference numbers")
    parser.addoption("--golden-device", default="cpu", choices=("cpu", "gpu"), help="where its whole steps are trained")


def pytest_configure(config: pytest.Config) -> None:
    """Tests that run side by side share the cores, and so do the processes that they start."""
    if side_by_side := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        threads = max(1, (os.cpu_count() or 1) // side_by_side)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """A test that draws random tensors draws the same ones in each run of it."""
    torch.manual_seed(0)


@pytest.fixture
def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def one_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs share the digits' shards, but not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
