"""Pages, files, curves, and the picture of a batch."""

import io
import json
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from dinocomp.pictures import batch_picture, curves_picture, read_lines, write_png
from dinocomp.pictures.canvas import cut, folded, font, page, png
from dinocomp.pictures.looks import thumbnails


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy())


def test_large_pictures_are_made_to_fit() -> None:
    """Noise cannot be packed: it is shrunk; a picture of few colours stays as it is."""
    data = png(noise(450, 350), limit=75_000)
    assert len(data) <= 75_000
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.width < 450 and abs(picture.width / picture.height - 9 / 7) < 0.02
    with Image.open(io.BytesIO(png(Image.new("RGB", (450, 350)), limit=75_000))) as picture:
        assert picture.size == (450, 350) and picture.mode == "RGB"
    with Image.open(io.BytesIO(png(noise(250, 200), limit=75_000))) as picture:
        assert picture.size == (250, 200) and picture.mode == "P", "colours go before pixels do"
    assert png(noise(50, 50), limit=10), "and there is an end to it"


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b.png"
    write_png(path, Image.new("RGB", (30, 20)))
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_png(path, noise(30, 20))
    assert path.read_bytes() == before


def test_words_are_fitted() -> None:
    letters = font(20)
    assert cut("short", letters, 200) == "short" and cut("much longer than that", letters, 100).endswith("…")
    assert letters.getlength(cut("much longer than that", letters, 100)) <= 100
    lines = folded("some words that go over several lines", letters, 150)
    assert len(lines) > 2 and all(letters.getlength(line) <= 150 for line in lines)
    assert page("T", "", Image.new("RGB", (300, 10))).width == 336


def test_thumbnails_are_small() -> None:
    assert thumbnails(torch.zeros(2, 3, 224, 224, dtype=torch.uint8)).shape == (2, 3, 128, 128)
    small = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(thumbnails(small), small)


def lines(number: int) -> list[dict]:
    return [
        {
            "iteration": i,
            "loss/total": 9 - i / number,
            "loss/ibot": None if i == 3 else 2.0,  # not finite, as metrics.jsonl says it
            "lr": i * 1e-6,
            "momentum": 0.99,
            "teacher/feature_std": 0.5,
            "teacher/entropy_dino": 3.0,
            "teacher/prototypes_dino": 100.0,
        }
        for i in range(1, number + 1)
    ]


def test_curves() -> None:
    evaluation = [
        {"iteration": 0, "knn_top1": {"10": 0.5, "20": 0.49}},
        {"iteration": 5, "label_free": {"rankme": 31.2, "neighbour_consistency": 0.7}, "seconds": 1.0},
        {"iteration": 10, "knn_top1": {"10": 0.8}, "label_free": {"rankme": 40.0, "neighbour_consistency": None}},
    ]
    whole = curves_picture(lines(10), evaluation)
    assert whole.width == 780 and curves_picture(lines(2000), []).height < whole.height - 600
    assert curves_picture([], []).width == 780 and curves_picture([], evaluation[:1]).width == 780


def test_raw_pixels_are_a_level_line(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = [
        {"iteration": 0, "knn_top1": {"10": 0.5, "20": 0.4}, "pixels_top1": {"10": 0.9, "20": 0.8}},
        {"iteration": 10, "knn_top1": {"10": 0.6, "20": 0.5}},
    ]
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **how: drawn.append((x, y, how)) or plot(self, x, y, **how))
    curves_picture([], evaluation)
    (x, y, how), *others = [each for each in drawn if each[2]["linestyle"] == "--"]
    assert not others and how["label"] == "raw pixels (k=10)" and x.tolist() == [0, 10] and y.tolist() == [90, 90]
    assert {how["label"] for _, _, how in drawn} == {"k=10", "k=20", "raw pixels (k=10)"}


def test_lines_that_were_cut_short_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text(json.dumps({"iteration": 1}) + "\n3\n" + '{"iteration": 2, "lo')
    assert read_lines(path) == [{"iteration": 1}]


@pytest.mark.parametrize("local", [0, 2, 8])
def test_a_batch(local: int) -> None:
    masks = torch.zeros(3, 2, 16, dtype=torch.bool)
    masks[:, 0, :4] = True
    batch = {
        "global_crops": torch.full((3, 2, 3, 16, 16), 250, dtype=torch.uint8),
        "local_crops": torch.zeros(3, local, 3, 8, 8, dtype=torch.uint8),
        "masks": masks,
    }
    picture = batch_picture(batch)
    assert picture.width == 780
    colours = {colour: count for count, colour in picture.getcolors(1 << 24)}
    masked, seen = colours[(128, 128, 128)], colours[(250, 250, 250)]
    assert masked / (masked + seen) == pytest.approx(1 / 16, abs=0.01), "4 of the 64 patches of an image's four squares"
