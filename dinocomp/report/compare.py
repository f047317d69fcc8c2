"""Several runs side by side: `render_comparison`."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from dinocomp.config.keys import show
from dinocomp.config.load import all_keys
from dinocomp.report.markup import HOW_TO_ZOOM, Safe, document, image_of, join, plots, section, table, tag
from dinocomp.report.panels import Chart, charts_together
from dinocomp.report.pictures import inline
from dinocomp.report.record import RunRecord
from dinocomp.report.verdict import knn_of
from dinocomp.report.words import duration, number, percent

_APART = ("train.output_dir", "recipes")  # settings in which runs differ anyway
_SECTIONS = {"curves": "Curves", "gauges": "Health", "speed": "Speed", "schedules": "Schedules"}


def render_comparison(records: Sequence[RunRecord]) -> str:
    """One page of all runs; each has a colour of its own, the same everywhere."""
    names = short_names(records)
    charts = charts_together(
        [(name, record.metrics, record.evaluations) for name, record in zip(names, records, strict=True)]
    )
    parts = {
        "numbers": ("Numbers", section("numbers", "Numbers", _numbers(names, records))),
        "differences": ("Differences", _differences(names, records)),
        **{
            key: (title, section(key, title, plots(_of(charts, key)), words=HOW_TO_ZOOM if key == "curves" else ""))
            for key, title in _SECTIONS.items()
        },
        "pictures": ("Pictures", _pictures(names, records)),
    }
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, (title, inside) in parts.items() if inside]
    runs = [
        tag("li", _dot(i), tag("b", name), tag("small", f"{r.status}, iteration {r.iteration:,}: {r.folder}"))
        for i, (name, r) in enumerate(zip(names, records, strict=True))
    ]
    body = join(
        [
            tag(
                "header",
                tag("p", "dinocomp · DINOv2 training", class_="kind"),
                tag("h1", f"{len(records)} runs side by side"),
                tag("ul", *runs, class_="runs"),
            ),
            tag("nav", tag("ul", *links), aria_label="Parts of the page"),
            tag("main", *(inside for _, inside in parts.values())),
            tag("footer", "Written by dinocomp compare."),
        ]
    )
    return document(f"{', '.join(names)} – dinocomp", body, charts)


def short_names(records: Sequence[RunRecord]) -> list[str]:
    """The folders' names; with as many of those above as it takes to tell them apart."""
    names = [record.name for record in records]
    for depth in range(2, max(len(record.folder.parts) for record in records) + 1):
        twice = {name for name, count in Counter(names).items() if count > 1}
        names = [
            "/".join(record.folder.parts[-depth:]) if name in twice else name
            for name, record in zip(names, records, strict=True)
        ]
    return names


def _of(charts: Sequence[Chart], key: str) -> list[Chart]:
    return [chart for chart in charts if chart.panel.section == key]


def _dot(run: int) -> Safe:
    return tag("span", class_=f"dot c{run % 8}", aria_hidden="true")


def _headings(names: Sequence[str]) -> list[object]:
    return [join([_dot(i), name]) for i, name in enumerate(names)]


def _numbers(names: Sequence[str], records: Sequence[RunRecord]) -> Safe:
    knns = [knn_of(record.evaluations) for record in records]
    ks = {knn.k for knn in knns if knn}
    k = f" (k = {ks.pop()})" if len(ks) == 1 else ""
    rows: list[tuple[str, list[float], Callable[[float], str], int]] = [  # name, values, how to show, which is better
        (f"k-NN accuracy{k}, last", [knn.last if knn else math.nan for knn in knns], percent, 1),
        (f"k-NN accuracy{k}, best", [knn.best if knn else math.nan for knn in knns], percent, 1),
        ("best at iteration", [knn.best_iteration if knn else math.nan for knn in knns], number, 0),
    ]
    free = sorted({name for record in records for name in record.evaluations if name.startswith("label_free/")})
    rows += [
        (f"{name.removeprefix('label_free/')}, last", [_last(r.evaluations.get(name)) for r in records], number, 0)
        for name in free
    ]
    rows += [
        ("loss, last lines", [record.recent("loss/total") for record in records], lambda v: number(v, 4), 0),
        ("spread of features", [record.recent("teacher/feature_std") for record in records], number, 0),
        ("images a second", [record.recent("images_per_second") for record in records], number, 1),
        ("seconds an iteration", [record.recent("seconds_per_iteration") for record in records], number, -1),
        ("data wait", [record.recent("data_wait") for record in records], percent, -1),
        ("time in training", [record.training_seconds for record in records], duration, 0),
        ("memory (GB)", [record.recent("memory_gb") for record in records], number, -1),
        ("iterations done", [record.iteration for record in records], number, 0),
        ("iterations of the run", [record.iterations or math.nan for record in records], number, 0),
        ("bad steps", [_last(record.metrics.get("bad_steps")) for record in records], number, 0),
        ("warnings", [sum(warned.count for warned in record.warnings) for record in records], number, 0),
    ]
    shown = []
    for title, values, how, better in rows:
        known = [value for value in values if math.isfinite(value)]
        if not known:
            continue
        best = better * max(better * value for value in known) if better and len(set(known)) > 1 else math.nan
        shown.append([title, *(tag("b", how(value)) if value == best else how(value) for value in values)])
    return table(["", *_headings(names)], shown, "Numbers")


def _last(values: object) -> float:
    known = [value for value in getattr(values, "tolist", list)() if math.isfinite(value)]
    return known[-1] if known else math.nan


def _differences(names: Sequence[str], records: Sequence[RunRecord]) -> Safe:
    keys = [name for name in all_keys() if name not in _APART]
    keys += sorted({name for record in records for name in record.settings} - {*keys, *_APART})
    rows = []
    for key in keys:
        values = [show(record.settings[key]) if key in record.settings else "–" for record in records]
        if len(set(values)) > 1:
            rows.append([tag("code", key), *values])
    words = "Settings that are not the same in all runs." if rows else "All settings are the same."
    listing = table(["key", *_headings(names)], rows, "Differences") or tag("p")
    return section("differences", "Differences", listing, words=words)


def _pictures(names: Sequence[str], records: Sequence[RunRecord]) -> Safe:
    figures = []
    for i, (name, record) in enumerate(zip(names, records, strict=True)):
        for iteration, path in record.pictures.get("pca", [])[-1:]:
            if picture := inline(path):
                image = image_of(picture, f"PCA of patch features of {name} at iteration {iteration:,}")
                caption = tag("figcaption", tag("h3", _dot(i), f"{name}, iteration {iteration:,}"))
                figures.append(tag("figure", caption, image))
    words = "The three main directions of the patches' features as red, green and blue, newest picture of each run."
    inside = tag("div", *figures, class_="pictures") if figures else ""
    return section("pictures", "PCA of the features", inside, words=words)
