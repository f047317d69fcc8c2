"""Options of the whole suite."""

import socket
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    shipped = Path(__file__).parent / "golden" / "data"
    parser.addoption("--golden-dir", default=str(shipped), help="folder of recorded reference numbers")
    parser.addoption("--golden-device", default="cpu", choices=("cpu", "gpu"), help="where its whole steps are trained")


@pytest.fixture
def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
