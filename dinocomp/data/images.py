"""File bytes to pixels: the one place that knows about image formats."""

import io
import math
import struct
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from dinocomp.errors import DataError

# What Pillow's decoders are seen to raise on damaged files. Anything else is a bug and should be seen as one.
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, IndexError, TypeError, KeyError, OverflowError, struct.error)


Reduction = Callable[[int, int], int]  # (height, width) of an image -> 1, 2, 4 or 8, by which its sides may be divided
_ORIENTATION = 0x0112  # EXIF
_LYING = (5, 6, 7, 8)  # orientations in which rows are stored as columns


def decode_rgb(data: bytes, reduction: Reduction | None = None) -> torch.Tensor:
    """Decode the bytes of one image file.

    EXIF orientation is applied; grey, palette and CMYK become RGB; an alpha channel is dropped, not blended; 16-bit
    samples are scaled to 8 bits, not clipped; of an animation the first frame is taken.

    Args:
        data: the whole content of an image file (any format Pillow reads).
        reduction: asked with the upright image's size before pixels are decoded. A JPEG's sides are then divided by the
            answer, rounded up; the decoder drops high frequencies of its cosine transform, which is less work and has
            no aliasing. Other formats are decoded whole.

    Returns:
        uint8 [3, H, W]. The memory is laid out as H, W, 3 ("channels last"): torch resizes that fastest.

    Raises:
        DataError: with a plain reason (empty, not an image, truncated, too large).
    """
    return _to_tensor(open_rgb(data, reduction)[0])  # [3, H, W]


def open_rgb(data: bytes, reduction: Reduction | None = None) -> tuple[Image.Image, str]:
    """Like `decode_rgb`, but gives Pillow's fully decoded RGB image and the name of the file's format ("JPEG", …)."""
    if not data:
        raise DataError("the file is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            name = image.format or "unknown"
            if reduction is not None:
                _reduce(image, reduction)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # else it copies what is upright, too
            return _to_rgb(image), name
    except UnidentifiedImageError:
        raise DataError(
            f"not an image in a known format, or damaged at its start (it begins with {data[:8]!r})"
        ) from None
    except Image.DecompressionBombError as error:
        raise DataError(f"too large to be decoded safely: {error}") from None
    except DataError:
        raise
    except MemoryError:
        raise DataError("too large for this machine's memory") from None
    except _DAMAGE as error:
        raise DataError(f"damaged or truncated: {error}") from None


def _reduce(image: Image.Image, reduction: Reduction) -> None:
    """Prepare an image that is not decoded yet for being decoded at a lower resolution."""
    width, height = image.size
    lying = image.getexif().get(_ORIENTATION) in _LYING
    by = reduction(width, height) if lying else reduction(height, width)
    if by > 1:
        image.draft(None, (width // by, height // by))


def side_of(data: bytes) -> int | None:
    """The shorter side of an image file in pixels, of which only the beginning is read; None where it cannot be."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return min(image.size)
    except (*_DAMAGE, UnidentifiedImageError, Image.DecompressionBombError):
        return None


def rgb_of(picture: Image.Image) -> torch.Tensor:
    """The pixels of a Pillow image as `decode_rgb` gives those of a file, uint8 [3, H, W].

    Raises:
        DataError: they cannot be decoded or shown.
    """
    try:
        return _to_tensor(_to_rgb(ImageOps.exif_transpose(picture)))
    except _DAMAGE as error:
        raise DataError(f"damaged or truncated: {error}") from None


def encode(image: torch.Tensor, file_format: str) -> bytes:
    """Encode uint8 [3, H, W] as "PNG" (lossless) or "JPEG" (quality 95)."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())  # [H, W, 3]
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **({"quality": 95} if file_format == "JPEG" else {}))
    return buffer.getvalue()


def checked_bytes(data: bytes, max_size: int | None = None) -> bytes:
    """The bytes to store for one image, after one full decode that proves it readable.

    JPEG and PNG files are returned as they are, everything else as PNG. With `max_size`, an image whose shorter side
    is larger is resized so that this side is `max_size` pixels (bicubic, antialiased) and encoded again (JPEG stays
    JPEG, the rest becomes PNG).

    Raises:
        DataError: the image cannot be decoded.
    """
    picture, name = open_rgb(data)
    shorter = min(picture.size)
    as_jpeg = name in ("JPEG", "MPO")  # MPO is a JPEG with further pictures behind it
    if max_size is not None and shorter > max_size:
        width, height = (max(1, math.floor(side * max_size / shorter + 0.5)) for side in picture.size)
        image = _to_tensor(picture)[None]  # [1, 3, H, W]
        image = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
        return encode(image[0], "JPEG" if as_jpeg else "PNG")
    if as_jpeg or name == "PNG":
        return data
    return encode(_to_tensor(picture), "PNG")


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    pixels = np.array(picture)  # [H, W, 3]; a copy, because torch wants memory it may write to
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [3, H, W]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        values = np.asarray(image).astype(np.float64)  # [H, W]
        top = 65535.0 if values.max(initial=0.0) <= 65535 else float(2**31 - 1)
        return _grey_to_rgb(values * (255.0 / top))
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)  # [H, W]
        low, high = values.min(initial=0.0), values.max(initial=0.0)
        if not (low >= 0.0 and high <= 255.0):  # also true for NaN
            raise DataError(f"floating-point pixels from {low:g} to {high:g}; only 0..1 and 0..255 can be shown")
        return _grey_to_rgb(values * (255.0 if high <= 1.0 else 1.0))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about transparency given as bytes
    return image.convert("RGB")


def _grey_to_rgb(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
