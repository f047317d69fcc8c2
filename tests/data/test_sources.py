import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dinocomp.data.listing import ClassName, Source
from dinocomp.data.sources import find_sources, hold_out
from dinocomp.errors import DataError


def labels(source: Source) -> dict[str, str | None]:
    return {item.key: source.classes[item.label].id if item.label >= 0 else None for item in source.items}


def test_folder_with_class_folders(tmp_path: Path, write_images) -> None:
    names = ["cat/a.png", "cat/deep/er/b.JPG", "dog/c.webp", "dog/d.bmp", "dog/e.tif"]
    write_images(tmp_path, names)
    sources = find_sources(tmp_path)
    assert list(sources) == ["train"]
    assert sources["train"].classes == (ClassName("cat", "cat"), ClassName("dog", "dog"))
    assert labels(sources["train"]) == {name: name[:3] for name in names}


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["all/a.png", "all/b.png"], ["cat/a.png", "dog/b.png", "c.png"]])
def test_folder_without_labels(tmp_path: Path, write_images, names: list[str]) -> None:
    write_images(tmp_path, names)
    source = find_sources(tmp_path)["train"]
    assert not source.labelled and {item.label for item in source.items} == {-1} and len(source.items) == len(names)


def test_other_and_hidden_files_are_counted(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, ["cat/a.png", "dog/b.png", "cat/.hidden.png", ".git/c.png", "dog/.cache/d.png"])
    (tmp_path / "readme.txt").write_text("x")
    source = find_sources(tmp_path)["train"]
    assert sorted(labels(source)) == ["cat/a.png", "dog/b.png"] and source.skipped == 2  # hidden folders aren't entered


def test_links_are_followed_but_not_in_circles(tmp_path: Path, write_images) -> None:
    write_images(tmp_path / "elsewhere", ["a.png"])
    write_images(tmp_path / "data", ["dog/b.png"])
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "cat")
    os.symlink(tmp_path / "data", tmp_path / "data" / "dog" / "loop")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "data" / "dog" / "dangling.png")
    assert sorted(labels(find_sources(tmp_path / "data")["train"])) == ["cat/a.png", "dog/b.png", "dog/dangling.png"]


def test_imagenet_layout(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, ["train/n2/n2_0.png", "train/n1/x.JPEG", "val/n3/y.jpg", "val/n1/z.png", "other/q.png"])
    (tmp_path / "labels.txt").write_text('n2,tench\nn1, "goldfish, the"\nn9,nothing\n')
    sources = find_sources(tmp_path)
    expected = (ClassName("n1", "goldfish, the"), ClassName("n2", "tench"), ClassName("n3", "n3"))
    assert sources["train"].classes == sources["val"].classes == expected
    assert labels(sources["train"]) == {"n1/x.JPEG": "n1", "n2/n2_0.png": "n2"}
    assert labels(sources["val"]) == {"n1/z.png": "n1", "n3/y.jpg": "n3"}
    notes = " ".join(sources["train"].notes)
    assert "n3" in notes and "n9" in notes and "other" in notes


def test_splits_without_classes(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, ["train/a.png", "train/b.png", "valid/c.png"])
    sources = find_sources(tmp_path)
    assert {split: len(source.items) for split, source in sources.items()} == {"train": 2, "val": 1}
    assert not sources["train"].labelled


def test_unlabelled_test_split_beside_labelled_ones(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, ["train/n1/a.png", "train/n2/b.png", "test/c.png"])
    sources = find_sources(tmp_path)
    assert sources["train"].labelled and not sources["test"].labelled


def test_bad_labels_file(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, ["train/n1/a.png", "train/n2/b.png"])
    (tmp_path / "labels.txt").write_text("n1,one\nn2 two\n")
    with pytest.raises(DataError, match="line 2"):
        find_sources(tmp_path)


def pack(tar: Path, root: Path, mode: str = "w") -> None:
    with tarfile.open(tar, mode) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                archive.add(path, f"./{path.relative_to(root)}")


@pytest.mark.parametrize(("ending", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_one_tar(tmp_path: Path, write_images, ending: str, mode: str) -> None:
    write_images(tmp_path / "in", ["cat/a.png", "dog/b.jpg"])
    (tmp_path / "in" / "note.txt").write_text("x")
    pack(tmp_path / f"all{ending}", tmp_path / "in", mode)
    source = find_sources(tmp_path / f"all{ending}")["train"]
    assert labels(source) == {"cat/a.png": "cat", "dog/b.jpg": "dog"} and source.skipped == 1
    assert source.items[0].size == (tmp_path / "in" / "cat" / "a.png").stat().st_size


def test_a_tar_of_whole_splits_is_refused(tmp_path: Path, write_images) -> None:
    """Else `train` and `val` would become two classes, and the held-out images would be trained on."""
    write_images(tmp_path / "in", ["train/cat/a.png", "val/cat/b.png"])
    pack(tmp_path / "all.tar", tmp_path / "in", "w")
    with pytest.raises(DataError, match="holds whole splits"):
        find_sources(tmp_path / "all.tar")


def test_a_folder_of_tars_is_a_folder_of_classes(tmp_path: Path, write_images) -> None:
    (tmp_path / "tars").mkdir()
    for name in ("n2", "n1"):
        write_images(tmp_path / name, ["a.png", "b.png"])
        pack(tmp_path / "tars" / f"{name}.tar", tmp_path / name)
    source = find_sources(tmp_path / "tars")["train"]
    assert labels(source) == {f"{n}/{k}.png": n for n in ("n1", "n2") for k in "ab"}


def test_tars_named_after_splits(tmp_path: Path, write_images) -> None:
    (tmp_path / "tars").mkdir()
    for name, files in (("train", ["x/a.png", "y/b.png"]), ("val", ["x/c.png", "z/d.png"])):
        write_images(tmp_path / name, files)
        pack(tmp_path / "tars" / f"{name}.tar", tmp_path / name)
    sources = find_sources(tmp_path / "tars")
    assert labels(sources["train"]) == {"x/a.png": "x", "y/b.png": "y"}
    assert labels(sources["val"]) == {"x/c.png": "x", "z/d.png": "z"}


def test_a_damaged_tar(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"bad\.tar"):
        find_sources(tmp_path / "bad.tar")


ENTRY = np.dtype([("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "U9"), ("class_name", "U9")])


def metadata(extra: Path, split: str, rows: list[tuple], names: bool = True) -> None:
    extra.mkdir(parents=True, exist_ok=True)
    np.save(extra / f"entries-{split}.npy", np.array(rows, ENTRY))
    if names:
        pairs = sorted({(row[1], row[2], row[3]) for row in rows})
        np.save(extra / f"class-ids-{split}.npy", np.array([p[1] for p in pairs]))
        np.save(extra / f"class-names-{split}.npy", np.array([p[2] for p in pairs]))


@pytest.mark.parametrize("inside", [True, False])
def test_reference_metadata(tmp_path: Path, write_images, inside: bool) -> None:
    """Labels are the entries' class_index, even where it is not the alphabetical one."""
    root = tmp_path / "root"
    extra = root / "extra" if inside else tmp_path / "extra"
    write_images(
        root, ["train/n1/n1_7.jpeg", "train/n1/n1_12.png", "train/n2/n2_7.jpg", "val/n2/ILSVRC2012_val_00000003.jpg"]
    )
    (root / "train/n1/n1_7.jpeg").rename(root / "train/n1/n1_7.JPEG")
    metadata(extra, "TRAIN", [(12, 1, "n1", "tench"), (7, 0, "n2", "fish"), (7, 1, "n1", "tench")])
    metadata(extra, "VAL", [(3, 0, "n2", "fish")], names=False)
    sources = find_sources(root if inside else tmp_path)
    assert sources["train"].classes == (ClassName("n2", "fish"), ClassName("n1", "tench"))
    assert labels(sources["train"]) == {"n1/n1_12.png": "n1", "n2/n2_7.jpg": "n2", "n1/n1_7.JPEG": "n1"}
    assert labels(sources["val"]) == {"n2/ILSVRC2012_val_00000003.jpg": "n2"}
    assert sources["val"].classes == sources["train"].classes
    assert find_sources(f"ImageNet:split=TRAIN:root={root}:extra={extra}") == sources


def test_metadata_and_files_that_do_not_match(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, ["train/n1/n1_0.png", "train/n1/n1_5.png"])
    metadata(tmp_path / "extra", "TRAIN", [(0, 0, "n1", "a"), (1, 0, "n1", "a")])
    notes = " ".join(find_sources(tmp_path)["train"].notes)
    assert "1 of 2 entries have no file" in notes and "1 files" in notes
    metadata(tmp_path / "extra", "TRAIN", [(8, 0, "n1", "a")])
    with pytest.raises(DataError, match="none of the 1 entries"):
        find_sources(tmp_path)


def test_metadata_that_is_a_pickle_is_refused(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, ["train/n1/n1_0.png"])
    (tmp_path / "extra").mkdir()
    np.save(tmp_path / "extra" / "entries-TRAIN.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"entries-TRAIN\.npy"):
        find_sources(tmp_path)


def test_digits() -> None:
    sources = find_sources("digits")
    assert [len(sources[split].items) for split in ("train", "val")] == [1438, 359]
    assert [entry.name for entry in sources["val"].classes] == list("0123456789")
    assert not {item.key for item in sources["train"].items} & {item.key for item in sources["val"].items}


def test_hold_out_takes_its_share_of_every_class(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, [f"{c}/{n}.png" for c in ("cat", "dog") for n in range(10)])
    source = find_sources(tmp_path)["train"]
    parts = hold_out(source, 0.2)
    assert parts == hold_out(source, 0.2)
    assert [item.label for item in parts["val"].items] == [0, 0, 1, 1] and len(parts["train"].items) == 16
    assert {i.key for i in parts["train"].items} | {i.key for i in parts["val"].items} == {i.key for i in source.items}
    for fraction in (1.0, -0.5, 0.001):
        with pytest.raises(DataError, match="val-fraction"):
            hold_out(source, fraction)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            find_sources(path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="not a tar"):
        find_sources(tmp_path / "a.txt")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="no images"):
        find_sources(tmp_path)
