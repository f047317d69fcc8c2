"""The page itself: whole, harmless, small."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocomp.cli import main
from dinocomp.report import read_run, render
from dinocomp.report.words import duration, number, percent

from .folders import line, write_run

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'"


class Outline(HTMLParser):
    """Elements, references to other places, and pictures without words; fails on elements that are left open."""

    VOID = ("meta", "link", "img", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.places: list[str] = []
        self.handlers: list[str] = []
        self.silent = 0
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.places += [value for name, value in attrs if name in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.silent += tag == "img" and not named.get("alt")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_all_that_it_needs_is_inside(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", pictures=tuple(range(0, 1001, 50)), warnings=("careful",))
    (folder / "evaluate").mkdir()
    results = {"weights": "teacher.safetensors", "table": [["linear", "top-1", "91.3 %"], "cut"]}
    taken = [{"class": "seven", "images": 3, "share": 0.25}]
    rows = [{"class": "one", "images": 12, "recall": 0.75, "taken_for": taken}, {"class": "two"}]
    results["confusion"] = {"protocol": "linear", "worst_classes": rows}
    (folder / "evaluate" / "results.json").write_text(json.dumps(results))
    page = render(read_run(folder))
    outline = Outline(page)
    assert all(place.startswith(("data:", "#")) for place in outline.places)
    assert len(outline.ids) == len(set(outline.ids)) and outline.silent == 0 and outline.handlers == []
    assert {"header", "nav", "main", "footer", "h1"} <= set(outline.tags) and outline.tags.count("h1") == 1
    assert {place[1:] for place in outline.places if place.startswith("#")} <= set(outline.ids)
    pictures = re.findall(r'data-iteration="(\d+)"', page)
    assert len(pictures) == 12 and pictures[0] == "0" and pictures[-1] == "1000", "not all, but from first to last"
    for words in (
        "optim.base_lr",
        "linear",
        "91.3 %",
        "seven (25.0%)",
        "careful",
        "1,438",
        "dinocomp.load(",
        "dinocomp show",
    ):
        assert words in page, words
    assert "optim.adamw_beta1" not in page.partition("<details>")[0], "what is as by default"


@pytest.mark.parametrize("where", ["folder", "warning", "class", "gauge", "protocol", "setting", "error"])
def test_no_name_becomes_markup(tmp_path: Path, where: str) -> None:
    name = EVIL.replace("/", "&") if where == "folder" else "run"
    folder = write_run(
        tmp_path / name,
        lines=[line(10, **({f"loss__{EVIL}": 1.0} if where == "gauge" else {}))],
        warnings=(EVIL,) if where == "warning" else (),
        data={"path": EVIL, "images": 3, "classes": EVIL if where == "class" else 2} if where != "error" else None,
        status="failed" if where == "error" else "finished",
        error=EVIL,
        words=(f"train.output_dir={EVIL}",) if where == "setting" else (),
    )
    if where == "protocol":
        (folder / "evaluate").mkdir()
        (folder / "evaluate" / "results.json").write_text(json.dumps({"table": [[EVIL, EVIL, EVIL]]}))
    outline = Outline(render(read_run(folder)))
    assert outline.tags.count("script") == 3 and outline.handlers == []


def test_large_pictures_are_made_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    place = folder / "pictures" / "iteration-00000010"
    place.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (90, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((2400, 1350)).save(place / "pca.png")
    assert (place / "pca.png").stat().st_size > 1_000_000
    page = render(read_run(folder))
    (picture,) = re.findall(r'src="(data:image/webp[^"]*)" width="1400" height="788"', page)
    assert len(picture) < 400_000


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", words=("optim.base_lr=0.001",))
    assert main(["report", str(a)]) == 0 and (a / "report.html").is_file()
    assert main(["report", "b", "--output", "page.html"]) == 0 and not (b / "report.html").exists()
    assert main(["compare", "a", "b"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(a / "report.html"), "page.html", "compare.html"]
    assert "<h1>2 runs side by side</h1>" in (tmp_path / "compare.html").read_text()
    assert main(["report", str(tmp_path)]) == 2 and "no run's folder" in capsys.readouterr().err
    assert main(["compare", "a", "--output", "nowhere/c.html"]) == 2 and "--output FILE" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.partial"))


def test_numbers_in_words() -> None:
    shown = [duration(seconds) for seconds in (0, 0.4, 59.6, 200, 3600, 190_000)]
    assert shown == [
        "0 s",
        "0.4 s",
        "1 min",
        "3 min 20 s",
        "1 h",
        "2 d 4 h",
    ]
    assert [number(v) for v in (1234567.8, 5.0, 0.012345, float("nan"))] == ["1,234,568", "5", "0.0123", "–"]
    assert percent(0.8499) == "85.0 %"
