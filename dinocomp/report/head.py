"""The head of a run's page: how it stands, the numbers that matter, and what to know."""

import math

import numpy as np

from dinocomp.report.markup import Safe, card, moment, tag
from dinocomp.report.record import RunRecord
from dinocomp.report.verdict import knn_of, verdicts
from dinocomp.report.words import duration, number, percent

_PATIENCE = 600  # seconds without news, at least, after which a run that says it is running may be dead
_NOTICED = {"good": "fine", "note": "note", "watch": "watch", "bad": "wrong"}


def head(record: RunRecord) -> Safe:
    done, total, status = record.iteration, record.iterations, record.status
    share = f" ({percent(done / total, 0)})" if total else ""
    line: list[object] = [f"iteration {done:,}" + (f" of {total:,}" if total else ""), share]
    if status == "running" and math.isfinite(record.seconds_left):
        line.append(f", about {duration(record.seconds_left)} left")
    if updated := record.facts.get("updated"):
        line += [" · last news ", moment(updated)]
    news: Safe | str = ""
    if status == "running" and updated:
        patience = max(_PATIENCE, 20 * _or_zero(record.recent("seconds_per_iteration")))
        box = tag("input", type="checkbox", id="refresh")
        news = tag(
            "p",
            tag("span", data_updated=updated, data_patience=round(patience)),
            tag("label", box, " load anew every minute", for_="refresh"),
            class_="sub",
        )
    findings = [
        tag(
            "li",
            tag("span", f"{_NOTICED[verdict.level]}: ", class_=f"level {verdict.level}"),
            verdict.text,
            tag("small", " ", verdict.remedy) if verdict.remedy else "",
            class_=verdict.level,
        )
        for verdict in verdicts(record)
    ]
    return tag(
        "header",
        tag("p", "dinocomp · DINOv2 training", class_="kind"),
        tag("div", tag("h1", record.name), tag("span", status, class_=f"badge {status}"), class_="top"),
        tag("p", *line, class_="sub"),
        tag("progress", value=done, max=total, aria_label="Iterations done") if total else "",
        news,
        tag("dl", *_cards(record), class_="cards"),
        tag("ul", *findings, class_="verdicts", aria_label="What to know") if findings else "",
    )


def _cards(record: RunRecord) -> list[Safe]:
    cards = []
    if knn := knn_of(record.evaluations):
        cards.append(card("k-NN accuracy", percent(knn.last), f"k = {knn.k}, iteration {knn.last_iteration:,}"))
        if knn.last_iteration != knn.first_iteration:
            cards.append(card("best k-NN accuracy", percent(knn.best), f"iteration {knn.best_iteration:,}"))
    loss = record.recent("loss/total")
    if math.isfinite(loss):
        cards.append(card("loss", number(loss, 4), "median of last lines"))
    speed, wait = record.recent("images_per_second"), record.recent("data_wait")
    if math.isfinite(speed):
        cards.append(card("images a second", number(speed), f"data wait {percent(wait)}"))
    if math.isfinite(record.training_seconds):
        left = f"{duration(record.seconds_left)} left" if record.status == "running" else "without evaluations"
        cards.append(card("time in training", duration(record.training_seconds), left))
    if len(spent := record.evaluations.get("seconds", ())):
        total = float(np.nansum(spent))
        share = total / (total + record.training_seconds)
        note = f"{percent(share)} of the time" if math.isfinite(share) else "pictures included"
        cards.append(card("evaluations", duration(total), note))
    memory = record.recent("memory_gb")
    if math.isfinite(memory):
        cards.append(card("memory", f"{memory:.1f} GB", "peak of a process"))
    return cards


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
