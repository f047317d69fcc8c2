"""Curves of a page: none is lost, and none is too long."""

import json
import math

import numpy as np

from dinocomp.report.panels import MAX_POINTS, Chart, Sheet, charts_of, charts_together, thin

from .folders import line


def table(lines: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.array([each[name] for each in lines], dtype=float) for name in lines[0]}


def test_short_curves_stay_as_they_are() -> None:
    curve = thin(np.arange(5.0), np.arange(5.0) ** 2)
    assert curve.y.tolist() == [0, 1, 4, 9, 16] and curve.low is None


def test_long_curves_keep_their_mean_peaks_and_end() -> None:
    x, y = np.arange(60_000.0), np.ones(60_000)
    y[31_234] = 1000
    y[100:300] = math.nan
    y[59_900:] = 7
    curve = thin(x, y)
    assert len(curve.x) == len(curve.y) == MAX_POINTS
    assert np.nanmax(curve.high) == 1000 and curve.x[-1] == 59_999 and curve.y[-1] == 7
    assert 1 < curve.y[np.searchsorted(curve.x, 31_234)] < 1000
    assert np.isnan(curve.y).sum() == 3 and np.isnan(curve.low[np.isnan(curve.y)]).all(), "where all are missing"


def test_every_number_is_in_one_chart() -> None:
    charts = charts_of(table([line(10), line(20, loss__koleo=1), line(30)][:1]), {})
    drawn = [curve.label for chart in charts for curve in chart.curves]
    assert drawn.count("loss/total".rpartition("/")[2]) == 1 and "bad_steps" not in drawn, "nothing bad, no chart"
    assert {"backbone", "feature_std", "dino", "lr", "weight_decay", "images_per_second"} <= set(drawn)
    assert [chart.key for chart in charts_of(table([line(10, bad_steps=2)]), {})].count("bad") == 1


def test_votes_are_in_order_of_size() -> None:
    evaluations = {"iteration": np.zeros(1)} | {f"knn_top1/{k}": np.ones(1) for k in (100, 20, 5)}
    assert [curve.label for curve in charts_of({}, evaluations)[0].curves] == ["k = 5", "k = 20", "k = 100"]


def test_raw_pixels_are_a_level_line() -> None:
    """Of the first k, over all iterations."""
    evaluations = {
        "iteration": np.array([0.0, 500.0, 1000.0]),
        "knn_top1/10": np.array([0.5, 0.6, 0.7]),
        "pixels_top1/10": np.array([0.9, math.nan, math.nan]),
        "pixels_top1/20": np.array([0.8, math.nan, math.nan]),
    }
    (chart,) = charts_of({}, evaluations)
    score, pixels = chart.curves
    assert pixels.label == "raw pixels (k = 10)" and pixels.baseline and not score.baseline
    assert pixels.x.tolist() == [0, 1000] and pixels.y.tolist() == [0.9, 0.9]
    drawn = json.loads(Sheet([chart]).to_json())["charts"]["knn"]["curves"]
    assert [curve.get("baseline", False) for curve in drawn] == [False, True]
    assert [chart.title for chart in charts_together([("a", {}, evaluations)])] == ["k-NN accuracy: k = 10"]
    del evaluations["pixels_top1/10"], evaluations["pixels_top1/20"]
    assert len(charts_of({}, evaluations)[0].curves) == 1


def test_runs_together_have_one_line_to_beat_or_each_its_own() -> None:
    def lines(*tables: dict[str, np.ndarray]) -> list[list[tuple]]:
        charts = charts_together([("abc"[i], {}, table) for i, table in enumerate(tables)])
        return [[(c.label, c.x.tolist(), c.y.tolist()) for c in chart.curves if c.baseline] for chart in charts]

    short = {"iteration": np.array([0, 100]), "knn_top1/10": np.array([0.2, 0.5]), "knn_top1/20": np.array([0.2, 0.6])}
    long = short | {"iteration": np.array([0, 500])}
    first, second = ({"pixels_top1/10": np.array([level, math.nan])} for level in (0.4, 0.7))
    assert lines(short | first, long | first) == [[("raw pixels", [0, 500], [0.4, 0.4])], []]
    each = [("raw pixels (a)", [0, 100], [0.4, 0.4]), ("raw pixels (b)", [0, 100], [0.7, 0.7])]
    assert lines(short | first, short | second, short) == [each, []]


def test_runs_share_charts_and_keep_their_colours() -> None:
    one, two = table([line(10), line(20)]), table([line(10), line(20)])
    del one["loss/ibot"]
    charts = {chart.title: chart for chart in charts_together([("a", one, {}), ("b", two, {})])}
    assert [(curve.label, curve.colour) for curve in charts["Losses: total"].curves] == [("a", 0), ("b", 1)]
    assert [(curve.label, curve.colour) for curve in charts["Losses: ibot"].curves] == [("b", 1)]
    assert "Weight decay" in charts and len({chart.key for chart in charts.values()}) == len(charts)


def test_a_sheet_is_json_that_no_script_tag_ends() -> None:
    chart = charts_of(table([line(10, loss__total=math.nan), line(20)]), {})[0]
    curve = thin(np.array([1.0, 2.0]), np.array([math.inf, 0.123456789]), "</script><script>alert(1)")
    text = Sheet([chart, Chart(chart.panel, [curve], key="evil")]).to_json()
    assert "<" not in text
    sheet = json.loads(text)
    evil = sheet["charts"]["evil"]["curves"][0]
    assert evil["y"] == [None, 0.12346] and evil["name"].startswith("</script>")
    assert len(sheet["x"]) == 2, "what curves share is there once"
