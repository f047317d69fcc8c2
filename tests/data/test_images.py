import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dinocomp.data.images import checked_bytes, decode_rgb, encode
from dinocomp.errors import DataError


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def ramp() -> np.ndarray:
    return np.arange(48, dtype=np.uint8).reshape(6, 8) * 5  # [6, 8]


def test_rgb_png_is_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = decode_rgb(saved(Image.fromarray(pixels), "PNG"))
    assert image.dtype == torch.uint8 and image.shape == (3, 6, 8)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_formats(file_format: str) -> None:
    image = decode_rgb(saved(Image.fromarray(ramp()).convert("RGB"), file_format))
    assert image.shape == (3, 6, 8)
    assert (image[0].float() - torch.from_numpy(ramp()).float()).abs().mean() < 12  # lossy formats differ a little


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
def test_exif_orientation(turn: int) -> None:
    upright = np.zeros((6, 8, 3), np.uint8)
    upright[0, 0] = 255  # the corner that must end up where a viewer shows it
    exif = Image.Exif()
    exif[0x0112] = turn
    image = decode_rgb(saved(Image.fromarray(upright), "PNG", exif=exif))
    corner = {1: (0, 0), 2: (0, 7), 3: (5, 7), 4: (5, 0), 5: (0, 0), 6: (0, 5), 7: (7, 5), 8: (7, 0)}[turn]
    assert image.shape == ((3, 6, 8) if turn < 5 else (3, 8, 6))
    assert image[0][corner] == 255 and int(image[0].count_nonzero()) == 1


def test_alpha_is_dropped_not_blended() -> None:
    pixels = np.full((6, 8, 4), 200, np.uint8)
    pixels[..., 3] = 0
    assert (decode_rgb(saved(Image.fromarray(pixels), "PNG")) == 200).all()
    assert (decode_rgb(saved(Image.fromarray(pixels[..., :2].copy()), "PNG")) == 200).all()


def test_palette_with_transparency(recwarn: pytest.WarningsRecorder) -> None:
    image = Image.fromarray(ramp()).convert("P")
    decoded = decode_rgb(saved(image, "PNG", transparency=bytes(range(256))))
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))
    assert not [w for w in recwarn if "Transparency" in str(w.message)]


def test_cmyk_and_grey_and_bits() -> None:
    assert decode_rgb(saved(Image.new("CMYK", (8, 6), (0, 0, 0, 0)), "JPEG")).min() > 250
    assert np.array_equal(decode_rgb(saved(Image.fromarray(ramp()), "PNG"))[2].numpy(), ramp())
    assert set(decode_rgb(saved(Image.fromarray(ramp() > 100), "PNG")).unique().tolist()) == {0, 255}


def test_16_bit_is_scaled_not_clipped() -> None:
    wide = ramp().astype(np.uint16) * 257
    for file_format in ("PNG", "TIFF"):
        assert np.array_equal(decode_rgb(saved(Image.fromarray(wide), file_format))[0].numpy(), ramp())


def test_16_bit_rgb_png() -> None:
    rows = b"".join(b"\0" + struct.pack(">6H", *[v * 257 for v in (10, 20, 30, 40, 50, 60)]) for _ in range(2))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode_rgb(data)[:, 0, :].T.flatten().tolist() == [10, 20, 30, 40, 50, 60]


def test_floating_point() -> None:
    unit = Image.fromarray((ramp() / 255).astype(np.float32))
    assert np.array_equal(decode_rgb(saved(unit, "TIFF"))[0].numpy(), ramp())
    with pytest.raises(DataError, match="floating-point"):
        decode_rgb(saved(Image.fromarray(np.full((6, 8), 1e4, np.float32)), "TIFF"))


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    for file_format in ("GIF", "WEBP"):
        data = saved(frames[0], file_format, save_all=True, append_images=frames[1:])
        red, _, blue = decode_rgb(data).float().mean((1, 2)).tolist()
        assert red > 240 and blue < 15


@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("by", [1, 2, 4, 8])
def test_a_jpeg_at_a_lower_resolution(orientation: int, by: int) -> None:
    """Upright, and like the mean of by x by pixels; the decoder is asked with the upright size."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture.resize((136, 72), Image.Resampling.BICUBIC), "JPEG", quality=95, exif=exif)
    whole, asked = decode_rgb(data), []

    def reduction(height: int, width: int) -> int:
        asked.append((height, width))
        return by

    reduced = decode_rgb(data, reduction)
    assert asked == [tuple(whole.shape[-2:])]
    assert reduced.shape == (3, *(side // by for side in whole.shape[-2:]))
    expected = torch.nn.functional.interpolate(whole[None].float(), reduced.shape[-2:], mode="area")[0]
    assert (reduced.float() - expected).abs().mean() < 3


def test_a_lower_resolution_is_rounded_up() -> None:
    data = saved(Image.fromarray(ramp()).resize((131, 67)), "JPEG")
    assert decode_rgb(data, lambda height, width: 4).shape == (3, 17, 33)


def test_other_formats_are_decoded_whole() -> None:
    data = saved(Image.fromarray(ramp()), "PNG")
    assert torch.equal(decode_rgb(data, lambda height, width: 8), decode_rgb(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "0 bytes"), (b"hello, world", "not an image"), (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "damaged|not an image")],
)
def test_bad_files(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_rgb(data)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_truncated_at_any_length(file_format: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), file_format)
    for keep in (4, 20, len(data) // 3, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(DataError):
            decode_rgb(data[:keep])


@pytest.mark.filterwarnings("ignore")
def test_random_damage_never_escapes_as_another_error() -> None:
    rng = np.random.default_rng(2)
    for file_format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        whole = np.frombuffer(saved(Image.fromarray(ramp()).convert("RGB"), file_format), np.uint8)
        for _ in range(60):
            data = whole.copy()
            data[rng.integers(len(data), size=8)] = rng.integers(256, size=8)
            try:
                decode_rgb(data.tobytes())
            except DataError as error:
                assert str(error)


def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="too large"):
        decode_rgb(saved(Image.fromarray(ramp()), "PNG"))


def test_checked_bytes_keeps_jpeg_and_png() -> None:
    image = Image.fromarray(ramp()).convert("RGB")
    for file_format in ("PNG", "JPEG"):
        data = saved(image, file_format)
        assert checked_bytes(data) is data
        assert checked_bytes(data, max_size=6) is data  # the shorter side already fits
    again = checked_bytes(saved(image, "BMP"))
    assert again.startswith(b"\x89PNG") and torch.equal(decode_rgb(again), decode_rgb(saved(image, "PNG")))


def test_checked_bytes_resizes_the_shorter_side(png) -> None:
    jpeg, wide = png(4, "JPEG", (80, 40)), png(4, "PNG", (80, 40))
    assert checked_bytes(jpeg, 10).startswith(b"\xff\xd8") and checked_bytes(wide, 10).startswith(b"\x89PNG")
    small = decode_rgb(checked_bytes(wide, 10))
    assert small.shape == (3, 10, 20)
    with Image.open(io.BytesIO(wide)) as image:
        expected = np.asarray(image.resize((20, 10), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(small.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


def test_encode_round_trip() -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    assert torch.equal(decode_rgb(encode(image, "PNG")), image)
