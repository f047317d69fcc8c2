"""Which folder of recorded reference numbers the golden tests compare with."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Recording:
    """One file: tensors by name, and the settings they were made with."""

    name: str
    meta: dict
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with `prefix`, without it."""
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}


def read(path: Path) -> Recording:
    with safe_open(path, "pt") as file:
        meta = json.loads((file.metadata() or {}).get("meta", "{}"))
        return Recording(path.stem, meta, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


PREFIXES = ("backbone_", "head", "dino_loss", "ibot_loss", "koleo_loss", "schedules_", "steps_")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a parameter `backbone_file`, `head_file`, ... runs once for each file of that prefix."""
    folder = Path(metafunc.config.getoption("--golden-dir"))
    if not any(file for prefix in PREFIXES for file in folder.glob(f"{prefix}*.safetensors")):
        raise pytest.UsageError(f"--golden-dir {folder} holds no file named like {', '.join(PREFIXES)}")
    for prefix in PREFIXES:
        argument = prefix.strip("_") + "_file"
        if argument in metafunc.fixturenames:
            files = sorted(folder.glob(f"{prefix}*.safetensors"))
            metafunc.parametrize(argument, files, ids=[f.stem for f in files])


@pytest.fixture
def golden_dir(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--golden-dir"))


@pytest.fixture
def golden_device(request: pytest.FixtureRequest) -> str:
    """Where whole steps are trained: cpu or gpu."""
    return request.config.getoption("--golden-device")


def assert_close(ours: Tensor, reference: Tensor, tolerance: float, what: str = "") -> None:
    """|ours - reference| within `tolerance` of the reference's size, in L2 over the whole tensor and, for each element,
    of its largest element."""
    assert ours.shape == reference.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    ours, reference = ours.double(), reference.double()
    difference = ours - reference
    scale = reference.norm().item()
    assert difference.norm().item() <= tolerance * max(scale, 1e-12), (
        f"{what}: relative difference {difference.norm().item() / max(scale, 1e-12):.2e} > {tolerance}"
    )
    if reference.numel():
        assert difference.abs().max() <= tolerance * max(reference.abs().max().item(), 1e-12), what
    assert torch.isfinite(ours).all(), what
