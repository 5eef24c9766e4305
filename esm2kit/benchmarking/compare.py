"""Compare reports on one page, with a paired bootstrap for each two that were scored on the same proteins."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm2kit.benchmarking.config import CompareConfig
from esm2kit.benchmarking.page import build_figure, build_headers, build_score_plot, format_metric_cell, render_page
from esm2kit.benchmarking.report import Comparison, Report, ReportRow, display_name, metric_name
from esm2kit.benchmarking.scores import build_scorers
from esm2kit.core.checksums import raise_damaged, read_npz
from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, check_output_folder, to_json, write_json
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.metrics import Score, compute_paired_difference, sample_counts, score_seeds

logger = logging.getLogger(__name__)

SCHEMA = "esm2kit.comparison/1"


@dataclass(frozen=True)
class NamedReport:
    """A report with a name that is unique among the reports on its test set."""

    name: str
    report: Report

    @property
    def test(self) -> tuple[str, str]:
        """Names of task and split."""
        return self.report.task.name, self.report.task.split


@dataclass(frozen=True)
class ReportPair:
    """Two reports on one test set, and the comparison of their first rows."""

    task: str
    split: str
    comparison: Comparison


@dataclass(frozen=True)
class ReportComparison:
    """The result of `compare`.

    Args:
        schema: Schema of comparison.json.
        reports: Reports in the order of the input.
        pairs: All pairs of reports on the same test set.
        html: Path of comparison.html.
    """

    schema: str
    reports: Sequence[NamedReport]
    pairs: Sequence[ReportPair]
    html: Path


def compare(config: CompareConfig) -> ReportComparison:
    """Compare reports and log one line per pair.

    Args:
        config: The reports and the output folder.

    Returns:
        The comparison, with the path of its page.

    Raises:
        InputError: There are fewer than two reports, or one cannot be read.
    """
    check_output_folder(Path(config.out_dir))
    found = write_comparison([Report.read(path) for path in config.reports], config.out_dir)
    for pair in found.pairs:
        logger.info("%s, %s: %s", pair.task, pair.split, pair.comparison.sentence)
    return found


def write_comparison(reports: Sequence[Report], out_dir: Path) -> ReportComparison:
    """Write comparison.json and comparison.html.

    Args:
        reports: Two or more reports of any tasks and models.
        out_dir: Folder for both files.

    Returns:
        The comparison, with the path of its page.

    Raises:
        InputError: There are fewer than two reports, or the predictions of one are missing.
    """
    if len(reports) < 2:
        raise InputError(
            f"a comparison requires at least two reports, found {len(reports)}",
            code="compare.too-few",
            found=len(reports),
        )
    named = _name_reports(reports)
    resamples = min(entry.report.settings.resamples for entry in named)
    scores = [_score_predictions(entry.report, resamples) for entry in named]
    pairs = []
    for (a, (test_a, scores_a)), (b, (test_b, scores_b)) in itertools.combinations(zip(named, scores, strict=True), 2):
        if test_a == test_b:
            metric = a.report.task.metric
            difference = compute_paired_difference(metric, scores_a[metric], scores_b[metric])
            pairs.append(ReportPair(*a.test, Comparison.from_interval(a.name, b.name, metric, difference)))
    out_dir = Path(out_dir)
    found = ReportComparison(SCHEMA, named, pairs, out_dir / "comparison.html")
    write_json(out_dir / "comparison.json", _to_json(found))
    with atomic_path(found.html) as part:
        part.write_text(_render_comparison(found), encoding="utf-8")
    return found


def _score_predictions(report: Report, resamples: int) -> tuple[str, dict[str, Score]]:
    """Recompute the scores of the first row from its predictions; return the fingerprint of the test set with them."""
    path = report.json.with_name(report.files["predictions"])
    if not path.is_file():
        raise InputError(
            f"{path} was not found. A comparison reads the predictions in the folder of report.json.",
            code="report.no-predictions",
            path=path,
        )
    stored = read_npz(path, "run the benchmark again")
    names = ("truth", "protein", "fingerprint", f"predicted/{report.first.name}")
    if absent := [name for name in names if name not in stored]:
        raise_damaged(path, f"it has no array {absent[0]!r}", "run the benchmark again")
    truth_M, protein_M, fingerprint, predicted_SM = (stored[name] for name in names)
    task, counts_RP = report.task, sample_counts(int(protein_M.max()) + 1, resamples)
    scorers = build_scorers(task.target, len(task.labels), task.num_bits, truth_M, predicted_SM, protein_M)
    return str(fingerprint), score_seeds(scorers, counts_RP)


def _name_reports(reports: Sequence[Report]) -> list[NamedReport]:
    """Name reports by model and probe, and number those on one test set that would have the same name."""
    keys = [(report.first.name, report.task.name, report.task.split) for report in reports]
    return [
        NamedReport(f"{key[0]} #{keys[: place + 1].count(key)}" if keys.count(key) > 1 else key[0], report)
        for place, (key, report) in enumerate(zip(keys, reports, strict=True))
    ]


def _to_json(found: ReportComparison) -> dict[str, Any]:
    """Build the content of comparison.json."""
    reports = [
        {"name": entry.name, "path": str(entry.report.json.parent), "task": task.name, "split": task.split,
         "metric": task.metric,
         "rows": [{"name": row.name, "kind": row.kind, "metrics": row.metrics} for row in entry.report.rows]}
        for entry in found.reports for task in [entry.report.task]
    ]  # fmt: skip
    pairs = [{"task": pair.task, "split": pair.split} | to_json(pair.comparison) for pair in found.pairs]
    return {"schema": found.schema, "reports": reports, "pairs": pairs}


def _render_comparison(found: ReportComparison) -> str:
    """Render comparison.html: one section per test set."""
    sections: list[dict[str, Any]] = []
    order = {task: place for place, task in enumerate(TASKS)}
    tests = sorted({entry.test for entry in found.reports}, key=lambda test: (order.get(test[0], 99), test))
    for test in tests:
        chosen = [entry for entry in found.reports if entry.test == test]
        first = chosen[0].report
        metric, names = first.task.metric, list(first.first.metrics)
        lines = {entry.name: entry.report.first for entry in chosen}
        # a baseline does not depend on the model, so it differs only between reports with different settings
        for entry in chosen:
            for row in entry.report.rows[1:]:
                name = display_name(row.name)
                if row.kind != "baseline" or (name in lines and _get_values(lines[name]) != _get_values(row)):
                    name = f"{name} ({entry.name})"
                lines.setdefault(name, row)
        marked = [entry.name for entry in chosen]
        rows = [
            {"marked": name in marked, "cells": [{"text": name}, *map(format_metric_cell, map(row.metrics.get, names))]}
            for name, row in lines.items()
        ]
        draw, scores = build_score_plot(list(lines), list(lines.values()), metric, marked, {})
        title = ", ".join(test)
        figure = build_figure(
            draw, f"scores-{len(sections)}", f"Test {metric_name(metric)} on {title}: {scores}",
            f"Test {metric_name(metric)} of the compared models (blue), untrained models and baselines. "
            "Bars: 95% confidence intervals.",
        )  # fmt: skip
        pairs = [pair.comparison.sentence for pair in found.pairs if (pair.task, pair.split) == test]
        table = {"headers": build_headers(["model", *map(metric_name, names)]), "rows": rows}
        sections.append({"title": title, "table": table, "figures": [figure], "points": pairs})
    lead = f"Reports: {len(found.reports)}. Test sets: {len(tests)}. Paired comparisons: {len(found.pairs)}."
    method = "Paired bootstrap: both models are scored on the same resampled test proteins. Brackets: 95% confidence "
    return render_page("Benchmark comparison", lead, [f"{method}intervals."], sections)


def _get_values(row: ReportRow) -> dict[str, float | None]:
    """Return the metrics of a row without their intervals."""
    return {metric: found.value for metric, found in row.metrics.items()}
