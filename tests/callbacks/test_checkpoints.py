"""Which checkpoints stay."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dinocomp.callbacks import Checkpoints, checkpoints
from dinocomp.callbacks.checkpoints import list_checkpoints


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Composer's writer, replaced by one that records and writes a few bytes."""
    names: list[str] = []

    def write(state: object, filename: str) -> None:
        names.append(Path(filename).name)
        Path(filename).parent.mkdir(parents=True, exist_ok=True)
        Path(filename).write_bytes(b"weights")

    monkeypatch.setattr(checkpoints, "save_checkpoint", write)
    return names


def at(iteration: int) -> SimpleNamespace:
    return SimpleNamespace(timestamp=SimpleNamespace(batch=iteration))


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_interval_end_and_retention(tmp_path: Path, saves: list[str]) -> None:
    exported: list[int] = []
    callback = Checkpoints(tmp_path, interval=4, max_to_keep=2, total=10, export_teacher=exported.append)
    for iteration in range(1, 11):
        callback.batch_checkpoint(at(iteration), None)
    assert exported == [4, 8, 10]
    assert names(tmp_path) == ["iteration-00000008.pt", "iteration-00000010.pt"]
    assert all(name.startswith(".partial-") for name in saves), "never written under the final name"


def test_files_of_earlier_processes_count_and_leftovers_go(tmp_path: Path, saves: list[str]) -> None:
    for iteration in (4, 8):
        (tmp_path / f"iteration-{iteration:08d}.pt").write_bytes(b"weights")
    (tmp_path / ".partial-iteration-00000011.pt").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    callback = Checkpoints(tmp_path, interval=4, max_to_keep=2, total=100, export_teacher=lambda iteration: None)
    callback.batch_checkpoint(at(12), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iteration-00000008.pt",
        "iteration-00000012.pt",
        "notes.txt",
    ]


def test_zero_keeps_all(tmp_path: Path, saves: list[str]) -> None:
    callback = Checkpoints(tmp_path, interval=1, max_to_keep=0, total=5, export_teacher=lambda iteration: None)
    for iteration in range(1, 6):
        callback.batch_checkpoint(at(iteration), None)
    assert len(names(tmp_path)) == 5


def test_a_failed_save_leaves_the_old_ones(tmp_path: Path, saves: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    callback = Checkpoints(tmp_path, interval=4, max_to_keep=1, total=100, export_teacher=lambda iteration: None)
    callback.batch_checkpoint(at(4), None)

    def full(state: object, filename: str) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space"):
        callback.batch_checkpoint(at(8), None)
    assert names(tmp_path) == ["iteration-00000004.pt"]
