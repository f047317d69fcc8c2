"""Records of measurements side by side."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, record


def write(path: Path, *rows: dict[str, Any], **environment: Any) -> str:
    """A record, as if made in another environment."""
    record.write(path, rows)
    found = json.loads(path.read_text())
    found["environment"] |= environment
    path.write_text(json.dumps(found))
    return str(path)


def lines(capsys: pytest.CaptureFixture, *arguments: str) -> list[str]:
    assert compare.main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_single_rows_belong_together_whatever_their_settings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = {"run": "vits16", "images_per_second": 100.0, "phases": {"forward": 0.5}, "step_seconds": [1.0], "mfu": None}
    other = {"run": "vits16 a=b", "images_per_second": 150.0, "phases": {"forward": 0.25}, "bytes": 12000}
    found = lines(capsys, write(tmp_path / "a.json", one), write(tmp_path / "b.json", other, command="python other"))
    assert found[found.index("| | a.json | b.json | relative |") :] == [
        "| | a.json | b.json | relative |",
        "|---|---|---|---|",
        "| run | vits16 | vits16 a=b |  |",
        "| images_per_second | 100 | 150 | 1.500 |",
        "| phases.forward | 0.5 | 0.25 | 0.500 |",
        "| bytes |  | 12,000 |  |",
    ]
    assert "2. b.json: `python other`" in found
    assert found[0].startswith("device ") and sum("torch 2." in line for line in found) == 1
    assert not any("Warning" in line for line in found)


def test_rows_are_matched_by_their_words_and_by_numbers_that_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def rows(speed: float) -> list[dict[str, Any]]:
        return [
            {"stage": "decode", "workers": 1, "rate": speed},
            {"stage": "crops", "workers": 1, "rate": 2 * speed},
            {"stage": "decode", "workers": 2, "rate": 3 * speed},
        ]

    files = [write(tmp_path / "a.json", *rows(10.0)), write(tmp_path / "b.json", *rows(20.0)[::-1])]
    found = lines(capsys, *files, "--by", "workers")
    assert found[-3:] == [
        "| decode, workers 1: rate | 10 | 20 | 2.000 |",
        "| crops, workers 1: rate | 20 | 40 | 2.000 |",
        "| decode, workers 2: rate | 30 | 60 | 2.000 |",
    ]
    assert compare.main(files) == 2
    assert "a.json has several rows of decode; name the number" in (error := capsys.readouterr().err)
    assert "--by NAME, one of workers, rate" in error


def test_what_one_file_has_not_is_left_empty(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = write(tmp_path / "a.json", {"stage": "decode", "rate": 0.0}, {"stage": "crops", "rate": 2.5})
    other = write(tmp_path / "b.json", {"stage": "decode", "rate": 3.0}, {"stage": "masks", "rate": 2e6})
    found = lines(capsys, one, other)
    assert found[-3:] == [
        "| decode: rate | 0 | 3 |  |",
        "| crops: rate | 2.5 |  |  |",
        "| masks: rate |  | 2,000,000 |  |",
    ]


def test_files_of_different_machines_or_versions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    versions = record.environment()["versions"]
    one = write(tmp_path / "a.json", {"rate": 1.0}, device="H100", load=1.0)
    other = write(tmp_path / "b.json", {"rate": 1.0}, device="cpu", load=2.0, versions=versions | {"torch": "9.9"})
    found = lines(capsys, one, other)
    assert any("Warning" in line for line in found)
    assert "- device: H100 (a.json), cpu (b.json)" in found
    assert f"- torch: {versions['torch']} (a.json), 9.9 (b.json)" in found
    assert not any(line.startswith("- load") for line in found), "that changes by itself"


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"rows": []}', '{"environment": {}, "rows": [1]}'])
def test_other_files_are_refused(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    assert compare.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and ("cannot be read" in error or "no record of a benchmark" in error)
