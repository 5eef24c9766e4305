"""Pages of reports: one HTML file, no network, light or dark as the reader's system is."""

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from esm2kit import plots
from esm2kit.benchmarking.report import BASELINE_NAMES, Metric, Report, ReportRow, display_name, metric_name

# What kind of row it is; a baseline's note says how it was made.
ROLES = {
    "finetuned": "the encoder itself, trained on the labels",
    "probe": "the probe on the frozen encoder",
    "untrained": "the same probe on an untrained encoder",
}
# Stands for the page's text colour inside a figure, so that it follows light and dark.
INK = "#0a0b0c"


def render_page(title: str, lead: str, facts: Sequence[str], sections: Sequence[Mapping[str, Any]]) -> str:
    """The page's HTML; everything is escaped but the figures of `figure`."""
    pages = Environment(loader=PackageLoader("esm2kit.benchmarking"), autoescape=True, trim_blocks=True)
    return pages.get_template("page.html.j2").render(title=title, lead=lead, facts=facts, sections=sections)


def render_svg(draw: Callable[[], Axes], salt: str) -> str:
    """A figure as inline SVG whose text follows the page's colour."""
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings = dict.fromkeys(names, INK) | {"svg.fonttype": "none", "svg.hashsalt": salt, "savefig.dpi": 110}
    settings |= {"text.parse_math": False}  # a label may hold dollars
    with mpl.rc_context(settings):
        drawn = draw().figure
        text = io.StringIO()
        drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(drawn)
    body = text.getvalue()
    body = body[body.index("<svg") :].replace(INK, "currentColor").replace(to_hex(plots.PRIMARY), "var(--ours)")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # Ids must be unique on a page that holds several figures.
    body = re.sub(r'(\bid=")', rf"\1{salt}-", body)
    return re.sub(r'(url\(#|href="#)', rf"\1{salt}-", body)


def build_figure(draw: Callable[[], Axes], salt: str, alt: str, caption: str) -> dict[str, str]:
    """A figure of a section.

    Args:
        draw: makes the axes.
        salt: a word that no other figure of the page has.
        alt: text for who cannot see it.
        caption: below it.
    """
    return {"svg": render_svg(draw, salt), "alt": alt, "caption": caption}


def build_score_plot(
    names: Sequence[str], rows: Sequence[ReportRow], metric: str, ours: Sequence[str], published: Mapping[str, float]
) -> tuple[Callable[[], Axes], str]:
    """How to draw rows' scores in a metric, and the scores as text."""
    scores = [row.metrics.get(metric) for row in rows]
    columns = [
        [math.nan if score is None or getattr(score, end) is None else getattr(score, end) for score in scores]
        for end in ("value", "low", "high")
    ]
    text = "; ".join(
        f"{name} {format_number(score and score.value)}" for name, score in zip(names, scores, strict=True)
    )
    return lambda: plots.scores_with_baselines(names, *columns, metric_name(metric), ours, published), text


def format_number(value: float | None, digits: int = 3) -> str:
    """A number for a table; an undefined one is a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def format_metric_cell(metric: Metric | None) -> dict[str, Any]:
    """A table's cell: the value, with its interval and spread below."""
    if metric is None or metric.value is None:
        return {"text": "–", "number": True}
    between = "" if metric.low is None else f"[{format_number(metric.low)}, {format_number(metric.high)}]"
    spread = f" ±{metric.seed_spread:.3f}" if len(metric.seeds) > 1 else ""
    return {"text": format_number(metric.value), "small": between + spread, "number": True}


def build_headers(names: Sequence[str], numbers_from: int = 1) -> list[dict[str, Any]]:
    """A table's heads; columns from `numbers_from` on hold numbers."""
    return [{"text": name, "number": place >= numbers_from} for place, name in enumerate(names)]


def build_score_table(report: Report) -> dict[str, Any]:
    """Rows and metrics of one report."""
    headline = report.task.metric
    metrics = [headline, *(name for name in report.first.metrics if name != headline)]
    rows = [
        {
            "ours": place == 0,
            "cells": [
                {"text": display_name(row.name), "small": ROLES.get(row.kind, row.note)},
                *(format_metric_cell(row.metrics.get(metric)) for metric in metrics),
            ],
        }
        for place, row in enumerate(report.rows)
    ]
    unit = f" RMSE in {report.task.unit}." if report.task.unit else ""
    caption = f"Test set, scored once. [95% interval over proteins] ± spread over seeds.{unit}"
    return {"heads": build_headers(["model", *map(metric_name, metrics)]), "rows": rows, "caption": caption}


def _figures(report: Report, truth: np.ndarray, predicted: np.ndarray) -> list[dict[str, str]]:
    task, first, metric = report.task, report.first, report.task.metric
    printed = {entry.model: entry.value for entry in report.published if entry.metric == metric}
    names = [display_name(row.name) for row in report.rows]
    draw, scores = build_score_plot(names, report.rows, metric, names[:1], printed)
    above = "; diamonds: published by others." if printed else "."
    caption = f"{metric_name(metric)} of {first.name} (blue) and of what it has to beat{above}"
    figures = [build_figure(draw, "scores", f"{metric_name(metric)} on test: {scores}", caption)]
    if task.target == "class":
        confusion = np.array(first.confusion)
        figures.append(
            build_figure(
                lambda: plots.confusion_matrix(confusion, task.labels), "confusion",
                f"Confusion matrix of {first.name}, {len(task.labels)} classes",
                f"What {first.name} takes each class for (first seed).",
            )
        )  # fmt: skip
    else:
        figures.append(
            build_figure(
                lambda: plots.predicted_vs_true(truth, predicted, task.unit), "scatter",
                f"Predicted against measured values of {len(truth)} test targets, {first.name}",
                f"{first.name} on test (first seed); the dashed line is equality.",
            )
        )  # fmt: skip
    if first.history:
        train, validation = first.history["train_loss"], first.history["validation_loss"]
        kept = first.selected.get("epoch", [])
        figures.append(
            build_figure(
                lambda: plots.learning_curves(train, validation, kept), "curves",
                f"Training and validation loss of {len(train)} epochs, one line a seed",
                f"Learning curves of {first.name}, a line a seed; dots mark the weights that were kept.",
            )
        )  # fmt: skip
    return figures


def _sections(report: Report, truth: np.ndarray, predicted: np.ndarray) -> list[dict[str, Any]]:
    first = report.first
    sections = [
        {"title": "Scores", "table": build_score_table(report), "figures": _figures(report, truth, predicted)},
        {
            "title": "Is the difference real?",
            "text": "Paired bootstrap over test proteins: both models are scored on the same draws.",
            "points": [pair.sentence for pair in report.comparisons],
        },
    ]
    if first.per_class:
        rows = [
            {
                "cells": [
                    {"text": label},
                    *({"text": format_number(entry[key]), "number": True} for key in ("precision", "recall", "f1")),
                    {"text": f"{entry['support']:,.0f}", "number": True},
                ]
            }
            for label, entry in first.per_class.items()
        ]
        head = build_headers(["class", "precision", "recall", "F1", "in test"])
        sections.append({"title": "Class by class", "table": {"heads": head, "rows": rows}})
    if report.published:
        rows = [
            {"cells": [{"text": entry.model}, {"text": metric_name(entry.metric)},
                       {"text": format_number(entry.value), "number": True},
                       format_metric_cell(first.metrics.get(entry.metric)),
                       {"text": f"{entry.source}: {entry.difference}"}]}
            for entry in report.published
        ]  # fmt: skip
        head = [*build_headers(["published model", "metric"], 9), *build_headers(["published", "this report"], 0)]
        head.append({"text": "source, and why it may differ"})
        sections.append({"title": "Beside published figures", "table": {"heads": head, "rows": rows}})
    if report.notes:
        sections.append({"title": "Read with care", "points": report.notes})
    # a baseline's short name too, which is what the option `baselines` takes
    short = {name: f"{long} ({name})" for name, long in BASELINE_NAMES.items()}
    made = [f"{short.get(row.name, row.name)}: {row.note} ({row.seconds:.1f} s)" for row in report.rows if row.note]
    sections.append({"title": "How each row was made", "points": made})
    sections.append(
        {
            "title": "Where it comes from",
            "text": f"Data: {report.task.citation or 'the user’s own'}. Licence: {report.task.licence}.",
            "code": json.dumps(report.provenance, indent=2),
            "summary": "Configuration, inputs with their SHA-256, versions and commit",
        }
    )
    return sections


def _lead(report: Report, truth: np.ndarray, predicted: np.ndarray) -> str:
    """The first row's score and those of its baselines in a sentence; of values also the spread of predictions."""
    task, first, best, score = report.task, report.first, report.best_baseline, report.headline(report.first)
    unit = f" {task.unit}" if task.unit and task.metric == "rmse" else ""
    between = "" if score.low is None else f", 95% interval {format_number(score.low)} to {format_number(score.high)}"
    others = {ROLES[row.kind]: row for row in report.rows[1:] if row.kind in ROLES}
    others |= {f"the best baseline ({display_name(best.name)})": best} if best else {}
    listed = "".join(f"; {name} has {format_number(report.headline(row).value)}" for name, row in others.items())
    lead = f"{first.name}: {metric_name(task.metric)} {format_number(score.value)}{unit}{between}{listed}."
    if task.target == "value" and np.std(truth) > 0:
        spread = f"{np.std(predicted) / np.std(truth):.0%} as wide as the measured values do"
        lead += f" Its predictions{' (first seed)' if first.seeds else ''} spread {spread}."
    return lead


def render_report(report: Report, truth: np.ndarray, predicted: np.ndarray) -> str:
    """The page of one report.

    Args:
        report: the results.
        truth: of the scored test targets.
        predicted: by the first row's first seed.
    """
    task = report.task
    light = f"FLIP's traffic light: {task.traffic_light}. " if task.traffic_light else ""
    facts = [
        f"{task.level.capitalize()} task, target: {task.target}. {light}Proteins: {task.sizes['train']:,} train, "
        f"{task.sizes['validation']:,} validation, {task.sizes['test']:,} test; {task.scored_test:,} targets scored.",
    ]
    title = f"{task.name}, split {task.split}"
    return render_page(title, _lead(report, truth, predicted), facts, _sections(report, truth, predicted))
