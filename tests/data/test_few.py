"""A few images from wherever they are."""

import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinocomp.data import open_images
from dinocomp.data.convert import convert
from dinocomp.data.few import choose_images
from dinocomp.errors import DataError

from ..helpers import random_states

pytestmark = pytest.mark.usefixtures("one_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of six images, each of a grey of its own; one file is no image."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (12, 10), (20 * i + label,) * 3).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "cat" / "torn.png").write_bytes(b"torn")
    return tmp_path / "images"


def test_of_a_folder_of_classes(folder: Path) -> None:
    """All of them, with labels; the cache stays empty. What cannot be decoded is told."""
    states = random_states()
    few = choose_images([str(folder)], 100)
    assert random_states() == states
    assert few.classes == ["cat", "dog"] and len(few.pixels) == 12 and "cat/torn.png" in few.bad[0]
    assert all(int(pixels[0, 0, 0]) % 2 == label for pixels, label in zip(few.pixels, few.labels, strict=True))
    some = choose_images([str(folder)], 5)
    assert len(some.pixels) + len(some.bad) == 5
    again = choose_images([str(folder)], 5)
    assert all(torch.equal(one, other) for one, other in zip(some.pixels, again.pixels, strict=True))


def test_files_that_are_named_come_first_in_their_order(folder: Path) -> None:
    files = [str(folder / "dog" / f"{i}.png") for i in (4, 2)]
    few = choose_images([str(folder), *files], 3)
    assert [int(pixels[0, 0, 0]) for pixels in few.pixels[:2]] == [81, 41] and len(few.pixels) == 3
    assert few.labels[:2] == [-1, -1] and few.labels[2] >= 0
    with pytest.raises(DataError, match=r"torn\.png"):
        choose_images([str(folder / "cat" / "torn.png")], 3)


def test_of_shards_digits_tars_and_open_images(folder: Path, tmp_path: Path) -> None:
    convert(str(folder), str(tmp_path / "shards"), progress=False, val_fraction=0.34)
    few = choose_images([str(tmp_path / "shards")], 100)
    assert len(few.pixels) == 4 and few.classes == ["cat", "dog"], "of splits, the held-out one"
    assert len(choose_images([str(tmp_path / "shards" / "train")], 100).pixels) == 8
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(folder / "dog", "dog")
    assert len(choose_images([str(tmp_path / "some.tar")], 100).pixels) == 6
    digits = choose_images(["digits"], 20)
    assert len(digits.pixels) == 20 and len(digits.classes) <= 10 and min(digits.labels) >= 0
    opened = choose_images([open_images("digits", split="val")], 20)
    assert len(opened.pixels) == 20 and set(opened.classes) <= {str(n) for n in range(10)}


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        choose_images([str(tmp_path / "none")], 3)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.png").write_bytes(b"torn")
    with pytest.raises(DataError, match="none of the images"):
        choose_images([str(tmp_path / "torn")], 3)
