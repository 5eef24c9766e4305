"""A benchmark's results as report.json (figures a program can read) and report.html (one file a person can).

Schema of report.json, version 1; undefined numbers are null:

    schema            "esm2kit.report/1"
    task              name, level, target, split, metric, unit, labels, traffic_light, licence, citation, official,
                      sizes {train, validation, test} in proteins, scored_test (targets scored)
    model             name, embeddings {name, path, layer, ...}
    settings          preset, its source, seeds, limit, resamples
    rows              one a model, the fine-tuned one or the probe first:
        name, kind ("finetuned" | "probe" | "untrained" | "baseline"), note, config, seconds
        seeds         the seeds, empty where there is no chance
        selected      what validation chose
        metrics       metric -> {value, low, high, seeds [..], seed_spread}; value is the mean over seeds, low and high
                      its 95% protein-level bootstrap interval; null where every draw gives the same figure, but for
                      accuracy, which then has the rule of three's (esm2kit.tasks.metrics.without_width)
        per_class     label -> {precision, recall, f1, support}; class tasks only, first seed
        confusion     K x K counts, first seed; class tasks only
        history       train_loss, validation_loss: epochs x seeds
    comparisons       {ours, theirs, metric, difference, low, high, sentence}: paired bootstrap, positive is better
    published         {metric, value, model, source, difference}: others' figures for this task and split
    notes             what a reader of these scores must know
    files             {predictions}: beside the report
    provenance        stage, config, inputs with sha256, versions, git_commit, created
"""

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, select_autoescape
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from esm2kit import plots
from esm2kit.benchmarking.page import PAGE
from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, write_json
from esm2kit.tasks.metrics import LOWER_IS_BETTER, Interval, Score, finite, paired_difference

SCHEMA = "esm2kit.report/1"
METRIC_NAMES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1", "mcc": "MCC",
    "spearman": "Spearman", "pearson": "Pearson", "rmse": "RMSE", "r2": "R²", "ndcg": "NDCG",
}  # fmt: skip
# A baseline's name for a reader; a row and the option `baselines` keep the short one.
BASELINE_NAMES = {
    "majority": "majority class", "mean": "mean of train", "onehot_ridge": "one-hot, linear",
    "onehot_cnn": "one-hot CNN", "levenshtein_nearest": "nearest by edits", "blosum62_nearest": "nearest by BLOSUM62",
}  # fmt: skip
# What kind of row it is; a baseline says how it was made.
ROLES = {
    "finetuned": "the encoder itself, trained on the labels",
    "probe": "the probe on the frozen encoder",
    "untrained": "the same probe on an untrained encoder",
}
# Stands for the page's text colour inside a figure, so that it follows light and dark.
INK = "#0a0b0c"


def told_name(name: str) -> str:
    """A row's name as a reader is told it."""
    return BASELINE_NAMES.get(name, name)


def sentence(ours: str, theirs: str, metric: str, difference: Interval) -> str:
    """ "B beats A by 1.2 [0.4, 2.0]", or that nothing was shown."""
    name = METRIC_NAMES.get(metric, metric)
    size, low, high = abs(difference.value), difference.low, difference.high
    sign = f" (+ is lower {name}, so better)" if metric in LOWER_IS_BETTER else ""
    if math.isfinite(size) and not math.isfinite(low):
        differs = f"{name} differs by {difference.value:+.3f}{sign} in every draw"
        return f"{ours} and {theirs}: {differs}, so there is no interval"
    if not all(map(math.isfinite, difference)):
        return f"{ours} and {theirs}: {name} is undefined for one of them"
    lower = " (lower is better)" if metric in LOWER_IS_BETTER else ""
    if low > 0:
        return f"{ours} beats {theirs} by {size:.3f} [{low:.3f}, {high:.3f}] in {name}{lower}"
    if high < 0:
        return f"{theirs} beats {ours} by {size:.3f} [{-high:.3f}, {-low:.3f}] in {name}{lower}"
    between = f"{difference.value:+.3f} [{low:+.3f}, {high:+.3f}] in {name}{sign}"
    return f"no difference shown between {ours} and {theirs}: {between}"


def compared(ours: str, theirs: str, metric: str, difference: Interval) -> dict[str, Any]:
    """An entry of `comparisons`, as the schema above has it."""
    value, low, high = map(finite, difference)
    pair = {"ours": ours, "theirs": theirs, "metric": metric, "difference": value, "low": low, "high": high}
    return pair | {"sentence": sentence(told_name(ours), told_name(theirs), metric, difference)}


def comparisons(
    name: str, ours: Mapping[str, Score], others: Mapping[str, Mapping[str, Score]], headline: str
) -> list[dict[str, Any]]:
    """A row against every other one, under the same draws.

    Args:
        name: the row's.
        ours: its scores, by metric.
        others: the scores of the others, by their names.
        headline: the metric to compare; values are compared with a constant, which has no rank correlation, by RMSE.
    """
    pairs = []
    for other, theirs in others.items():
        metric = headline if math.isfinite(theirs[headline].interval.value) else "rmse"
        pairs.append(compared(name, other, metric, paired_difference(metric, ours[metric], theirs[metric])))
    return pairs


def svg(draw: Callable[[], Axes], salt: str) -> str:
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
    body = body[body.index("<svg") :].replace(INK, "currentColor").replace(to_hex(plots.OURS), "var(--ours)")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # Ids must be unique on a page that holds several figures.
    body = re.sub(r'(\bid=")', rf"\1{salt}-", body)
    return re.sub(r'(url\(#|href="#)', rf"\1{salt}-", body)


def figure(draw: Callable[[], Axes], salt: str, alt: str, caption: str) -> dict[str, str]:
    return {"svg": svg(draw, salt), "alt": alt, "caption": caption}


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a table; an undefined one is a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def metric_cell(metric: Mapping[str, Any] | None) -> dict[str, Any]:
    if metric is None or metric["value"] is None:
        return {"text": "–", "number": True}
    between = "" if metric["low"] is None else f"[{number(metric['low'])}, {number(metric['high'])}]"
    spread = f" ±{metric['seed_spread']:.3f}" if len(metric["seeds"]) > 1 else ""
    return {"text": number(metric["value"]), "small": between + spread, "number": True}


def heads(names: Sequence[str], numbers_from: int = 1) -> list[dict[str, Any]]:
    return [{"text": name, "number": place >= numbers_from} for place, name in enumerate(names)]


def best_baseline(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The baseline row that is best in the headline metric; None where no baseline has a figure in it."""
    metric = report["task"]["metric"]
    rows = [row for row in report["rows"] if row["kind"] == "baseline" and row["metrics"][metric]["value"] is not None]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(rows, key=lambda row: sign * row["metrics"][metric]["value"], default=None)


def score_table(report: Mapping[str, Any]) -> dict[str, Any]:
    """Rows and metrics of one report, for the page."""
    headline = report["task"]["metric"]
    metrics = [headline, *(name for name in report["rows"][0]["metrics"] if name != headline)]
    head = heads(["model", *(METRIC_NAMES.get(name, name) for name in metrics)])
    rows = [
        {
            "ours": place == 0,
            "cells": [
                {"text": told_name(row["name"]), "small": ROLES.get(row["kind"], row["note"])},
                *(metric_cell(row["metrics"].get(m)) for m in metrics),
            ],
        }
        for place, row in enumerate(report["rows"])
    ]
    unit = f" RMSE in {report['task']['unit']}." if report["task"]["unit"] else ""
    caption = f"Test set, scored once. [95% interval over proteins] ± spread over seeds.{unit}"
    return {"heads": head, "rows": rows, "caption": caption}


def _figures(report: Mapping[str, Any], truth: np.ndarray, predicted: np.ndarray) -> list[dict[str, str]]:
    task, rows, headline = report["task"], report["rows"], report["task"]["metric"]
    first = rows[0]
    scores = [row["metrics"].get(headline) or {"value": None, "low": None, "high": None} for row in rows]
    columns = {end: [math.nan if s[end] is None else s[end] for s in scores] for end in ("value", "low", "high")}
    printed = {p["model"]: p["value"] for p in report["published"] if p["metric"] == headline}
    name = METRIC_NAMES.get(headline, headline)
    names = [told_name(row["name"]) for row in rows]
    alt = "; ".join(f"{told} {number(score['value'])}" for told, score in zip(names, scores, strict=True))
    figures = [
        figure(
            lambda: plots.scores_beside_baselines(
                names, columns["value"], columns["low"], columns["high"], name, ours=names[:1], published=printed
            ),
            "scores", f"{name} on test: {alt}",
            f"{name} of {first['name']} (blue) and of what it has to beat"
            + ("; diamonds: published by others." if printed else "."),
        )
    ]  # fmt: skip
    if task["target"] == "class":
        confusion = np.array(first["confusion"])
        figures.append(
            figure(
                lambda: plots.confusion_matrix(confusion, task["labels"]), "confusion",
                f"Confusion matrix of {first['name']}, {len(task['labels'])} classes",
                f"What {first['name']} takes each class for (first seed).",
            )
        )  # fmt: skip
    else:
        figures.append(
            figure(
                lambda: plots.predicted_vs_true(truth, predicted, task["unit"]), "scatter",
                f"Predicted against measured values of {len(truth)} test targets, {first['name']}",
                f"{first['name']} on test (first seed); the dashed line is equality.",
            )
        )  # fmt: skip
    if first["history"]:
        curves = first["history"]
        kept = first["selected"].get("epoch", [])
        figures.append(
            figure(
                lambda: plots.learning_curves(curves["train_loss"], curves["validation_loss"], kept), "curves",
                f"Training and validation loss of {len(curves['train_loss'])} epochs, one line a seed",
                f"Learning curves of {first['name']}, a line a seed; dots mark the weights that were kept.",
            )
        )  # fmt: skip
    return figures


def _sections(report: Mapping[str, Any], truth: np.ndarray, predicted: np.ndarray) -> list[dict[str, Any]]:
    sections = [
        {"title": "Scores", "table": score_table(report), "figures": _figures(report, truth, predicted)},
        {
            "title": "Is the difference real?",
            "text": "Paired bootstrap over test proteins: both models are scored on the same draws.",
            "points": [item["sentence"] for item in report["comparisons"]],
        },
    ]
    table = report["rows"][0]["per_class"]
    if table:
        rows = [
            {
                "cells": [
                    {"text": label},
                    *({"text": number(entry[key]), "number": True} for key in ("precision", "recall", "f1")),
                    {"text": f"{entry['support']:,.0f}", "number": True},
                ]
            }
            for label, entry in table.items()
        ]
        head = heads(["class", "precision", "recall", "F1", "in test"])
        sections.append({"title": "Class by class", "table": {"heads": head, "rows": rows}})
    if report["published"]:
        ours = report["rows"][0]["metrics"]
        rows = [
            {"cells": [{"text": item["model"]}, {"text": METRIC_NAMES.get(item["metric"], item["metric"])},
                       {"text": number(item["value"]), "number": True}, metric_cell(ours.get(item["metric"])),
                       {"text": f"{item['source']}: {item['difference']}"}]}
            for item in report["published"]
        ]  # fmt: skip
        head = [*heads(["published model", "metric"], 9), *heads(["published", "this report"], 0)]
        head.append({"text": "source, and why it may differ"})
        sections.append({"title": "Beside published figures", "table": {"heads": head, "rows": rows}})
    if report["notes"]:
        sections.append({"title": "Read with care", "points": report["notes"]})
    # a baseline's short name too, which is what the option `baselines` takes
    short = {name: f"{told} ({name})" for name, told in BASELINE_NAMES.items()}
    settings = [
        f"{short.get(row['name'], row['name'])}: {row['note']} ({row['seconds']:.1f} s)"
        for row in report["rows"]
        if row["note"]
    ]
    sections.append({"title": "How each row was made", "points": settings})
    task = report["task"]
    sections.append(
        {
            "title": "Where it comes from",
            "text": f"Data: {task['citation'] or 'the user’s own'}. Licence: {task['licence']}.",
            "code": json.dumps(report["provenance"], indent=2),
            "summary": "Configuration, inputs with their SHA-256, versions and commit",
        }
    )
    return sections


def render(title: str, lead: str, facts: Sequence[str], sections: Sequence[Mapping[str, Any]]) -> str:
    """The page's HTML; everything is escaped but the figures this module drew."""
    page = Environment(autoescape=select_autoescape(default_for_string=True), trim_blocks=True).from_string(PAGE)
    return page.render(title=title, lead=lead, facts=facts, sections=sections)


def _lead(report: Mapping[str, Any], truth: np.ndarray, predicted: np.ndarray) -> str:
    """The first row's figure and its rivals', in a sentence; of values also how far the predictions spread."""
    task, first, best = report["task"], report["rows"][0], best_baseline(report)
    metric = task["metric"]
    score = first["metrics"][metric]
    unit = f" {task['unit']}" if task["unit"] and metric == "rmse" else ""
    between = "" if score["low"] is None else f", 95% interval {number(score['low'])} to {number(score['high'])}"
    rivals = {ROLES[row["kind"]]: row for row in report["rows"][1:] if row["kind"] in ROLES}
    rivals |= {f"the best baseline ({told_name(best['name'])})": best} if best else {}
    told = "".join(f"; {rival} has {number(row['metrics'][metric]['value'])}" for rival, row in rivals.items())
    lead = f"{first['name']}: {METRIC_NAMES.get(metric, metric)} {number(score['value'])}{unit}{between}{told}."
    if task["target"] == "value" and np.std(truth) > 0:
        spread = f"{np.std(predicted) / np.std(truth):.0%} as wide as the measured values do"
        lead += f" Its predictions{' (first seed)' if first['seeds'] else ''} spread {spread}."
    return lead


def write_report(report: Mapping[str, Any], truth: np.ndarray, predicted: np.ndarray, out_dir: Path) -> Path:
    """Write report.json and report.html, each whole or not at all.

    Args:
        report: as the schema above.
        truth: of the scored test targets.
        predicted: by the first row's first seed.
        out_dir: folder for both.
    Returns: path of the HTML.
    """
    task, sizes = report["task"], report["task"]["sizes"]
    light = f"FLIP's traffic light: {task['traffic_light']}. " if task["traffic_light"] else ""
    facts = [
        f"{task['level'].capitalize()} task, target: {task['target']}. {light}Proteins: {sizes['train']:,} train, "
        f"{sizes['validation']:,} validation, {sizes['test']:,} test; {task['scored_test']:,} targets scored.",
    ]
    lead, sections = _lead(report, truth, predicted), _sections(report, truth, predicted)
    html = render(f"{task['name']}, split {task['split']}", lead, facts, sections)
    write_json(Path(out_dir) / "report.json", report)
    with atomic_path(Path(out_dir) / "report.html") as part:
        part.write_text(html, encoding="utf-8")
    return Path(out_dir) / "report.html"


def read_report(path: Path) -> dict[str, Any]:
    """A report.json, or the one in a folder.

    Raises: InputError if it is not one of this schema.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: make it with `esm2kit benchmark`") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no JSON: {error}") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        found = report.get("schema") if isinstance(report, dict) else type(report).__name__
        raise InputError(f"{path} has the schema {found!r}, not {SCHEMA!r}")
    return report | {"folder": str(path.parent)}
