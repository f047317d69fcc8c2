import multiprocessing
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dinocomp.data import CropSettings, MaskSettings, training_loader
from dinocomp.data.address import default_cache
from dinocomp.data.convert import convert
from dinocomp.data.shards import Survey, count_images, ensure_shards, evaluation_pair, open_images, survey_images
from dinocomp.errors import DataError

from .conftest import NAMES, keys


def test_folder_of_shards_and_its_parent(shards: Path, cache: str) -> None:
    direct, train, val = (
        open_images(str(shards / "train"), cache_dir=cache),
        open_images(str(shards), cache_dir=cache),
        open_images(str(shards), split="val", cache_dir=cache),
    )
    assert keys(direct) == keys(train) == sorted(NAMES) and keys(val) == ["n1/n1_8.png", "n2/n2_9.png"]
    assert train.labelled and [entry.id for entry in train.classes] == ["n1", "n2"] and not train.remote
    assert train.shard_sizes.sum() == len(train) == 10 == count_images(str(shards), cache)
    assert not Path(cache).exists()
    with pytest.raises(IndexError):
        train[10]
    with pytest.raises(DataError, match="no split `test`; it has train, val"):
        open_images(str(shards), split="test")


def test_plain_folder_is_converted_once(layout: Path, cache: str, capsys, png) -> None:
    folder = str(layout / "train")
    assert count_images(folder, cache) == 10 and not Path(cache).exists()
    first = open_images(folder, cache_dir=cache)
    assert f"converting 10 images of {folder}" in capsys.readouterr().err
    assert keys(first) == sorted(NAMES) and Path(first.path).is_relative_to(cache)
    assert open_images(folder, cache_dir=cache).path == first.path and not capsys.readouterr().err
    (layout / "train" / "n1" / "new.png").write_bytes(png(50))
    second = open_images(folder, cache_dir=cache)
    assert len(second) == 11 and len(first) == 10 and first[3].image  # the old shards are still there to be read
    (layout / "train" / "n1" / "new.png").write_bytes(b"")
    assert len(open_images(folder, cache_dir=cache)) == 10 == count_images(folder, cache)  # unreadable: not counted


def test_a_survey_counts_and_measures_without_converting(
    layout: Path, shards: Path, cache: str, tmp_path: Path, png
) -> None:
    folder = layout / "train"
    survey = survey_images(str(folder), cache_dir=cache)
    assert survey.images == 10 and not Path(cache).exists()
    assert survey == survey_images(str(shards), cache_dir=cache), "shards say the same"
    for number in range(30):
        Image.new("RGB", (90, 50 + number % 2)).save(folder / "n1" / f"larger{number}.png")
    (folder / "n1" / "damaged.png").write_bytes(b"no picture")
    assert survey_images(str(folder), cache_dir=cache) == Survey(41, 50)
    assert survey_images("digits", cache_dir=cache) == Survey(1438, 8)
    for name in ("a.tar", "a.tar.gz"):
        with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as tar:
            tar.add(folder, "images")
        assert survey_images(str(tmp_path / name), cache_dir=cache) == Survey(41, 50)
    assert not Path(cache).exists()
    with pytest.raises(DataError):
        survey_images(str(tmp_path / "nothing"), cache_dir=cache)


def test_layout_is_converted_split_by_split(layout: Path, cache: str) -> None:
    assert len(open_images(str(layout), cache_dir=cache)) == 10
    assert len(list(Path(cache).rglob("index.json"))) == 1
    assert len(open_images(str(layout), split="val", cache_dir=cache)) == 2


def test_reference_string(layout: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    text = f"ImageNet:split=TRAIN:root={layout}:extra={extra}"
    images = open_images(text)
    assert keys(images) == sorted(NAMES) and Path(images.path).is_relative_to(extra / "dinocomp-shards")
    assert count_images(text) == 10 and count_images(text.replace("TRAIN", "val")) == 2
    pair = evaluation_pair(text)
    assert pair is not None and [len(images) for images in pair] == [10, 2]
    assert ensure_shards(text) == images.path


def test_reference_string_without_extra(layout: Path, cache: str) -> None:
    images = open_images(f"ImageNet:root={layout}", cache_dir=cache)
    assert len(images) == 10 and Path(images.path).is_relative_to(cache)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ImageNet:split=TRAIN", "root="),
        ("ImageNet:split=TRIAN:root={root}", "TRIAN"),
        ("ImageNet:splt=TRAIN:root={root}", "splt=TRAIN"),
        ("ImageNet:split=TRAIN:root=/no/such/folder", "/no/such/folder"),
        ("ImageNet:split=TEST:root={root}", "no split `test`"),
        ("ImageNet22k", "dinocomp convert"),
        ("ImageNet22k:root=x:extra=y", "dinocomp convert"),
        ("", "empty"),
        ("/no/such/place", "does not exist.*digits"),
        ("{root}/labels.csv", "cannot be read as a dataset"),
    ],
)
def test_errors_say_what_to_type(layout: Path, cache: str, text: str, words: str) -> None:
    (layout / "labels.csv").write_text("x")
    with pytest.raises(DataError, match=words):
        open_images(text.format(root=layout), cache_dir=cache)


def test_empty_folder(tmp_path: Path, cache: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images found"):
        open_images(str(tmp_path / "empty"), cache_dir=cache)
    with pytest.raises(DataError, match="split"):
        open_images("digits", split="valid", cache_dir=cache)


def test_missing_and_short_shards_are_found_at_once(shards: Path) -> None:
    shard = shards / "train" / "part-00001" / "shard.00000.mds"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{shard} has {len(data) - 1} bytes.*should have {len(data)} according"):
        open_images(str(shards))
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard} is missing"):
        open_images(str(shards))


def test_missing_index(shards: Path) -> None:
    (shards / "train" / "index.json").unlink()
    for path in (shards / "train", shards):
        with pytest.raises(DataError, match=rf"{shards}/train holds shards, but their index.*copy it again"):
            open_images(str(path))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2, "shards": []}'])
def test_damaged_index(shards: Path, text: str) -> None:
    (shards / "train" / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json"):
        open_images(str(shards))


def test_shards_written_by_others(tmp_path: Path, png) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path / "theirs"), columns={"image": "jpeg", "label": "int"}) as writer:
        for seed in range(3):
            writer.write({"image": png(seed, "JPEG"), "label": seed})
    images = open_images(str(tmp_path / "theirs"))
    assert images[2].image == png(2, "JPEG") and images[2].label == 2 and images[2].key == "2"
    assert images.labelled and images.classes == []
    for columns in ({"x": "jpeg"}, {"image": "pil"}):
        name = "-".join(columns)
        with MDSWriter(out=str(tmp_path / name / "shards"), columns=columns) as writer:
            from PIL import Image

            writer.write(dict.fromkeys(columns, Image.new("RGB", (4, 4)) if "image" in columns else png(0, "JPEG")))
        with pytest.raises(DataError, match="dinocomp convert"):
            open_images(str(tmp_path / name / "shards"))


def read_in_child(images, results) -> None:
    results.put([images[i].key for i in range(len(images))])


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_images_survive_pickling_and_fork(layout: Path, tmp_path: Path, compression: str | None) -> None:
    convert(str(layout), str(tmp_path / "dst"), workers=1, progress=False, compression=compression)
    images = open_images(str(tmp_path / "dst"))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=read_in_child, args=(images, results))
    child.start()
    assert sorted(results.get(timeout=60)) == sorted(NAMES)
    child.join()
    assert keys(pickle.loads(pickle.dumps(images))) == sorted(NAMES)


def test_compressed_shards_are_unpacked_into_the_cache(layout: Path, tmp_path: Path, cache: str) -> None:
    """Not beside the source, and anew when that changed."""
    convert(str(layout), str(tmp_path / "dst"), workers=1, progress=False, compression="zstd", part_images=4)
    before = {path: path.read_bytes() for path in tmp_path.joinpath("dst").rglob("*") if path.is_file()}
    images = open_images(str(tmp_path / "dst"), cache_dir=cache)
    assert keys(images) == sorted(NAMES) and not images.remote
    assert {path: path.read_bytes() for path in tmp_path.joinpath("dst").rglob("*") if path.is_file()} == before
    assert len(list(Path(cache).rglob("*.mds"))) == 3
    shard = sorted((tmp_path / "dst" / "train").rglob("*.zstd"))[0]
    data = shard.read_bytes()
    shutil.rmtree(cache)
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 255]))
    with pytest.raises(DataError, match=rf"{shard.name} of .* does not match its hash"):
        keys(open_images(str(tmp_path / "dst"), cache_dir=cache))
    shard.unlink()
    with pytest.raises(DataError, match=f"the shard {shard} is missing"):
        keys(images)
    with pytest.raises(DataError, match=f"{shard} is missing"):
        open_images(str(tmp_path / "dst"), cache_dir=cache)


@pytest.mark.slow
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_loader_with_spawned_workers(layout: Path, tmp_path: Path, compression: str | None) -> None:
    convert(str(layout), str(tmp_path / "dst"), workers=1, progress=False, compression=compression)
    loader = training_loader(
        open_images(str(tmp_path / "dst")),
        crops=CropSettings(global_crops_size=16, local_crops_size=8),
        masks=MaskSettings((4, 4)),
        batch_size=5,
        iterations=2,
        num_workers=1,
    )
    expected = list(loader)
    loader.multiprocessing_context = "spawn"
    loader._iterator = None  # persistent workers of the first round
    for a, b in zip(expected, loader, strict=True):
        assert all(a[key].equal(b[key]) for key in a)


def test_evaluation_pair(shards: Path, layout: Path, tmp_path: Path, cache: str, write_images) -> None:
    def sizes(*paths: str) -> list[int]:
        pair = evaluation_pair(*paths, cache_dir=cache)
        return [len(images) for images in pair] if pair else []

    assert sizes(str(shards)) == sizes(str(shards / "train")) == sizes(str(layout)) == [10, 2]
    assert sizes("digits") == [1438, 359]
    write_images(tmp_path / "flat", ["a.png", "b.png"])
    assert sizes(str(tmp_path / "flat")) == [] == sizes(str(layout / "val"))
    assert sizes(str(tmp_path / "flat"), str(layout / "train"), str(layout / "val")) == [10, 2]
    assert sizes(str(shards), "", str(layout / "train")) == [10, 10]
    with pytest.raises(DataError, match=r"evaluation\.val_dataset_path"):
        sizes(str(tmp_path / "flat"), str(layout / "train"))
    with pytest.raises(DataError, match="no labels"):
        sizes(str(shards), str(tmp_path / "flat"))


def test_default_cache(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "dinocomp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "dinocomp"
