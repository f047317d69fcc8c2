"""Several runs side by side."""

import re
from pathlib import Path

from dinocomp.report import read_run, render_comparison
from dinocomp.report.compare import short_names

from .folders import line, write_run
from .test_page import Outline


def cells(page: str, row: str) -> list[str]:
    """What stands in the table's row."""
    inside = re.search(rf"<tr><th[^>]*>(?:<code>)?{re.escape(row)}(?:</code>)?</th>(.*?)</tr>", page)
    assert inside, row
    return re.findall(r"<td[^>]*>(.*?)</td>", inside[1])


def test_two_runs(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", pictures=(10, 500))
    words = ("optim.base_lr=0.001", "train.output_dir=elsewhere")
    b = write_run(
        tmp_path / "b",
        knn={0: 0.5, 1000: 0.7},
        lines=[line(10, images_per_second=400)],
        pictures=(1000,),
        words=words,
    )
    page = render_comparison([read_run(a), read_run(b)])
    outline = Outline(page)
    assert all(place.startswith(("data:", "#")) for place in outline.places)
    assert cells(page, "k-NN accuracy (k = 10), last") == ["<b>85.0 %</b>", "70.0 %"]
    assert cells(page, "images a second") == ["200", "<b>400</b>"]
    assert cells(page, "optim.base_lr") == ["0.002", "0.001"]
    assert "train.output_dir" not in page and "optim.epochs" not in page, "only what differs"
    assert outline.tags.count("img") == 2 and "a at iteration 500" in page and "b at iteration 1,000" in page


def test_one_run_and_runs_with_nothing(tmp_path: Path) -> None:
    empty = write_run(tmp_path / "empty", lines=[], knn={}, status=None)
    assert "All settings are the same" in render_comparison([read_run(empty)])
    render_comparison([read_run(empty), read_run(write_run(tmp_path / "a"))])


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place, lines=[]) for place in ("x/run", "y/run", "other")]
    records = [read_run(folder) for folder in folders]
    assert short_names(records) == ["x/run", "y/run", "other"]
    assert len(short_names([records[0], records[0]])) == 2, "the same one twice"
