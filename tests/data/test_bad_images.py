"""Images of all kinds, from the folder to the batch, and what takes the place of a bad one."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinocomp.data import BadImage, Images
from dinocomp.data.convert import convert
from dinocomp.data.shards import open_images
from dinocomp.errors import DataError

from .conftest import image_bytes, picture, samples, train_on


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(picture(), "JPEG", exif=exif)


def bomb() -> bytes:
    """A PNG that says it has 4 thousand million pixels."""
    data = bytearray(image_bytes())
    data[16:24] = struct.pack(">II", 1 << 16, 1 << 16)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


GOOD: dict[str, Callable[[], bytes]] = {
    "cmyk.jpg": lambda: saved(picture().convert("CMYK"), "JPEG"),
    "palette.png": lambda: saved(picture().convert("P"), "PNG"),
    "palette.gif": lambda: saved(picture().convert("P"), "GIF", transparency=0),
    "alpha.png": lambda: saved(picture().convert("RGBA"), "PNG"),
    "grey_alpha.png": lambda: saved(picture().convert("LA"), "PNG"),
    "grey.jpg": lambda: saved(picture().convert("L"), "JPEG"),
    "one_bit.png": lambda: saved(picture().convert("1"), "PNG"),
    "16_bit.png": lambda: saved(Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200), "PNG"),
    "16_bit.tif": lambda: saved(Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200), "TIFF"),
    "turned.jpg": turned,
    "animated.gif": lambda: saved(picture(), "GIF", save_all=True, append_images=[picture(1), picture(2)]),
    "animated.webp": lambda: saved(picture(), "WEBP", save_all=True, append_images=[picture(1)]),
    "one_pixel.png": lambda: saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"),
    "one_pixel_grey.jpg": lambda: saved(Image.new("L", (1, 1), 9), "JPEG"),
    "wide.png": lambda: saved(picture(size=(600, 3)), "PNG"),
    "tall.jpg": lambda: saved(picture(size=(1, 200)), "JPEG"),
    "really_a_png.jpg": lambda: image_bytes(),
    "really_a_jpeg.png": lambda: image_bytes(0, "JPEG"),
    "really_a_webp.jpeg": lambda: image_bytes(0, "WEBP"),
}
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated.jpg": (lambda: image_bytes(0, "JPEG", (200, 100))[:-900], "truncated"),
    "truncated.png": (lambda: image_bytes()[:-40], "truncated"),
    "empty.jpg": (lambda: b"", "0 bytes"),
    "text.png": (lambda: b"<html>404 Not Found</html>", "not an image"),
    "bomb.png": (bomb, "too large"),
}


def test_the_zoo(tmp_path: Path) -> None:
    """What can be shown is converted, trains and has the right shape; the rest is named with its reason."""
    for name, make in GOOD.items():
        (tmp_path / name).write_bytes(make())
    for name, (make, _) in BAD.items():
        (tmp_path / name).write_bytes(make())
    report = convert(str(tmp_path), str(tmp_path / "shards"), workers=1, progress=False)
    assert {key for key, _ in report.splits[0].unreadable} == BAD.keys()
    for key, reason in report.splits[0].unreadable:
        assert BAD[key][1] in reason, (key, reason)
    images = open_images(str(tmp_path / "shards"))
    shapes = {}
    for i in range(len(images)):
        sample, pixels = images.decode(i)
        shapes[sample.key] = tuple(pixels.shape)
        assert pixels.dtype == torch.uint8
    assert shapes.keys() == GOOD.keys()
    assert shapes["turned.jpg"] == (3, 20, 16) and shapes["one_pixel.png"] == (3, 1, 1)
    assert shapes["wide.png"] == (3, 3, 600) and shapes["tall.jpg"] == (3, 200, 1)
    for batch in train_on(images, batch_size=len(images), iterations=3):
        assert sorted(batch["index"].tolist()) == list(range(len(images)))
        assert batch["global_crops"].shape[2:] == (3, 16, 16)


@pytest.fixture
def spoilt(tmp_path: Path) -> Images:
    """40 images, of which 3, 17 and 18 are no images; written as somebody else would, without looking at them."""
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path / "spoilt"), columns={"image": "bytes", "key": "str"}, hashes=["xxh64"]) as writer:
        for n in range(40):
            data = image_bytes(n)
            writer.write({"image": data[:60] if n in (3, 17, 18) else data, "key": f"photo-{n}.png"})
    return open_images(str(tmp_path / "spoilt"))


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_names_the_image(spoilt: Images, workers: int) -> None:
    with pytest.raises(BadImage, match=r"^image 'photo-(3|17|18)\.png' \(sample .* cannot be decoded.*") as error:
        train_on(spoilt, batch_size=8, iterations=5, num_workers=workers)
    assert "written by other means" in str(error.value) and "Traceback" not in str(error.value)


def test_skip_is_the_same_for_everyone(spoilt: Images) -> None:
    run = {"batch_size": 8, "iterations": 10, "skip_bad": True}  # two passes
    alone = train_on(spoilt, **run)
    replaced = torch.cat([batch["replaced"] for batch in alone])
    for one_pass in replaced.split(40):
        assert sorted(one_pass[one_pass >= 0].tolist()) == [3, 17, 18]
    assert not {3, 17, 18} & set(samples(alone))
    places = replaced >= 0
    first, second = torch.tensor(samples(alone))[places].split(3)
    assert first.tolist() != second.tolist(), "another pass, another draw"
    for other in (train_on(spoilt, **run, num_workers=2), None):
        if other is None:  # two ranks
            half = run | {"batch_size": 4, "world_size": 2}
            ranks = zip(train_on(spoilt, **half, rank=0), train_on(spoilt, **half, rank=1), strict=True)
            other = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in ranks]
        for a, b in zip(alone, other, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_nothing_to_take_its_place(tmp_path: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path / "none"), columns={"image": "bytes"}) as writer:
        for _ in range(20):
            writer.write({"image": b"no image"})
    with pytest.raises(DataError, match=r"10 others.*cannot be decoded either"):
        train_on(open_images(str(tmp_path / "none")), skip_bad=True)


def shard_of(images: Images) -> Path:
    index = json.loads((Path(images.path) / "index.json").read_text())
    return Path(images.path) / index["shards"][0]["raw_data"]["basename"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", ["deleted", "cut"])
def test_a_shard_that_goes_while_training_ends_the_run_by_name(shards: Path, workers: int, change: str) -> None:
    """Not a hang, not a shorter pass, and not ten images in its place."""
    images = open_images(str(shards))
    shard = shard_of(images)
    if change == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:700])
    words = "is missing" if change == "deleted" else "has 700 bytes, but should have"
    with pytest.raises(DataError, match=rf"^the shard {shard} {words}") as error:
        train_on(images, num_workers=workers, skip_bad=True)
    assert not isinstance(error.value, BadImage)


def test_a_flipped_bit_is_traced_to_its_shard(shards: Path) -> None:
    images = open_images(str(shards))
    shard = shard_of(images)
    data = bytearray(shard.read_bytes())
    where = data.index(b"IDAT") + 8
    data[where] ^= 255
    shard.write_bytes(data)
    with pytest.raises(BadImage, match=rf"The shard {shard} does not match its hash \(xxh64\).*copy it again") as error:
        train_on(images)
    assert "'n" in str(error.value), "the key"
    replaced = torch.cat([batch["replaced"] for batch in train_on(images, skip_bad=True)])
    assert len(set(replaced.tolist()) - {-1}) == 1


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_damaged_table_of_contents_is_a_bad_image(shards: Path) -> None:
    """Sizes inside the shard that lead nowhere."""
    images = open_images(str(shards))
    shard = shard_of(images)
    data = bytearray(shard.read_bytes())
    data[8:12] = b"\xff\xff\xff\x7f"
    shard.write_bytes(data)
    with pytest.raises(BadImage, match=rf"The shard {shard} does not match its hash"):
        [images.decode(i) for i in range(4)]
