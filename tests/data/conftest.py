"""Small real image files for the tests of the data room."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


def picture(seed: int = 0, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A smooth random picture, (width, height)."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def image_bytes(seed: int = 0, file_format: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, file_format)
    return buffer.getvalue()


ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF"}


@pytest.fixture
def png() -> Callable[..., bytes]:
    return image_bytes


@pytest.fixture
def write_images() -> Callable[[Path, Sequence[str]], None]:
    """Writes one distinct image a name; the ending tells the format."""

    def write(root: Path, names: Sequence[str]) -> None:
        for seed, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(seed, ENDINGS[path.suffix.lower()]))

    return write


@pytest.fixture
def smooth() -> torch.Tensor:
    """uint8 [3, 90, 120]."""
    return torch.from_numpy(np.array(picture(3, (120, 90)))).permute(2, 0, 1)
