"""The page of one run: `render`."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dinocomp.config.keys import show
from dinocomp.config.load import all_keys
from dinocomp.report.head import head
from dinocomp.report.markup import (
    HOW_TO_ZOOM,
    Safe,
    document,
    facts,
    image_of,
    join,
    moment,
    plots,
    section,
    table,
    tag,
)
from dinocomp.report.markup import plot as plot_of
from dinocomp.report.panels import Chart, charts_of, columns_of
from dinocomp.report.pictures import inline, spread
from dinocomp.report.record import RunRecord
from dinocomp.report.verdict import Gauge, gauges_of
from dinocomp.report.words import count, number

_PICTURES = 12  # of the PCA over time, in a page
_KINDS = {
    "attention": ("Attention", "Where the last block's class token looks."),
    "neighbours": ("Nearest neighbours", "Images, and those whose features are most like theirs."),
    "embedding": ("Map of the features", "Each point is an image; near points have like features."),
    "prototypes": ("Prototypes", "How many of the head's prototypes are used, and how evenly."),
}


def render(record: RunRecord) -> str:
    """The page, which needs nothing else: no file beside it and no network."""
    charts = charts_of(record.metrics, record.evaluations)
    parts = {
        "curves": ("Curves", _curves(charts)),
        "gauges": ("Health", _gauges(record, charts)),
        "pictures": ("Pictures", _pictures(record)),
        "evaluation": ("Evaluation", _results(record)),
        "speed": ("Speed", _speed(charts)),
        "schedules": ("Schedules", _schedules(charts)),
        "teacher": ("Use the teacher", _teacher(record)),
        "data": ("Data and run", _data(record)),
        "settings": ("Settings", _settings(record)),
        "log": ("Warnings", _log(record)),
    }
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, (title, inside) in parts.items() if inside]
    body = join(
        [
            head(record),
            tag("nav", tag("ul", *links), aria_label="Parts of the page"),
            tag("main", *(inside for _, inside in parts.values())),
            tag("footer", "Written by dinocomp", _version(record), ". ", _written(record)),
        ]
    )
    return document(f"{record.name} – dinocomp", body, charts)


def _written(record: RunRecord) -> Safe:
    command = f"dinocomp report {shlex.quote(str(record.folder))}"
    return join(["Made again at any time by ", tag("code", command), "."])


def _version(record: RunRecord) -> str:
    version = record.part("versions").get("dinocomp", "")
    return f" {version}" if version else ""


def _of(charts: list[Chart], key: str) -> list[Chart]:
    return [chart for chart in charts if chart.panel.section == key]


def _curves(charts: list[Chart]) -> Safe:
    return section("curves", "Curves", plots(_of(charts, "curves")), words=HOW_TO_ZOOM)


def _gauges(record: RunRecord, charts: list[Chart]) -> Safe:
    found = gauges_of(record)
    figures = []
    for chart in _of(charts, "gauges"):
        names = columns_of(chart.panel, record.metrics)
        judged = [gauge for gauge in found if f"teacher/{gauge.key}" in names]
        figures.append(plot_of(chart, join(_judged(gauge, alone=len(judged) == 1) for gauge in judged)))
    words = "The teacher's collapse is how self-supervised training fails: its features become the same for all images."
    return section("gauges", "Health", tag("div", *figures, class_="charts") if figures else "", words=words)


def _judged(gauge: Gauge, *, alone: bool) -> Safe:
    looks = {"good": "looks fine", "note": "too early to say", "watch": "watch it", "bad": "looks like collapse"}
    return tag(
        "p",
        "" if alone else tag("b", f"{gauge.title}. "),
        f"Healthy: {gauge.healthy}. This run: {gauge.now} → ",
        tag("span", looks[gauge.level], class_=f"level {gauge.level}"),
        ".",
    )


def _pictures(record: RunRecord) -> Safe:
    figures = []
    over_time = [
        (iteration, picture)
        for iteration, path in spread(record.pictures.get("pca", []), _PICTURES)
        if (picture := inline(path))
    ]
    if over_time:
        images = [
            image_of(picture, f"PCA of patch features at iteration {iteration:,}", data_iteration=iteration)
            for iteration, picture in over_time
        ]
        slider = tag(
            "div",
            tag("label", "over time", for_="pca-slider"),
            tag("input", type="range", id="pca-slider", min=0, max=len(images) - 1, step=1, value=len(images) - 1),
            tag("output", for_="pca-slider"),
            class_="slider",
        )
        words = "The patches' three main directions as red, green and blue: where colours are alike, features are."
        figures.append(
            tag("figure", _caption("PCA of the features", words), slider, *images, class_="wide", data_slider=True)
        )
    for kind in [*_KINDS, *sorted(record.pictures.keys() - _KINDS.keys() - {"pca"})]:
        title, words = _KINDS.get(kind, (kind, ""))
        for iteration, path in record.pictures.get(kind, [])[-1:]:
            figures.append(_picture(path, f"{title}, iteration {iteration:,}", words))
    if record.first_batch:
        words = "Crops of the first batch as the networks were given them; grey patches are masked."
        figures.append(_picture(record.first_batch, "First batch", words, class_="wide"))
    figures = [figure for figure in figures if figure]
    return section("pictures", "Pictures", tag("div", *figures, class_="pictures") if figures else "")


def _caption(title: str, words: str) -> Safe:
    return tag("figcaption", tag("h3", title), tag("div", words, class_="words"))


def _picture(path: Path, title: str, words: str, **attributes: str) -> Safe:
    picture = inline(path)
    if picture is None:
        return Safe()
    return tag("figure", _caption(title, words), image_of(picture, f"{title}: {words}"), **attributes)


def _results(record: RunRecord) -> Safe:
    """What `dinocomp evaluate` found, whatever protocols it has."""
    found = record.results.get("table")
    if not isinstance(found, list):
        return Safe()
    rows = [[str(cell) for cell in row] for row in found if isinstance(row, list) and len(row) == 3]
    confusion = record.results.get("confusion")
    worst = confusion.get("worst_classes") if isinstance(confusion, dict) else None
    about = {key: record.results.get(key) for key in ("weights", "iteration", "train", "val")}
    said = [(name, value) for name, value in about.items() if value is not None]
    return section(
        "evaluation",
        "Evaluation",
        facts(said),
        table(("protocol", "measure", "value"), rows, "Results"),
        table(("class", "recognised", "taken for"), _confused(worst), "Classes that are recognised least often"),
        words="By dinocomp evaluate.",
    )


def _confused(worst: Any) -> Iterator[tuple[str, str, str]]:
    """Class, how often it is recognised and what it is taken for, of the rows that can be read."""
    for row in worst if isinstance(worst, list) else ():
        try:
            others = ", ".join(f"{other['class']} ({other['share']:.1%})" for other in row["taken_for"])
            yield str(row["class"]), f"{row['recall']:.1%} of {row['images']}", others
        except (KeyError, TypeError, ValueError):  # written by hand, or cut short
            continue


def _speed(charts: list[Chart]) -> Safe:
    words = "Evaluations and checkpoints do not count. How to make a run faster: docs/performance.md."
    return section("speed", "Speed", plots(_of(charts, "speed"), "small"), words=words)


def _schedules(charts: list[Chart]) -> Safe:
    return section("schedules", "Schedules", plots(_of(charts, "schedules"), "small"))


def _teacher(record: RunRecord) -> Safe:
    folder = shlex.quote(str(record.folder))
    if not record.weights:
        return section("teacher", "Use the teacher", tag("p", "There is none yet: it comes with the first checkpoint."))
    blocks = []
    for name in record.weights:
        what = "of the newest checkpoint" if name == "teacher.safetensors" else "of the best k-NN accuracy"
        code = (
            "import dinocomp\n\n"
            f"model = dinocomp.load({str(record.folder / name)!r})\n"
            'image = model.transform("photo.jpg")  # [3, H, W]\n'
            "tokens = model.forward_features(image[None])  # x_norm_clstoken [1, D], x_norm_patchtokens [1, N, D]\n"
            'names, features = model.embed("photos")  # of a folder: fp32 [n, D]'
        )
        blocks += [tag("p", tag("code", name), f", the teacher {what}:"), _code(code)]
    what = {"evaluate": "k-NN, linear and other probes", "show": "its features, in pictures"}
    commands = "\n\n".join(f"# {words}\ndinocomp {command} {folder}" for command, words in what.items())
    return section("teacher", "Use the teacher", *blocks, tag("p", "In a terminal:"), _code(commands))


def _code(code: str) -> Safe:
    return tag("pre", tag("code", code), tabindex="0")


def _data(record: RunRecord) -> Safe:
    known, config = record.facts, record.config
    data, evaluation, parameters = record.part("data"), record.part("evaluation"), record.part("parameters")
    images, processes = data.get("images"), known.get("world_size")
    rows: list[tuple[object, object]] = [
        ("training images", data.get("path") or record.settings.get("train.dataset_path")),
        ("how many", "" if images is None else count(images)),
        ("labels", f"{count(data['classes'])} classes" if data.get("classes") else "none" if data else ""),
    ]
    if evaluation:
        rows += [
            (
                f"evaluation: {what}",
                f"{count(evaluation.get(f'{split}_images', '?'))} images, {evaluation.get(split, '?')}",
            )
            for split, what in (("train", "reference"), ("val", "held out"))
        ]
    if config and isinstance(processes, int):
        batch = config.train.batch_size_per_gpu * processes
        rows.append(("images an iteration", f"{batch:,} ({config.train.batch_size_per_gpu} on each of {processes})"))
        if isinstance(images, int) and images:
            rows.append(("passes over the images", number(record.iteration * batch / images)))
    rows += [(f"parameters, {name}", count(value)) for name, value in parameters.items()]
    rows += [
        ("processes", processes),
        ("device", known.get("device")),
        ("precision", known.get("precision")),
        ("strategy", known.get("strategy")),
        ("started", moment(known["started"]) if known.get("started") else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.part("versions").items())),
        ("folder", record.folder),
    ]
    command = known.get("command")
    return section("data", "Data and run", facts(rows), _code(str(command)) if command else "")


def _settings(record: RunRecord) -> Safe:
    defaults = all_keys()
    rows = [
        (
            tag("code", name),
            show(value),
            show(known.default) if (known := defaults.get(name)) else "no such key",
            known.meaning if known else "",
        )
        for name, value in record.settings.items()
        if name not in defaults or value != defaults[name].default
    ]
    if not record.config_text:
        return Safe()
    listing = table(("key", "this run", "default", "meaning"), rows, "Settings", stack=True)
    whole = tag("details", tag("summary", "the whole config.yaml"), _code(record.config_text))
    words = "What differs from the defaults." if rows else "All are the defaults."
    return section("settings", "Settings", listing, whole, words=words)


def _log(record: RunRecord) -> Safe:
    items = [
        tag("li", tag("small", warned.time, f" · {warned.count} times alike" if warned.count > 1 else ""), warned.text)
        for warned in reversed(record.warnings[-50:])
    ]
    return section(
        "log", "Warnings", tag("ul", *items, class_="log") if items else "", words="Of train.log, newest first."
    )
