"""Pieces of HTML. Whatever comes from outside is escaped here, and nowhere else."""

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import resources
from string import Template

from dinocomp.report.panels import Chart, Sheet
from dinocomp.report.pictures import Inlined
from dinocomp.report.words import number, percent

HOW_TO_ZOOM = (
    "Drag across a chart (on a phone, after its zoom button) to zoom all of them to those iterations; double click "
    "to see the whole run again; click a name to hide its curve. Where a point is the mean of many lines, a pale "
    "band shows their extremes."
)
_EMPTY = ("img", "input")  # elements that have no end


class Safe(str):
    """Text that is HTML already."""


def text(value: object) -> Safe:
    """Anything as HTML that shows it."""
    return value if isinstance(value, Safe) else Safe(html.escape(str(value)))


def join(parts: Iterable[object]) -> Safe:
    return Safe("".join(text(part) for part in parts))


def tag(name: str, *inside: object, **attributes: object) -> Safe:
    """An element; of attributes, `class_` is `class`, `data_x` is `data-x`, True is a name alone, None is left out."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Safe(f"<{name}{written}>" + ("" if name in _EMPTY else f"{join(inside)}</{name}>"))


def section(key: str, title: str, *inside: object, words: object = "") -> Safe:
    """A part of the page with a heading that can be linked to; nothing where it would be empty."""
    if not any(inside):
        return Safe()
    lead = tag("p", words, class_="lead") if words else ""
    return tag("section", tag("h2", title, id=f"{key}-title"), lead, *inside, id=key, aria_labelledby=f"{key}-title")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], label: str, *, stack: bool = False) -> Safe:
    """A table that scrolls by itself where it is wider than the page; the first cell of each row is its heading.

    Args:
        label: what it is, for those who cannot see it.
        stack: on a narrow screen, put the cells of a row one below the other.
    """
    body = []
    for first, *rest in rows:
        cells = [tag("td", cell, data_label=name) for cell, name in zip(rest, head[1:], strict=True)]
        body.append(tag("tr", tag("th", first, scope="row"), *cells))
    if not body:
        return Safe()
    titles = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    inside = tag("table", titles, tag("tbody", *body))
    return tag("div", inside, class_="table stack" if stack else "table", tabindex="0", role="region", aria_label=label)


def facts(rows: Iterable[tuple[object, object]]) -> Safe:
    """Names and what they are."""
    inside = [tag("div", tag("dt", name), tag("dd", value)) for name, value in rows if value not in ("", None)]
    return tag("dl", *inside) if inside else Safe()


def card(title: str, value: object, note: object = "") -> Safe:
    """A number that matters."""
    return tag("div", tag("dt", title), tag("dd", tag("b", value), tag("span", note)), class_="card")


def moment(iso: object) -> Safe:
    """A time that the page's script shows in the reader's own zone."""
    try:
        when = datetime.fromisoformat(str(iso))
    except ValueError:
        return text(iso or "–")
    when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
    shown = when.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return tag("time", shown, datetime=when.isoformat())


def image_of(picture: Inlined, alt: str, **attributes: object) -> Safe:
    return tag("img", src=picture.uri, width=picture.width, height=picture.height, alt=alt, **attributes)


def plot(chart: Chart, words: object = "") -> Safe:
    """The place of a chart, which the script fills; in words for those who cannot see it."""
    last = []
    for curve in chart.curves:
        known = [value for value in curve.y.tolist() if math.isfinite(value)]
        shown = percent if chart.panel.percent else number
        last.append(f"{curve.label} {shown(known[-1]) if known else '–'}")
    aria = f"{chart.title}, {len(chart.curves)} curve(s) over iterations. Last values: {'; '.join(last)}."
    buttons = [
        tag("button", words, type="button", data_do=do, aria_pressed="false")
        for do, words in (("smooth", "smooth"), ("x", "log x"), ("y", "log y"), ("zoom", "zoom"))
        if not (chart.panel.rare and do == "smooth")
    ]
    words = words or chart.panel.words
    return tag(
        "figure",
        tag("figcaption", tag("h3", chart.title), tag("div", words, class_="words") if words else ""),
        tag("div", *buttons, class_="tools", role="group", aria_label=f"How {chart.title} is drawn"),
        tag("div", class_="plot", data_chart=chart.key, role="img", aria_label=aria),
        class_="chart",
    )


def plots(charts: Iterable[Chart], number_of_columns: str = "") -> Safe:
    inside = [plot(chart) for chart in charts]
    return tag("div", *inside, class_=f"charts {number_of_columns}".strip()) if inside else Safe()


def document(title: str, body: Safe, charts: Sequence[Chart]) -> str:
    """The whole page, with all that it needs inside. It is not allowed to fetch anything, or to run other scripts."""
    from plotly.offline import get_plotlyjs

    ours = _file("page.js")
    scripts = [get_plotlyjs(), ours] if charts else [ours]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return Template(_file("page.html")).substitute(
        title=text(title),
        hashes=hashes,
        style=_file("page.css"),
        body=body,
        data=Sheet(list(charts)).to_json(),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def _file(name: str) -> str:
    return resources.files("dinocomp.report").joinpath(name).read_text(encoding="utf-8")
