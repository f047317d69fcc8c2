"""A tiny backbone, exported."""

import os
import re
from pathlib import Path

import torch
from PIL import Image

from dinocomp.interop import save_teacher
from dinocomp.interop.export import export
from dinocomp.models import VisionTransformer

SIZE = 56  # pixels, 4 x 4 patches
OTHER_SIZES = ((42, 42), (84, 84), (70, 42))
ARCHITECTURE = {
    "img_size": SIZE,
    "patch_size": 14,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "init_values": 1.0,
    "interpolate_offset": 0.1,
}
PORTABLE = {"interpolate_offset": 0.0, "interpolate_antialias": True}
NO_BIASES = {"qkv_bias": False, "proj_bias": False, "ffn_bias": False, "init_values": None}
ABOUT = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "view": (64, SIZE), "iteration": 250}


def make_teacher(path: Path, config: str = "", **changes) -> VisionTransformer:
    """Writes a teacher whose weights all matter: none is left at 0 or 1."""
    architecture = ARCHITECTURE | changes
    net = VisionTransformer(**architecture)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + 0.05)
    save_teacher(path, {"backbone": net.state_dict()}, architecture=architecture, config=config, **ABOUT)
    return net.eval().requires_grad_(False)


def exported(target: str, folder: Path, size: int | None = None, **changes) -> tuple[VisionTransformer, Path, str]:
    """The network, the folder it was exported to, and what was said of other sizes."""
    net = make_teacher(folder / "teacher.safetensors", **changes)
    said = export(str(folder / "teacher.safetensors"), target, folder / target, size)
    return net, folder / target, said


def images(height: int, width: int | None = None, number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def photo(path: Path) -> None:
    """A smooth picture, larger than any view."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 100), torch.linspace(0, 1, 140), indexing="ij")
    waves = torch.stack([(5 * x).sin() ** 2, (4 * y).cos() ** 2, x * y], dim=-1)  # [100, 140, 3]
    Image.fromarray((waves * 255).byte().numpy()).save(path, quality=95)


def code_of(card: Path) -> list[str]:
    """The Python of a model card."""
    return re.findall(r"^```python\n(.*?)^```", card.read_text(), re.DOTALL | re.MULTILINE)


def run_code(folder: Path, code: str) -> dict:
    """What a card's code makes, run in its folder."""
    photo(folder / "photo.jpg")
    names: dict = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(code, "card", "exec"), names)
    finally:
        os.chdir(before)
    return names
