"""`dinocomp.load`, and what it gives."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinocomp
from dinocomp.cli import main
from dinocomp.data import open_images
from dinocomp.data.convert import convert
from dinocomp.errors import DataError, WeightsError
from dinocomp.interop import Model
from tests.helpers import small_folder
from tests.interop.exported import ABOUT, SIZE, images, make_teacher
from tests.store import Store


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    make_teacher(tmp_path / "teacher.safetensors", num_register_tokens=2)
    return tmp_path / "teacher.safetensors"


def test_tokens_by_the_published_names(teacher: Path) -> None:
    net, model = make_teacher(teacher, num_register_tokens=2), dinocomp.load(teacher)
    pixels, masks = images(SIZE, 84), torch.rand(2, 24) < 0.5
    for masked in (None, masks):
        expected, found = net(pixels, masked), model.forward_features(pixels, masked)
        assert torch.equal(found["x_norm_clstoken"], expected.cls) and found["masks"] is masked
        assert torch.equal(found["x_norm_regtokens"], expected.registers)
        assert torch.equal(found["x_norm_patchtokens"], expected.patches)
        assert torch.equal(found["x_prenorm"], expected.prenorm)
    assert torch.equal(model(pixels), net(pixels).cls)
    ((patches, cls),) = model.get_intermediate_layers(pixels, [0], reshape=True)
    assert patches.shape == (2, 24, 4, 6) and cls.shape == (2, 24)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (model.embed_dim, model.patch_size, tuple(model.view)) == (24, 14, ABOUT["view"])


def test_an_image_is_seen_as_by_the_evaluation(teacher: Path, tmp_path: Path) -> None:
    model = dinocomp.load(teacher)
    picture = Image.new("RGB", (80, 70), (255, 0, 51))
    picture.save(tmp_path / "photo.png")
    seen = model.transform(picture)
    assert seen.shape == (3, SIZE, SIZE)
    torch.testing.assert_close(seen[:, 16, 16], torch.tensor([(1 - 0.5) / 0.2, (0 - 0.4) / 0.25, (0.2 - 0.3) / 0.3]))
    assert torch.equal(model.transform(tmp_path / "photo.png"), seen)
    lying = Image.new("RGB", (60, 80))
    lying.paste((255, 255, 255), (0, 0, 30, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    lying.save(tmp_path / "lying.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "lying.jpg") as opened:
        assert torch.equal(model.transform(opened), model.transform(tmp_path / "lying.jpg"))
    transparent = Image.new("RGBA", (64, 64), (255, 0, 51, 9))
    assert torch.equal(model.transform(transparent)[:, 5, 5], seen[:, 5, 5])
    with pytest.raises(TypeError, match=r"uint8 \[3, H, W\]; this one is torch.float32"):
        model.transform(torch.zeros(3, 60, 60))


def test_networks_of_other_libraries(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("test_vit", num_classes=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    model = dinocomp.load(f"timm:test_vit={tmp_path / 'w.pth'}")
    pixels = images(model.view[1])
    torch.testing.assert_close(model(pixels), theirs.forward_features(pixels)[:, 0])
    assert set(model.forward_features(pixels)) == {"x_norm_clstoken", "x_norm_patchtokens", "masks"}
    with pytest.raises(WeightsError, match="TimmBackbone takes no masks"):
        model.forward_features(pixels, torch.zeros(2, 1, dtype=torch.bool))


def expected_of(model: Model, folder: Path, names: list[str]) -> np.ndarray:
    return np.stack([model(model.transform(folder / name)[None])[0].numpy() for name in names])


def test_a_folder_is_embedded(teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, model = small_folder(tmp_path / "images", 11), dinocomp.load(teacher)
    (folder / "deeper" / "train").mkdir(parents=True)
    (folder / "003.png").rename(folder / "deeper" / "train" / "x.png")
    (folder / "bad.png").write_bytes(b"\x89PNG no more")
    (folder / "notes.txt").write_text("no image")
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "dinocomp"):
        names, vectors = model.embed(folder, tmp_path / "out" / "a.npy", batch_size=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert names == sorted([*(f"{i:03d}.png" for i in range(11) if i != 3), "deeper/train/x.png"])
    np.testing.assert_allclose(vectors, expected_of(model, folder, names), atol=1e-5)
    assert "1 of 12 images left out: bad.png: " in caplog.text
    assert np.array_equal(np.load(tmp_path / "out" / "a.npy"), vectors) and vectors.dtype == np.float32
    assert json.loads((tmp_path / "out" / "a.names.json").read_text()) == names
    assert len(list((tmp_path / "out").iterdir())) == 2

    files = [folder / "005.png", str(folder / "nowhere.png"), folder / "001.png"]
    with_workers, rows = model.embed(files, batch_size=1, workers=1)
    assert with_workers == [str(files[0]), str(files[2])]
    np.testing.assert_allclose(rows, expected_of(model, folder, ["005.png", "001.png"]), atol=1e-5)
    assert model.embed(folder / "005.png")[1].shape == (1, 24)


def test_shards_and_digits_are_embedded(teacher: Path, tmp_path: Path, one_cache: None) -> None:
    folder, model = small_folder(tmp_path / "images", 6), dinocomp.load(teacher)
    convert(str(folder), str(tmp_path / "shards"))
    names, vectors = model.embed(tmp_path / "shards")
    np.testing.assert_allclose(vectors, expected_of(model, folder, names), atol=1e-5)
    assert names == [open_images(str(tmp_path / "shards"))[i].key for i in range(6)]
    convert("digits", str(tmp_path / "two"), val_fraction=0.0)
    with pytest.raises(DataError, match=r"has the splits .*give one of them, such as"):
        model.embed(tmp_path / "two")
    tiny = dinocomp.load(teacher)
    object.__setattr__(tiny.transform, "resize", 14)
    object.__setattr__(tiny.transform, "crop", 14)
    names, vectors = tiny.embed("digits", batch_size=600)
    assert len(names) == len(set(names)) == 1797 == len(vectors)


def test_parquet(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    folder, model = small_folder(tmp_path / "images", 5), dinocomp.load(teacher)
    names, vectors = model.embed(folder, tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.column("name").to_pylist() == names and "fixed_size_list" in str(table.schema.field("embedding").type)
    assert np.array_equal(np.array(table.column("embedding").to_pylist(), dtype=np.float32), vectors)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install pyarrow, or give .*b\.npy"):
        model.embed(folder, tmp_path / "b.parquet")


def test_mistakes(teacher: Path, tmp_path: Path) -> None:
    model = dinocomp.load(teacher)
    with pytest.raises(WeightsError, match="does not exist"):
        dinocomp.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"ends in neither of \.npy, \.parquet"):
        model.embed(tmp_path, tmp_path / "a.csv")
    with pytest.raises(DataError, match="nowhere"):
        model.embed(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        model.embed(tmp_path / "empty")
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 images can be decoded, the first: a\.png: the file is empty"):
        model.embed(tmp_path / "empty")


def test_the_commands(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = small_folder(tmp_path / "images", 3)
    assert main(["embed", str(teacher), str(folder), str(tmp_path / "a.npy"), "--device", "cpu"]) == 0
    assert "a.npy: 3 images, 24 numbers each" in capsys.readouterr().out
    files = sorted(str(path) for path in folder.iterdir())
    assert main(["embed", str(teacher), *files[:2], str(tmp_path / "b.npy"), "--device", "cpu"]) == 0
    assert np.array_equal(np.load(tmp_path / "b.npy"), np.load(tmp_path / "a.npy")[:2])
    assert main(["export", str(teacher), "--to", "timm", str(tmp_path / "timm")]) == 0
    out = capsys.readouterr().out
    assert "README.md says how to load it; its licence is left to you" in out and "timm: at other image sizes" in out
    assert main(["export", str(teacher), "--to", "timm", str(tmp_path / "timm")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_file_in_an_object_store(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store" / "bucket" / "deep").mkdir(parents=True)
    teacher.rename(tmp_path / "store" / "bucket" / "deep" / "best_teacher.safetensors")
    store = Store(tmp_path / "store")
    for name, value in {**store.environment, "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    try:
        model = dinocomp.load("s3://bucket/deep/best_teacher.safetensors")
        assert model(images(SIZE)).shape == (2, 24)
        with pytest.raises(DataError, match=r"no s3://bucket/deep/teacher.safetensors"):
            dinocomp.load("s3://bucket/deep/teacher.safetensors")
    finally:
        store.stop()
    with pytest.raises(WeightsError, match="does not exist"):
        dinocomp.load(f"file://{tmp_path}/nowhere")
