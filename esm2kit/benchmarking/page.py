"""The HTML page of a report."""

import json
import math
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from esm2kit import plots
from esm2kit.benchmarking.advice import advise_seeds
from esm2kit.benchmarking.fold_page import build_fold_section, describe_folds
from esm2kit.benchmarking.report import (
    BASELINE_NAMES,
    MAX_CONFUSED_PAIRS,
    Comparison,
    Metric,
    Report,
    ReportRow,
    describe_row,
    display_name,
    format_comparison,
    format_value,
    metric_name,
)
from esm2kit.benchmarking.sweep_page import build_sweep_sections
from esm2kit.benchmarking.sweep_summary import describe_place
from esm2kit.benchmarking.uncertainty_page import build_uncertainty_section
from esm2kit.core.paths import portable_name
from esm2kit.pages import build_figure, build_headers, format_sentence, render_page
from esm2kit.plots import MAX_CELL_TEXTS
from esm2kit.tasks.metrics import Interval
from esm2kit.tasks.scaling import TargetScale
from esm2kit.tasks.tables import split_unit

# A larger table of predictions is not part of the page; predictions.npz has every prediction.
MAX_TABLE_BYTES = 4_000_000
MAX_COLUMN_FIGURES = 6  # of several targets, the first ones are plotted
# Description of a row by its kind. The description of a baseline is its note.
ROLES = {
    "finetuned": "the fine-tuned encoder and head",
    "probe": "the probe on the frozen encoder",
    "untrained": "the same probe on an untrained encoder",
}


def build_score_plot(
    names: Sequence[str],
    rows: Sequence[ReportRow],
    metric: str,
    marked: Sequence[str],
    published: Mapping[str, float],
    on: str = " on test",
) -> tuple[Callable[[], Axes], str]:
    """Return a function that plots the scores of rows in one metric, and the scores as text."""
    scores = [row.metrics.get(metric) for row in rows]
    columns = [
        [math.nan if score is None or getattr(score, end) is None else getattr(score, end) for score in scores]
        for end in ("value", "low", "high")
    ]
    text = "; ".join(
        f"{name} {format_value(metric, score and score.value)}" for name, score in zip(names, scores, strict=True)
    )
    return lambda: plots.scores_with_baselines(names, *columns, metric_name(metric), marked, published, on=on), text


def format_metric_cell(name: str, metric: Metric | None) -> dict[str, Any]:
    """Format a table cell of a metric: the value, and its interval and spread below."""
    if metric is None or metric.value is None:
        return {"text": format_value(name, None), "number": True}
    low, high, spread = (format_value(name, end, metric.value) for end in (metric.low, metric.high, metric.seed_spread))
    between = "" if metric.low is None else f"[{low}, {high}]"
    deviation = f"\n±{spread}" if len(metric.seeds) > 1 else ""
    return {"text": format_value(name, metric.value), "small": between + deviation, "number": True}


def build_score_table(report: Report) -> dict[str, Any]:
    """Build the table of all rows and metrics of a report."""
    headline, names = report.task.metric, report.row_names
    metrics = [headline, *(name for name in report.first.metrics if name != headline)]
    rows = [
        {
            "marked": number == 0,
            "cells": [
                {"text": names[row.name], "small": row.name if row.kind in ROLES else row.note},
                *(format_metric_cell(metric, row.metrics.get(metric)) for metric in metrics),
            ],
        }
        for number, row in enumerate(report.rows)
    ]
    caption = "Scores on the test set. Brackets: 95% confidence interval from a bootstrap over proteins."
    caption += " ±: standard deviation over seeds."
    if report.folds is not None:
        caption = "Scores over all folds. Brackets: 95% confidence interval over groups of proteins and training sets."
        caption += " ±: standard deviation over repeats and seeds."
    if report.task.columns:
        values = "training values" if report.folds is None else "values"
        caption += (
            f" Each score is the mean over the targets; RMSE is relative to the standard deviation of the {values}"
        )
        caption += " of each target."
    return {
        "headers": build_headers(["model", *(metric_name(name, report.task.unit) for name in metrics)]),
        "rows": rows,
        "caption": caption,
    }


def _name_score(report: Report) -> str:
    """Return the name of the headline metric, with what it was computed on."""
    name = metric_name(report.task.metric)
    return f"Test {name}" if report.folds is None else f"Cross-validated {name}"


def _name_set(report: Report) -> str:
    """Return what was predicted, for captions."""
    return "on the test set" if report.folds is None else "on the fold that it was not trained on"


def _build_confusion_figure(report: Report) -> list[dict[str, str]]:
    """Build the figure of the confusion matrix, or of the most frequent confusions of many classes if there are any."""
    first, labels = report.first, report.task.labels
    name = describe_row(first)
    if first.confusion:
        alt = f"Confusion matrix of the {name} with {len(labels)} classes"
        caption = f"Confusion matrix of the {name} {_name_set(report)} (first seed)"
        caption += ": percent of the true class, and number of test targets." if len(labels) <= MAX_CELL_TEXTS else "."
        return [build_figure(lambda: plots.confusion_matrix(first.confusion, labels), alt, caption)]
    if not first.confused:
        return []
    shown = [(pair["true"], pair["predicted"], pair["count"]) for pair in first.confused]
    alt = f"Most frequent confusions of the {name} among {len(labels)} classes"
    caption = f"{alt} {_name_set(report)} (first seed): true class → predicted class. report.json lists up to "
    caption += f"{MAX_CONFUSED_PAIRS}."
    return [build_figure(lambda: plots.confused_pairs(shown), alt, caption)]


def _build_figures(report: Report, truth: np.ndarray, predicted: np.ndarray) -> list[dict[str, str]]:
    """Build the figures of the scores, the predictions and the learning curves."""
    task, first, metric = report.task, report.first, report.task.metric
    name = describe_row(first)
    published = {entry.model: entry.value for entry in report.published if entry.metric == metric}
    names = list(report.row_names.values())
    draw, scores = build_score_plot(
        names, report.rows, metric, names[:1], published, " on test" if report.folds is None else " over all folds"
    )
    score = _name_score(report)
    caption = f"{score} of the {name} (blue) and of the models it is compared with. Bars: 95% "
    caption += f"confidence intervals.{' Diamonds: published scores.' if published else ''}"
    figures = [build_figure(draw, f"{score}: {scores}", caption)]
    if task.is_multilabel:
        figures.append(_build_label_figure(report))
    elif task.target == "class":
        figures += _build_confusion_figure(report)
    elif task.columns:
        figures += _build_column_figures(report, truth, predicted)
    else:
        figures.append(
            build_figure(
                lambda: plots.predicted_vs_true(truth, predicted, task.unit),
                f"Predicted and measured values of {len(truth)} test targets for the {name}",
                f"Predictions of the {name} {_name_set(report)} (first seed). Dashed line: prediction equals "
                "measurement.",
            )
        )  # fmt: skip
    if first.history:
        train, validation = first.history["train_loss"], first.history["validation_loss"]
        kept = first.selected.get("epoch", [])
        figures.append(
            build_figure(
                lambda: plots.learning_curves(train, validation, kept),
                f"Training and validation loss over {len(train)} epochs, one line per seed",
                f"Learning curves of the {name}, one line per seed. Dots mark the epochs whose weights were kept. "
                f"{advise_seeds(first.history)}",
            )
        )  # fmt: skip
    return figures


def _build_label_figure(report: Report) -> dict[str, str]:
    """Build the figure of the scores of single labels."""
    table, name = report.first.per_class, describe_row(report.first)
    f1, support = ({label: entry[key] for label, entry in table.items()} for key in ("f1", "support"))
    caption = f"F1 of each label for the {name} {_name_set(report)} (first seed), and the number of proteins with the "
    caption += "label."
    caption += " The 20 most frequent labels are shown." if len(table) > 20 else ""
    return build_figure(lambda: plots.label_scores(f1, support), f"F1 of {len(table)} labels for the {name}", caption)


def _build_column_figures(report: Report, truth_MC: np.ndarray, predicted_MC: np.ndarray) -> list[dict[str, str]]:
    """Build the figures of predicted and measured values of the first targets."""
    figures, name = [], describe_row(report.first)
    for column, target in enumerate(report.task.columns[:MAX_COLUMN_FIGURES]):
        known_M, unit = np.isfinite(truth_MC[:, column]), split_unit(target)[1]
        truth_N, predicted_N = truth_MC[known_M, column], predicted_MC[known_M, column]
        draw = partial(plots.predicted_vs_true, truth_N, predicted_N, unit)
        alt = f"Predicted and measured {target} of {len(truth_N)} proteins for the {name}"
        caption = f"{target}: predictions of the {name} {_name_set(report)} (first seed). Dashed line: prediction "
        caption += "equals measurement."
        figures.append(build_figure(draw, alt, caption))
    return figures


def _build_target_table(report: Report) -> list[dict[str, Any]]:
    """Build the section with the scores of each of several targets, for the first row and the best baseline."""
    if not report.first.per_target:
        return []
    shown, best = {report.row_names[report.first.name]: report.first}, report.best_baseline
    shown |= {display_name(best.name): best} if best else {}
    metrics = [report.task.metric, *(name for name in report.first.metrics if name != report.task.metric)]
    rows = [
        {
            "marked": row is report.first,
            "cells": [
                {"text": target, "small": name},
                *(format_metric_cell(metric, row.per_target.get(target, {}).get(metric)) for metric in metrics),
            ],
        }
        for target in report.task.columns
        for name, row in shown.items()
    ]
    headers = build_headers(["target", *map(metric_name, metrics)])
    caption = "RMSE is in the unit of the target. Brackets: 95% confidence interval from a bootstrap over proteins."
    if report.folds is not None:
        caption = "RMSE is in the unit of the target. Brackets: as in the table of the scores."
    return [{"title": "Scores per target", "table": {"headers": headers, "rows": rows, "caption": caption}}]


def _build_pair_table(report: Report) -> list[dict[str, Any]]:
    """Build the section with the scores of test pairs by the number of their proteins that train has."""
    counts = report.task.shared_test
    if not counts:
        return []
    metrics = [report.task.metric, *(name for name in report.first.metrics if name != report.task.metric)]
    names = {"0": "none of both", "1": "one of both", "2": "both"}
    rows = [
        {
            "marked": row is report.first,
            "cells": [
                {"text": names[number], "small": report.row_names[row.name]},
                {"text": f"{counts[number]:,}", "number": True},
                *(format_metric_cell(metric, row.by_shared.get(number, {}).get(metric)) for metric in metrics),
            ],
        }
        for number in counts
        for row in report.rows
        if row is report.first or (row.kind == "baseline" and counts[number])
    ]
    headers = build_headers(["proteins of a test pair that train has", "test pairs", *map(metric_name, metrics)])
    caption = (
        f"Proteins count as the same by: {report.task.grouping}. Pairs with new proteins show what transfers; the "
    )
    caption += "baseline of interactions per protein knows no sequence. A dash: fewer than five pairs, or undefined."
    return [
        {"title": "Scores by proteins that train has", "table": {"headers": headers, "rows": rows, "caption": caption}}
    ]


def _build_class_table(report: Report) -> list[dict[str, Any]]:
    """Build the section with the scores of each class or label."""
    table = report.first.per_class
    if not table:
        return []
    names = {"precision": "precision", "recall": "recall", "f1": "F1", "mcc": "MCC", "map": "average precision"}
    names = {key: name for key, name in (names | {"auroc": "AUROC"}).items() if key in next(iter(table.values()))}
    rows = [
        {
            "cells": [
                {"text": label},
                *({"text": format_value(key, entry[key]), "number": True} for key in names),
                {"text": f"{entry['support']:,.0f}", "number": True},
            ]
        }
        for label, entry in table.items()
    ]
    what, counted = ("label", "proteins with it") if report.task.is_multilabel else ("class", "test targets")
    headers = build_headers([what, *names.values(), counted])
    return [{"title": f"Scores per {what}", "table": {"headers": headers, "rows": rows}}]


def _build_download(report: Report, table: str) -> dict[str, str] | None:
    """Return name and address of the table of predictions; None for one that would be too large for a page."""
    if not table or len(table) > MAX_TABLE_BYTES:
        return None
    name = portable_name(f"{report.task.name}_{report.task.split}_predictions.csv")
    return {"name": name, "address": f"data:text/csv;base64,{b64encode(table.encode()).decode()}"}


def _build_sections(
    report: Report, truth: np.ndarray, predicted: np.ndarray, table: str, predicted_SM: np.ndarray
) -> list[dict[str, Any]]:
    """Build the sections of the page: title with text, points, table, figures or code."""
    first = report.first
    sections = [
        {
            "title": "Scores",
            "table": build_score_table(report),
            "figures": _build_figures(report, truth, predicted),
            "download": _build_download(report, table),
        },
        {
            "title": "Differences between models",
            "text": "Paired bootstrap: both models are scored on the same resampled test proteins. "
            "Brackets: 95% confidence interval of the difference.",
            "points": [_format_pair(report, pair) for pair in report.comparisons],
        },
    ]
    if report.folds is not None:
        sections.insert(1, build_fold_section(report))
        sections[2]["text"] = (
            "Paired bootstrap: both models are scored on the same resampled groups of proteins, in the same folds. "
            "Brackets: 95% confidence interval of the difference, widened like those of the scores."
        )
    if report.layer_sweep is not None:
        sections += build_sweep_sections(report)
    sections += build_uncertainty_section(report, truth, predicted_SM)
    sections += [*_build_pair_table(report), *_build_target_table(report), *_build_class_table(report)]
    if report.published:
        rows = [
            {"cells": [{"text": entry.model}, {"text": metric_name(entry.metric)},
                       {"text": format_value(entry.metric, entry.value), "number": True},
                       format_metric_cell(entry.metric, first.metrics.get(entry.metric)),
                       {"text": f"{entry.source}: {entry.difference}"}]}
            for entry in report.published
        ]  # fmt: skip
        headers = [*build_headers(["published model", "metric"], 9), *build_headers(["published", "this report"], 0)]
        headers.append({"text": "source and differences in method"})
        sections.append({"title": "Published scores", "table": {"headers": headers, "rows": rows}})
    if report.notes:
        sections.append({"title": "Notes", "points": list(map(format_sentence, report.notes))})
    # the option `baselines` takes the short name
    names = {name: f"{display} ({name})" for name, display in BASELINE_NAMES.items()}
    methods = [f"{names.get(row.name, row.name)}: {row.note} ({row.seconds:.1f} s)" for row in report.rows if row.note]
    sections.append({"title": "How each row was computed", "points": methods})
    sections.append(
        {
            "title": "Provenance",
            "text": f"Data: {report.task.citation or 'provided by the user'}. Licence: {report.task.licence}.",
            "code": json.dumps(report.provenance, indent=2),
            "summary": "Configuration, SHA-256 of the inputs, software versions and git commit",
        }
    )
    return sections


def _format_pair(report: Report, pair: Comparison) -> str:
    """Write a comparison with the descriptions of the rows and the unit of the target."""
    names = report.row_names
    ends = (math.nan if end is None else end for end in (pair.difference, pair.low, pair.high))
    ours, theirs = (names.get(name, name) for name in (pair.ours, pair.theirs))
    text = format_comparison(ours, theirs, pair.metric, Interval(*ends), report.task.unit)
    return f"{text[:1].upper()}{text[1:]}"


def _format_lead(report: Report, truth: np.ndarray, predicted: np.ndarray) -> str:
    """Write the score of the first row, those it is compared with, and for values the spread of the predictions."""
    task, first, best, score = report.task, report.first, report.best_baseline, report.headline(report.first)
    unit = f" {task.unit}" if task.unit and task.metric == "rmse" else ""
    low, high = (format_value(task.metric, end, score.value) for end in (score.low, score.high))
    between = f" (95% confidence interval {low} to {high})"
    others = {ROLES[row.kind]: row for row in report.rows[1:] if row.kind in ROLES}
    others |= {f"the best baseline ({display_name(best.name)})": best} if best else {}
    scores = [f"{format_value(task.metric, report.headline(row).value)} for {name}" for name, row in others.items()]
    listed = " and ".join(filter(None, [", ".join(scores[:-1]), *scores[-1:]]))
    measured = TargetScale.from_values(truth).spread if task.target == "value" else 0.0
    if score.value is None:
        reason = ", because all measured values are equal" if task.target == "value" and not measured else ""
        return f"{_name_score(report)} of the {describe_row(first)} is undefined{reason}."
    lead = f"{_name_score(report)} of the {describe_row(first)}: {format_value(task.metric, score.value)}{unit}"
    lead += f"{'' if score.low is None else between}{listed and ', compared with '}{listed}."
    if measured and not task.columns:
        spread = f"{TargetScale.from_values(predicted).spread / measured:.0%} of that of the measured values"
        lead += f" The standard deviation of the predictions{' (first seed)' if first.seeds else ''} is {spread}."
    return lead


def _describe_choice(report: Report) -> str:
    """Describe the layer and the pooling that were chosen on validation, after the name of the model."""
    if report.layer_sweep is None:
        return ""
    best, count = report.layer_sweep.best, len(report.layer_sweep.points)
    return f", {describe_place(best.layer, best.pooling)} (chosen on validation among {count})"


def render_report(report: Report, truth: np.ndarray, predicted_SM: np.ndarray, table: str = "") -> str:
    """Render the page of one report.

    Args:
        report: The results.
        truth: (M,) scored test targets.
        predicted_SM: (S, M) predictions of the first row.
        table: CSV of the same for the reader to download.

    Returns:
        The HTML text.
    """
    task, predicted = report.task, predicted_SM[0]
    kind = "classification" if task.target == "class" else "regression"
    kind = f"multi-label {kind} with {len(task.binary_labels)} labels" if task.is_multilabel else kind
    kind = f"{kind} of {len(task.columns)} targets by one model" if task.columns else kind
    light = f"FLIP rates this split {task.traffic_light}. " if task.traffic_light else ""
    what = "Pairs of proteins" if task.pair_features else "Proteins"
    sizes = (
        f"{what}: {task.sizes['train']:,} train, {task.sizes['validation']:,} validation, {task.sizes['test']:,} "
        f"test. Scored test targets: {task.scored_test:,}."
    )
    sizes = sizes if report.folds is None else describe_folds(report)
    facts = [
        f"{'Pair' if task.pair_features else task.level.capitalize()}-level {kind}. {light}{sizes}",
        f"Model: {report.model.name}{_describe_choice(report)}.",
    ]
    title = f"{task.name}, split {task.split}" if report.folds is None else f"{task.name}, cross-validation"
    scores = _format_lead(report, truth, predicted)
    facts = [scores, *facts] if report.verdict else facts
    sections = _build_sections(report, truth, predicted, table, predicted_SM)
    return render_page(title, report.verdict or scores, facts, sections, report.warnings)
