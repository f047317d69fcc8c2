"""Whole runs over shards with bad images in them."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from dinocomp.train import main

from ..helpers import launch, metrics, weights, words, yaml_of_nothing

BAD = (3, 17, 18)


def write(folder: Path, bad: tuple[int, ...] = BAD) -> None:
    """48 labelled images, as somebody else would write them, of which some are cut."""
    columns = {"image": "bytes", "label": "int", "key": "str"}
    with MDSWriter(out=str(folder), columns=columns, hashes=["xxh64"]) as writer:
        for n in range(48):
            path = folder / "photo.png"
            Image.new("RGB", (20, 16), (5 * n, 100, 250 - 5 * n)).save(path)
            data = path.read_bytes()
            path.unlink()
            writer.write({"image": data[:50] if n in bad else data, "label": n % 2, "key": f"photo-{n}.png"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data")
    return tmp_path / "data"


def run(folder: Path, data: Path, **changes) -> int:
    """6 iterations of 16 images are two passes."""
    settings = {"train__dataset_path": data, "train__batch_size_per_gpu": 16, "optim__epochs": 6} | changes
    return main([yaml_of_nothing(folder.parent), *words(folder, **settings, train__OFFICIAL_EPOCH_LENGTH=1)])


def test_skipped_counted_and_remembered(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    """Each bad image is logged once, also when a run resumes; and resuming changes nothing."""
    assert run(tmp_path / "whole", data) == 0
    lines = metrics(tmp_path / "whole")
    counts = [line["bad_images"] for line in lines]
    assert counts == sorted(counts) and counts[0] < 3 and counts[2:] == [3] * 4
    text = (tmp_path / "whole" / "train.log").read_text()
    for n in BAD:
        assert text.count(f"another image is shown in its place: image 'photo-{n}.png' (sample {n} of {data})") == 1
    assert run(tmp_path / "parts", data, optim__epochs=4) == 0  # with schedules of its own
    assert run(tmp_path / "parts", data) == 0
    assert [line["bad_images"] for line in metrics(tmp_path / "parts")] == counts
    assert (tmp_path / "parts" / "train.log").read_text().count("another image is shown") == 3
    assert run(tmp_path / "workers", data, train__num_workers=2) == 0
    whole, workers = weights(tmp_path / "whole", 6), weights(tmp_path / "workers", 6)
    assert not [name for name in whole if not torch.equal(whole[name], workers[name])]


@pytest.mark.parametrize("workers", [0, 2])
def test_raise(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture, workers: int) -> None:
    assert run(tmp_path / "run", data, data__on_bad_image="raise", train__num_workers=workers) == 3
    error = capsys.readouterr().err
    assert "error: image 'photo-" in error and "cannot be decoded" in error and "Traceback" not in error


def test_too_many(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path / "run", data, data__max_bad_images=2) == 3
    error = capsys.readouterr().err
    assert f"3 images of {data} could not be decoded, more than data.max_bad_images=2" in error
    assert all(f"'photo-{n}.png'" in error for n in BAD) and "dinocomp convert" in error
    assert run(tmp_path / "run", data, data__max_bad_images=3) == 0


def test_evaluation_leaves_them_out(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path / "val", bad=(1, 2))
    pair = {"evaluation__train_dataset_path": data, "evaluation__val_dataset_path": tmp_path / "val"}
    assert run(tmp_path / "run", data, **pair, optim__epochs=1) == 0
    text = (tmp_path / "run" / "train.log").read_text()
    for folder, bad in ((data, BAD), (tmp_path / "val", (1, 2))):
        assert f"{len(bad)} of 48 images of {folder} are left out of the evaluation: image 'photo-{bad[0]}.png'" in text
    assert "k-NN accuracy" in text


def test_evaluation_that_raises(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "clean", bad=())
    pair = {"evaluation__train_dataset_path": data, "evaluation__val_dataset_path": data}
    assert run(tmp_path / "run", tmp_path / "clean", **pair, data__on_bad_image="raise", optim__epochs=1) == 3
    assert "error: image 'photo-3.png'" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_stop_together(tmp_path: Path, data: Path) -> None:
    """The bad images of one rank count on the other, and the run of two is the run of one."""
    many = {"train__dataset_path": data, "train__OFFICIAL_EPOCH_LENGTH": 1, "optim__epochs": 6}
    many |= {"train__batch_size_per_gpu": 8, "train__num_workers": 1}
    many |= {"evaluation__train_dataset_path": data, "evaluation__val_dataset_path": data}
    done = launch(yaml_of_nothing(tmp_path), *words(tmp_path / "two", **many), processes=2)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "two")[-1]["bad_images"] == 3
    assert "3 of 48 images" in (tmp_path / "two" / "train.log").read_text()
    done = launch(yaml_of_nothing(tmp_path), *words(tmp_path / "few", **many, data__max_bad_images=2), processes=2)
    assert done.returncode != 0 and "more than data.max_bad_images=2" in done.stderr + done.stdout


def test_a_limit_for_local_shards_does_nothing(tmp_path: Path, data: Path) -> None:
    assert run(tmp_path / "run", data, data__cache_limit="5gb", optim__epochs=1) == 0
    assert "data.cache_limit=5gb does nothing" in (tmp_path / "run" / "train.log").read_text()


def test_a_limit_that_is_no_size(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path / "run", data, data__cache_limit="half") == 2
    assert "data.cache_limit" in (error := capsys.readouterr().err) and "500gb" in error
