"""Any number of reports side by side, with a paired bootstrap wherever two were scored on the same proteins."""

import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit import plots
from esm2kit.benchmarking.config import CompareConfig
from esm2kit.benchmarking.report import (
    METRIC_NAMES,
    compared,
    figure,
    heads,
    metric_cell,
    number,
    read_report,
    render,
    told_name,
)
from esm2kit.benchmarking.scores import scorers_of
from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, write_json
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.metrics import Score, draw_counts, paired_difference, score_seeds

logger = logging.getLogger(__name__)


def load_scores(
    report: dict[str, Any], row: str | None = None, resamples: int | None = None
) -> tuple[str, dict[str, Score]]:
    """A fingerprint of the test set and the scores of one row, drawn anew from its predictions.

    Args:
        report: from `read_report`.
        row: its name; the first by default.
        resamples: bootstrap draws; by default the report's own.
    Raises: InputError if the predictions are not beside the report.
    """
    path = Path(report["folder"]) / report["files"]["predictions"]
    if not path.is_file():
        raise InputError(f"{path} is missing: a comparison needs the predictions beside report.json")
    name = row or report["rows"][0]["name"]
    with np.load(path) as stored:
        truth_M, protein_M = stored["truth"], stored["protein"]
        predicted_SM = stored[f"predicted/{name}"]
        fingerprint = str(stored["fingerprint"])
    counts_RP = draw_counts(int(protein_M.max()) + 1, resamples or report["settings"]["resamples"])
    task = report["task"]
    scorers = scorers_of(task["target"], len(task["labels"]), task["num_bits"], truth_M, predicted_SM, protein_M)
    return fingerprint, score_seeds(scorers, counts_RP)


def compare(reports: Sequence[Path], out_dir: Path) -> dict[str, Any]:
    """Write comparison.json and comparison.html.

    Args:
        reports: report.json files or their folders, of any tasks and models; two at least.
        out_dir: folder for both.
    Returns: {"schema", "reports", "pairs", "html"}: pairs holds a paired difference for every
        two reports on one test set.
    Raises: InputError for fewer than two reports, or one that cannot be read.
    """
    if len(reports) < 2:
        raise InputError(f"a comparison takes two reports or more, {len(reports)} given")
    loaded = [read_report(Path(path)) for path in reports]
    names = _distinct_names(loaded)
    resamples = min(report["settings"]["resamples"] for report in loaded)
    scores = [load_scores(report, resamples=resamples) for report in loaded]
    pairs = []
    for (a, ours), (b, theirs) in itertools.combinations(enumerate(scores), 2):
        if ours[0] == theirs[0]:
            task = loaded[a]["task"]
            difference = paired_difference(task["metric"], ours[1][task["metric"]], theirs[1][task["metric"]])
            pair = compared(names[a], names[b], task["metric"], difference)
            pairs.append({"task": task["name"], "split": task["split"]} | pair)
    listed = [
        {
            "name": name,
            "path": report["folder"],
            "task": report["task"]["name"],
            "split": report["task"]["split"],
            "metric": report["task"]["metric"],
            "rows": [{key: row[key] for key in ("name", "kind", "metrics")} for row in report["rows"]],
        }
        for name, report in zip(names, loaded, strict=True)
    ]
    comparison = {"schema": "esm2kit.comparison/1", "reports": listed, "pairs": pairs}
    out_dir = Path(out_dir)
    write_json(out_dir / "comparison.json", comparison)
    with atomic_path(out_dir / "comparison.html") as part:
        part.write_text(_page(comparison, loaded), encoding="utf-8")
    return comparison | {"html": str(out_dir / "comparison.html")}


def compare_reports(config: CompareConfig) -> dict[str, Any]:
    """`compare`, with a line for every pair."""
    found = compare(config.reports, config.out_dir)
    for pair in found["pairs"]:
        logger.info("%s, %s: %s", pair["task"], pair["split"], pair["sentence"])
    return found


def _distinct_names(loaded: Sequence[dict[str, Any]]) -> list[str]:
    """Model and probe; numbered in the order given where that does not tell two reports of one test apart."""
    keys = [(report["rows"][0]["name"], report["task"]["name"], report["task"]["split"]) for report in loaded]
    return [
        f"{key[0]} #{keys[: place + 1].count(key)}" if keys.count(key) > 1 else key[0] for place, key in enumerate(keys)
    ]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _page(comparison: dict[str, Any], loaded: Sequence[dict[str, Any]]) -> str:
    sections: list[dict[str, Any]] = []
    order = {task: place for place, task in enumerate(TASKS)}
    tests = sorted({(r["task"], r["split"]) for r in comparison["reports"]}, key=lambda t: (order.get(t[0], 99), t))
    for task, split in tests:
        chosen = [r for r in comparison["reports"] if (r["task"], r["split"]) == (task, split)]
        metric = chosen[0]["metric"]
        lines = [(report["name"], report["rows"][0], True) for report in chosen]
        seen: dict[str, Any] = {}
        for report in chosen:  # a baseline without a model is the same in every report, unless a limit was another
            for row in report["rows"][1:]:
                values = {metric: found["value"] for metric, found in row["metrics"].items()}
                name = told_name(row["name"])
                if row["kind"] != "baseline" or seen.get(name, values) != values:
                    name = f"{name} ({report['name']})"
                if name not in seen:
                    seen[name] = values
                    lines.append((name, row, False))
        shown = list(chosen[0]["rows"][0]["metrics"])
        rows = [
            {"ours": ours, "cells": [{"text": name}, *(metric_cell(row["metrics"].get(m)) for m in shown)]}
            for name, row, ours in lines
        ]
        head = heads(["model", *(METRIC_NAMES.get(m, m) for m in shown)])
        ends = {
            end: [_or_nan((row["metrics"].get(metric) or {}).get(end)) for _, row, _ in lines]
            for end in ("value", "low", "high")
        }
        labels = [name for name, _, _ in lines]
        told = "; ".join(
            f"{name} {number(value if math.isfinite(value) else None)}"
            for name, value in zip(labels, ends["value"], strict=True)
        )
        drawn = figure(
            lambda labels=labels, ends=ends, metric=metric, chosen=chosen: plots.scores_beside_baselines(
                labels, ends["value"], ends["low"], ends["high"], METRIC_NAMES.get(metric, metric),
                ours=[report["name"] for report in chosen],
            ),
            f"scores-{len(sections)}", f"{METRIC_NAMES.get(metric, metric)} on {task}, {split}: {told}",
            "Each report's probe, then what it must beat.",
        )  # fmt: skip
        pairs = [p["sentence"] for p in comparison["pairs"] if (p["task"], p["split"]) == (task, split)]
        sections.append(
            {"title": f"{task}, {split}", "table": {"heads": head, "rows": rows}, "figures": [drawn], "points": pairs}
        )
    lead = f"{len(loaded)} reports, {len(tests)} test sets, {len(comparison['pairs'])} paired comparisons."
    return render(
        "Benchmark comparison", lead, ["Paired bootstrap over test proteins: both models on the same draws."], sections
    )
