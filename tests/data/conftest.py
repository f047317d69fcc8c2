"""Small real image files for the tests of the data room."""

import contextlib
import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinocomp.data import CropSettings, Images, MaskSettings, training_loader
from dinocomp.data.convert import convert
from dinocomp.data.loader import Batch

from ..store import Store

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


NAMES = [f"{c}/{c}_{n}.png" for c in ("n1", "n2") for n in range(5)]
SPLITS = [f"train/{name}" for name in NAMES] + ["val/n1/n1_8.png", "val/n2/n2_9.png"]


@pytest.fixture
def layout(tmp_path: Path, write_images) -> Path:
    write_images(tmp_path / "layout", SPLITS)
    return tmp_path / "layout"


@pytest.fixture
def shards(layout: Path, tmp_path: Path) -> Path:
    convert(str(layout), str(tmp_path / "shards"), workers=1, progress=False, part_images=4)
    return tmp_path / "shards"


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An object store with an empty bucket, s3://bucket."""
    folder = tmp_path / "store"
    (folder / "bucket").mkdir(parents=True)
    served = Store(folder)
    for key, value in served.environment.items():
        monkeypatch.setenv(key, value)
    yield served
    served.stop()


def keys(images: Images) -> list[str]:
    return sorted(images[i].key for i in range(len(images)))


def train_on(images: Images, **changes) -> list[Batch]:
    """The batches of a small run."""
    settings = {"batch_size": 5, "iterations": 4, "timeout_seconds": 60} | changes
    crops = CropSettings(global_crops_size=16, local_crops_size=8, local_crops_number=1)
    loader = training_loader(images, crops=crops, masks=MaskSettings((4, 4)), **settings)
    try:
        return list(loader)
    finally:
        if settings.get("num_workers"):  # left to the garbage collector, it takes 5 seconds a worker
            loader._iterator._shutdown_workers()


def samples(batches: list[Batch]) -> list[int]:
    return [number for batch in batches for number in batch["index"].tolist()]


@contextlib.contextmanager
def process(work: Callable[[], None]) -> Iterator[multiprocessing.Process]:
    """A process, and group, of its own that does `work`; gone at the end."""

    def main() -> None:
        os.setpgrp()
        work()

    child = multiprocessing.get_context("fork").Process(target=main)
    child.start()
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.join()
