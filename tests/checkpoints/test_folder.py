"""A checkpoint is whole or not there."""

from pathlib import Path

import pytest

from dinocomp.checkpoints.folder import (
    STATE,
    begin,
    discard,
    expired,
    find_fault,
    list_checkpoints,
    publish,
    set_aside,
    sweep,
)
from dinocomp.checkpoints.manifest import MANIFEST, iteration_of
from dinocomp.errors import ConfigError


def make(folder: Path, iteration: int, content: bytes = b"weights") -> Path:
    partial = begin(folder, iteration)
    (partial / STATE).write_bytes(content)
    (partial / "teacher.safetensors").write_bytes(b"teacher")
    assert partial not in list_checkpoints(folder), "not seen before it is whole"
    return publish(partial)


def test_what_is_listed(tmp_path: Path) -> None:
    for iteration in (12, 4, 123456789):
        make(tmp_path, iteration)
    begin(tmp_path, 16)
    (tmp_path / "iteration-00000020").write_text("a file")
    (tmp_path / "iteration-new").mkdir()
    assert [iteration_of(path) for path in list_checkpoints(tmp_path)] == [4, 12, 123456789]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_a_whole_one_has_no_fault_and_may_be_copied(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 4)
    assert find_fault(checkpoint) == ""
    (tmp_path / "elsewhere").mkdir()
    assert find_fault(checkpoint.rename(tmp_path / "elsewhere" / checkpoint.name)) == ""


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / STATE).write_bytes(b"weigh"), "checkpoint.pt has 5 bytes, its manifest says 7"),
        (lambda path: (path / STATE).write_bytes(b"weightz"), "checkpoint.pt is not what was written"),
        (lambda path: (path / STATE).unlink(), "checkpoint.pt cannot be read: No such file"),
        (lambda path: (path / "teacher.safetensors").unlink(), "teacher.safetensors cannot be read"),
        (lambda path: (path / MANIFEST).unlink(), "manifest.json cannot be read"),
        (lambda path: (path / MANIFEST).write_text("{"), "manifest.json is damaged"),
        (lambda path: (path / MANIFEST).write_text("[]"), "manifest.json is damaged"),
        (
            lambda path: (path / MANIFEST).write_text(
                '{"format": "dinocomp-checkpoint-1", "iteration": 4, "files": {}}'
            ),
            "checkpoint.pt is missing",
        ),
    ],
)
def test_damage_is_found(tmp_path: Path, damage, said: str) -> None:
    checkpoint = make(tmp_path, 4)
    damage(checkpoint)
    assert said in find_fault(checkpoint)


def test_a_checkpoint_of_another_version_is_not_taken_for_damaged(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 4)
    (checkpoint / MANIFEST).write_text('{"format": "dinocomp-checkpoint-2", "files": {}}')
    with pytest.raises(ConfigError, match="update dinocomp"):
        find_fault(checkpoint)


def test_a_stranger_under_another_number_is_not_whole(tmp_path: Path) -> None:
    stranger = make(tmp_path, 4).rename(tmp_path / "iteration-00000200")
    assert "of another iteration than its name says" in find_fault(stranger)


def test_a_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 4, b"old")
    with pytest.raises(OSError):
        make(tmp_path, 4, b"new")
    assert (checkpoint / STATE).read_bytes() == b"old"


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 4)
    begin(tmp_path, 8)
    (tmp_path / ".gone-iteration-00000002").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    aside = [set_aside(make(tmp_path, 6)) for _ in range(2)]
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"iteration-00000004", "notes.txt", *(p.name for p in aside)}
    discard(list_checkpoints(tmp_path)[0])
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("iterations", "max_to_keep", "milestone", "gone"),
    [
        ([4, 8, 12], 2, 0, [4]),
        ([12, 8, 4], 2, 0, [4]),
        ([4, 8, 12], 0, 0, []),
        ([4, 8, 12], 3, 0, []),
        ([], 1, 0, []),
        ([4], 1, 0, []),
        ([4, 8, 12, 13], 1, 8, [4, 12]),
        ([8, 16, 24, 25], 2, 8, []),
    ],
)
def test_retention(iterations: list[int], max_to_keep: int, milestone: int, gone: list[int]) -> None:
    assert expired(iterations, max_to_keep, milestone) == gone
