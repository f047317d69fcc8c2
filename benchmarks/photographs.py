"""Photographs made of noise: as costly to decode and to crop as real ones, without any."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dinocomp.data.convert import convert

_SLOPE = 1.15  # the spectrum of amplitudes falls as 1 / frequency to this power; photographs have about 1 to 1.2
_SHADES = (48.0, 12.0, 10.0)  # standard deviation of luma and of the two colour differences
_SHAPES = 12  # plain surfaces with sharp edges


def photograph(seed: int, width: int = 500, height: int = 375) -> Image.Image:
    """A picture with the spectrum of a photograph, soft colours and some hard edges; a function of its arguments."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]  # [H, 1], [1, W / 2 + 1]
    fall = np.maximum(np.hypot(rows, columns), 1 / max(width, height)) ** -_SLOPE  # [H, W / 2 + 1]
    planes = []
    for deviation in _SHADES:
        noise = np.fft.rfft2(rng.standard_normal((height, width)))  # [H, W / 2 + 1]
        plane = np.fft.irfft2(noise * fall, s=(height, width))  # [H, W]
        planes.append(plane * (deviation / plane.std()))
    pixels = np.stack(planes, -1) + np.array([115.0, 128.0, 128.0])  # [H, W, 3], luma and colour differences
    for _ in range(_SHAPES):
        centre, radius = rng.uniform(0, (height, width)), rng.uniform(0.03, 0.2) * height
        y, x = np.ogrid[:height, :width]
        inside = np.hypot(y - centre[0], (x - centre[1]) * rng.uniform(0.5, 2)) < radius  # [H, W]
        pixels[inside] = 0.4 * pixels[inside] + 0.6 * rng.normal([115.0, 128.0, 128.0], [60.0, 20.0, 20.0])
    planes = [Image.fromarray(plane) for plane in np.clip(pixels, 0, 255).astype(np.uint8).transpose(2, 0, 1)]
    return Image.merge("YCbCr", planes).convert("RGB")


def jpeg(seed: int, width: int = 500, height: int = 375, quality: int = 90) -> bytes:
    """The same as a baseline JPEG; about 90 KB at 500 x 375 pixels, which is about what ImageNet's have."""
    buffer = io.BytesIO()
    photograph(seed, width, height).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_shards(folder: Path, number: int, width: int = 500, height: int = 375) -> Path:
    """`number` such JPEGs in shards; their folder, to give as `train.dataset_path`."""
    (folder / "jpegs").mkdir(parents=True)
    for seed in range(number):
        (folder / "jpegs" / f"{seed:05d}.jpg").write_bytes(jpeg(seed, width, height))
    convert(str(folder / "jpegs"), str(folder / "shards"), progress=False)
    return folder / "shards"
