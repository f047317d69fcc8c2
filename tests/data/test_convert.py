import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dinocomp.data import Images, decode_rgb, open_images
from dinocomp.data.convert import convert
from dinocomp.data.part import write_part
from dinocomp.errors import DataError

NAMES = [f"{c}/{n}{e}" for c in ("cat", "dog", "emu") for n, e in enumerate((".png", ".jpg", ".webp", ".bmp", ".tif"))]


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def by_key(images: Images) -> dict[str, tuple[bytes, int]]:
    return {images[i].key: (images[i].image, images[i].label) for i in range(len(images))}


@pytest.fixture
def src(tmp_path: Path, write_images) -> Path:
    write_images(tmp_path / "src", NAMES)
    return tmp_path / "src"


def run(src: Path, dst: Path, **changes):
    return convert(str(src), str(dst), **({"workers": 1, "part_images": 4, "progress": False} | changes))


def test_everything_arrives(src: Path, tmp_path: Path) -> None:
    report = run(src, tmp_path / "dst")
    images = open_images(str(tmp_path / "dst"))
    stored = by_key(images)
    assert set(stored) == set(NAMES) and len(images) == report.splits[0].samples == 15
    for name, (data, label) in stored.items():
        assert images.classes[label].id == name[:3]
        original = (src / name).read_bytes()
        if name.endswith((".png", ".jpg")):
            assert data == original
        else:
            assert data.startswith(b"\x89PNG") and decode_rgb(data).equal(decode_rgb(original))


def test_samples_are_shuffled_in_the_shards(src: Path, tmp_path: Path) -> None:
    run(src, tmp_path / "dst")
    images = open_images(str(tmp_path / "dst"))
    stored = [images[i].label for i in range(15)]
    assert stored != sorted(stored) and images.shard_sizes.tolist() == [4, 4, 4, 3]


def test_manifest_and_index(src: Path, tmp_path: Path) -> None:
    (src / "note.txt").write_text("x")
    run(src, tmp_path / "dst")
    folder = tmp_path / "dst" / "train"
    manifest = json.loads((folder / "dinocomp.json").read_text())
    assert manifest["samples"] == 15 and manifest["labelled"] and manifest["skipped"] == 1
    assert manifest["classes"] == [{"id": c, "name": c} for c in ("cat", "dog", "emu")]
    index = json.loads((folder / "index.json").read_text())
    assert all(shard["raw_data"]["hashes"]["xxh64"] for shard in index["shards"])
    assert len(list(folder.rglob("index.json"))) == 1 and not list((tmp_path / "dst").glob(".*.partial"))


def test_workers_do_not_change_a_byte(src: Path, tmp_path: Path) -> None:
    run(src, tmp_path / "one")
    run(src, tmp_path / "three", workers=3)
    assert contents(tmp_path / "one" / "train") == contents(tmp_path / "three" / "train")


def test_unreadable_images_are_left_out_and_listed(src: Path, tmp_path: Path) -> None:
    (src / "cat/empty.png").write_bytes(b"")
    (src / "cat/text.jpg").write_bytes(b"hello")
    (src / "dog/cut.png").write_bytes((src / "dog/0.png").read_bytes()[:60])
    os.symlink(tmp_path / "nowhere", src / "emu/dangling.png")
    report = run(src, tmp_path / "dst")
    reasons = dict(report.splits[0].unreadable)
    assert set(reasons) == {"cat/empty.png", "cat/text.jpg", "dog/cut.png", "emu/dangling.png"}
    assert "0 bytes" in reasons["cat/empty.png"] and "No such file" in reasons["emu/dangling.png"]
    assert len(open_images(str(tmp_path / "dst"))) == 15
    assert "cat/text.jpg" in report.summary() and "15 images, 3 classes" in report.summary()
    with pytest.raises(DataError, match=r"cat/text\.jpg"):  # also where it had been converted before
        run(src, tmp_path / "dst", strict=True)
    with pytest.raises(DataError, match="without --strict"):
        run(src, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict" / "train").exists()


def test_strict_in_worker_processes(src: Path, tmp_path: Path) -> None:
    (src / "cat/empty.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cat/empty\.png"):
        run(src, tmp_path / "dst", strict=True, workers=2)
    assert run(src, tmp_path / "dst", workers=2).splits[0].samples == 15


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 1 images"):
        run(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(DataError, match="interrupted"):
        open_images(str(tmp_path / "dst"))


def test_max_size(src: Path, tmp_path: Path) -> None:
    run(src, tmp_path / "dst", max_size=8)
    stored = by_key(open_images(str(tmp_path / "dst")))
    assert all(decode_rgb(data).shape == (3, 8, 10) for data, _ in stored.values())
    assert stored["cat/1.jpg"][0].startswith(b"\xff\xd8") and stored["cat/3.bmp"][0].startswith(b"\x89PNG")
    with pytest.raises(DataError, match="max-size"):
        run(src, tmp_path / "other", max_size=0)


def test_compression(src: Path, tmp_path: Path) -> None:
    run(src, tmp_path / "dst", compression="zstd:3")
    assert {p.suffix for p in (tmp_path / "dst" / "train").rglob("shard*")} == {".zstd"}
    run(src, tmp_path / "plain")
    assert by_key(open_images(str(tmp_path / "dst"))) == by_key(open_images(str(tmp_path / "plain")))
    with pytest.raises(DataError, match="zstd"):
        run(src, tmp_path / "bad", compression="zst")


def test_splits_and_val_fraction(src: Path, tmp_path: Path) -> None:
    run(src, tmp_path / "dst", val_fraction=0.2)
    train, val = (by_key(open_images(str(tmp_path / "dst"), split=split)) for split in ("train", "val"))
    assert len(train) == 12 and len(val) == 3 and not train.keys() & val.keys()
    with pytest.raises(DataError, match="val-fraction"):
        convert("digits", str(tmp_path / "digits"), val_fraction=0.1)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_tars(src: Path, tmp_path: Path, ending: str) -> None:
    with tarfile.open(tmp_path / f"all{ending}", "w:gz" if ending.endswith("gz") else "w") as tar:
        for name in NAMES:
            tar.add(src / name, name)
    run(tmp_path / f"all{ending}", tmp_path / "dst")
    run(src, tmp_path / "files")
    assert by_key(open_images(str(tmp_path / "dst"))) == by_key(open_images(str(tmp_path / "files")))
    assert not list((tmp_path / "dst").rglob("*.tar"))


def test_compressed_tars_after_an_interruption(src: Path, tmp_path: Path, monkeypatch) -> None:
    """Tars finished before the interruption are not unpacked again; the others must not be mistaken for them."""
    (tmp_path / "tars").mkdir()
    for name in ("cat", "dog", "emu"):
        with tarfile.open(tmp_path / "tars" / f"{name}.tgz", "w:gz") as tar:
            for path in sorted((src / name).iterdir()):
                tar.add(path, path.name)
    with stopping_at(14, monkeypatch):
        run(tmp_path / "tars", tmp_path / "dst", part_images=1)
    run(tmp_path / "tars", tmp_path / "dst", part_images=1)
    run(src, tmp_path / "files")
    assert by_key(open_images(str(tmp_path / "dst"))) == by_key(open_images(str(tmp_path / "files")))


def test_names_that_are_not_text(tmp_path: Path, png) -> None:
    (tmp_path / "src").mkdir()
    with open(os.fsencode(tmp_path / "src") + b"/caf\xe9.png", "wb") as file:
        file.write(png())
    run(tmp_path / "src", tmp_path / "dst")
    assert list(by_key(open_images(str(tmp_path / "dst")))) == ["caf\\udce9.png"]


def test_a_full_disk(src: Path, tmp_path: Path, monkeypatch) -> None:
    from streaming import MDSWriter

    def full(self, sample):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MDSWriter, "write", full)
        with pytest.raises(DataError, match=r"No space left.*finished parts are kept"):
            run(src, tmp_path / "dst")
    assert run(src, tmp_path / "dst").splits[0].samples == 15


def test_again_is_nothing_to_do(src: Path, tmp_path: Path) -> None:
    run(src, tmp_path / "dst")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").rglob("*.mds")}
    report = run(src, tmp_path / "dst")
    assert report.splits[0].reused and "already converted" in report.summary()
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").rglob("*.mds")}


def test_other_contents_are_never_overwritten(src: Path, tmp_path: Path, png) -> None:
    run(src, tmp_path / "dst")
    before = contents(tmp_path / "dst" / "train")
    with pytest.raises(DataError, match="other settings"):
        run(src, tmp_path / "dst", max_size=8)
    (src / "cat/new.png").write_bytes(png(99))
    with pytest.raises(DataError, match="other images"):
        run(src, tmp_path / "dst")
    assert contents(tmp_path / "dst" / "train") == before
    (tmp_path / "busy" / "train").mkdir(parents=True)
    (tmp_path / "busy" / "train" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="not a conversion"):
        run(src, tmp_path / "busy")


class Stopped(BaseException):
    """Stands for anything that ends a process at a given place."""


@contextmanager
def stopping_at(part: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A conversion inside ends where it would write this part."""

    def write_or_stop(job, advance):
        if job.number == part:
            raise Stopped
        return write_part(job, advance)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("dinocomp.data.convert.write_part", write_or_stop)
        yield


@pytest.mark.parametrize("after", [0, 1, 5, 9, 14])
def test_interrupted_leaves_nothing_finished_and_goes_on(src: Path, tmp_path: Path, monkeypatch, after: int) -> None:
    run(src, tmp_path / "whole")
    import dinocomp.data.part as part

    read, count, written = part.read_item, 0, []

    def stop_after(item):
        nonlocal count
        count += 1
        if count > after:
            raise Stopped
        return read(item)

    monkeypatch.setattr(part, "read_item", stop_after)
    with pytest.raises(Stopped):
        run(src, tmp_path / "dst")
    assert not (tmp_path / "dst" / "train").exists() and not list((tmp_path / "dst").rglob("index.json"))
    with pytest.raises(DataError, match="interrupted"):
        open_images(str(tmp_path / "dst"))
    monkeypatch.setattr(part, "read_item", lambda item: written.append(item.key) or read(item))
    run(src, tmp_path / "dst")
    assert len(written) == 15 - after // 4 * 4  # finished parts are used again
    assert contents(tmp_path / "dst" / "train") == contents(tmp_path / "whole" / "train")


def test_changed_source_starts_anew(src: Path, tmp_path: Path, monkeypatch, png) -> None:
    with stopping_at(1, monkeypatch):
        run(src, tmp_path / "dst")
    (src / "cat/new.png").write_bytes(png(99))
    run(src, tmp_path / "dst")
    run(src, tmp_path / "whole")
    assert contents(tmp_path / "dst" / "train") == contents(tmp_path / "whole" / "train")


def _slow_conversion(src: str, dst: str, workers: int, seconds: float) -> None:
    import dinocomp.data.part as part

    read = part.read_item
    part.read_item = lambda item: time.sleep(seconds) or read(item)
    convert(src, dst, workers=workers, part_images=4, progress=False)


def _kill_after(src: Path, dst: Path, seconds: float, workers: int = 1) -> None:
    """Run a conversion in a process of its own and kill it, as the kernel does when memory runs out."""
    arguments = (str(src), str(dst), workers, 0.02)
    process = multiprocessing.get_context("fork").Process(target=_slow_conversion, args=arguments)
    process.start()
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.2, 0.3, 0.5])
def test_kill_9_and_restart(src: Path, tmp_path: Path, seconds: float) -> None:
    run(src, tmp_path / "whole")  # also imports everything, so that the child begins to write at once
    _kill_after(src, tmp_path / "dst", seconds)
    finished = (tmp_path / "dst" / "train" / "index.json").is_file()
    if finished:
        assert len(open_images(str(tmp_path / "dst"))) == 15
    else:
        assert not (tmp_path / "dst" / "train").exists()
    run(src, tmp_path / "dst")
    assert contents(tmp_path / "dst" / "train") == contents(tmp_path / "whole" / "train")
    assert not list((tmp_path / "dst").glob(".*.partial"))


def _convert_and_tell(src: str, dst: str, results) -> None:
    results.put(convert(src, dst, workers=1, part_images=4, progress=False).splits[0].reused)


def test_two_at_once(src: Path, tmp_path: Path) -> None:
    run(src, tmp_path / "whole")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [
        context.Process(target=_convert_and_tell, args=(str(src), str(tmp_path / "dst"), results)) for _ in range(2)
    ]
    for process in both:
        process.start()
    assert sorted(results.get(timeout=60) for _ in both) == [False, True]
    for process in both:
        process.join()
    assert contents(tmp_path / "dst" / "train") == contents(tmp_path / "whole" / "train")


def test_digits(tmp_path: Path) -> None:
    report = convert("digits", str(tmp_path), workers=1, progress=False)
    assert {split.split: split.samples for split in report.splits} == {"train": 1438, "val": 359}
    image = decode_rgb(open_images(str(tmp_path), split="val")[0].image)
    assert image.shape == (3, 8, 8) and int(image.max()) == 255 and image[0].equal(image[2])


def test_progress_lines(src: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("dinocomp.data.progress._PERIOD", 0.0)
    run(src, tmp_path / "dst", progress=True)
    shown = capsys.readouterr().err
    assert f"converting 15 images of {src}" in shown and "15 of 15 images" in shown
    run(src, tmp_path / "quiet")
    assert not capsys.readouterr().err


def test_a_place_that_cannot_be_written(src: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be made"):
        run(src, tmp_path / "file" / "dst")


def _descendants(pid: int) -> set[int]:
    try:
        children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()
    return children.union(*(_descendants(child) for child in children))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_kill_9_with_worker_processes(tmp_path: Path, write_images) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    write_images(src, [f"{c}/{n}.bmp" for c in ("cat", "dog") for n in range(1500)])
    script = tmp_path / "script.py"
    script.write_text(
        "from dinocomp.data.convert import convert\n"
        f"if __name__ == '__main__':\n    convert({str(src)!r}, {str(dst)!r}, workers=2, part_images=20)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    deadline = time.monotonic() + 120
    while not list(dst.glob(".train.partial/done/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = _descendants(process.pid)
    process.kill()
    process.wait()
    assert not (dst / "train").exists() and len(workers) >= 3  # two, and the server they are forked from
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run(src, dst, part_images=20, workers=2)
    run(src, tmp_path / "whole", part_images=20)
    assert contents(dst / "train") == contents(tmp_path / "whole" / "train")
