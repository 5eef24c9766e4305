"""Compare reports on one page, with a paired bootstrap for each two that were scored on the same proteins."""

import hashlib
import itertools
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.benchmarking.config import CompareConfig
from esm2kit.benchmarking.fold_scores import FoldArrays, score_folds, spread_thresholds
from esm2kit.benchmarking.page import build_score_plot, format_metric_cell
from esm2kit.benchmarking.report import Comparison, Report, ReportRow, describe_row, metric_name
from esm2kit.benchmarking.scores import SeveralTargets, build_scorers
from esm2kit.core.checksums import raise_damaged, read_npz, write_sealed_json
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import atomic_path, check_output_folder, sha256_file, to_json
from esm2kit.core.numbers import format_count
from esm2kit.pages import build_figure, build_headers, render_page
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.metrics import Score, compute_paired_difference, sample_counts, score_seeds
from esm2kit.tasks.pairs import sample_pair_counts

logger = logging.getLogger(__name__)

SCHEMA = "esm2kit.comparison/1"
# Splits of cross-validation whose folds were chosen here: models with different numbers of them may be compared.
CHOSEN_FOLDS = re.compile(r"\d+_folds(_\d+_repeats)?")


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
        unpaired: One line for each task whose reports have different test sets, or for reports without any pair.
        report_files: Files of the reports, if they were written together with the comparison.
    """

    schema: str
    reports: Sequence[NamedReport]
    pairs: Sequence[ReportPair]
    html: Path
    unpaired: Sequence[str] = ()
    report_files: Sequence[Path] = ()

    @property
    def paths(self) -> list[Path]:
        """The paths of all files that were written: the page, comparison.json and `report_files`."""
        return [self.html, self.html.with_suffix(".json"), *self.report_files]


def compare(config: CompareConfig) -> ReportComparison:
    """Compare reports and log one line per pair.

    Args:
        config: The reports and the output folder.

    Returns:
        The comparison, with the path of its page.

    Raises:
        InputError: There are fewer than two reports, or one cannot be read.
    """
    check_type(config, CompareConfig, "config")
    check_output_folder(Path(config.out_dir))
    reports = [Report.read(path) for path in config.reports]
    files = [report.json.resolve() for report in reports]
    if repeated := [file for file in files if files.count(file) > 1]:
        raise InputError(
            f"{repeated[0]} is given {files.count(repeated[0])} times. Pass each report once.",
            code="compare.same-report",
            path=repeated[0],
        )
    found = write_comparison(reports, config.out_dir)
    for line in found.unpaired:
        logger.warning("%s", line)
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
    predictions = _align_predictions([_read_predictions(entry.report) for entry in named])
    scores = [
        _score_predictions(entry.report, found, resamples) for entry, found in zip(named, predictions, strict=True)
    ]
    scored = zip(named, predictions, scores, strict=True)
    pairs = []
    for (a, found_a, scores_a), (b, found_b, scores_b) in itertools.combinations(scored, 2):
        if found_a.test == found_b.test:
            metric = a.report.task.metric
            difference = compute_paired_difference(metric, scores_a[metric], scores_b[metric])
            pairs.append(ReportPair(*a.test, Comparison.from_interval(a.name, b.name, metric, difference)))
    out_dir = Path(out_dir)
    keys = [found.test for found in predictions]
    unpaired = _describe_unpaired(named, keys)
    found = ReportComparison(SCHEMA, named, pairs, out_dir / "comparison.html", unpaired)
    write_sealed_json(out_dir / "comparison.json", _to_json(found))
    with atomic_path(found.html) as part:
        part.write_text(_render_comparison(found, keys), encoding="utf-8")
    return found


def _describe_unpaired(named: Sequence[NamedReport], keys: Sequence[str]) -> list[str]:
    """Describe which reports cannot be compared with each other: one line per task and split."""
    lines = []
    for test in dict.fromkeys(entry.test for entry in named):
        chosen = {key: entry for key, entry in zip(keys, named, strict=True) if entry.test == test}
        if len(chosen) > 1:
            folders = " and ".join(str(entry.report.json.parent) for entry in chosen.values())
            lines.append(
                f"{', '.join(test)}: {folders} have different test sequences, targets or class labels, so their scores "
                "cannot be compared"
            )
    if not lines and len(set(keys)) == len(keys):
        lines.append("no two reports are on the same task and split, so no scores were compared")
    return lines


def check_report(path: Path) -> Report:
    """Read a report and check that its files exist and that its predictions have its scores.

    Args:
        path: report.json.

    Returns:
        The report.

    Raises:
        InputError: the report or its predictions are damaged or missing, or belong to another report.
    """
    report = Report.read(path)
    _score_predictions(report, _read_predictions(report), report.settings.resamples)
    if report.folds is not None:
        table = report.json.with_name(report.files["table"])
        if not table.is_file() or sha256_file(table) != report.folds.table_sha256:
            found = "has another SHA-256 than the report states" if table.is_file() else "is missing"
            raise_damaged(table, f"it {found}", "run the benchmark again")
    return report


class Predictions(NamedTuple):
    """The targets and the first row's predictions of a report.

    Args:
        fingerprint: Of the test ids and targets, in their order.
        test: Key of the test sequences and targets, in any order; equal for reports that can be compared. Classes
            count by their labels: their numbers depend on the labels of the train set.
        truth_M: (M,) targets.
        protein_M: (M,) protein of each target.
        predicted_SM: (S, M) predictions.
        sorted_M: (M,) order of the targets by sequence; None in files of version 0.1.0, which lack the sequences.
        folds: Groups and folds of the targets; None for a test set.
        pair_M2: Numbers of both proteins of each target; None for single proteins.
    """

    fingerprint: str
    test: str
    truth_M: np.ndarray
    protein_M: np.ndarray
    predicted_SM: np.ndarray
    sorted_M: np.ndarray | None
    folds: FoldArrays | None = None
    pair_M2: np.ndarray | None = None


def _read_predictions(report: Report) -> Predictions:
    """Read the predictions of a report."""
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
    if not truth_M.size or protein_M.shape != truth_M.shape[:1] or predicted_SM.shape[1:] != truth_M.shape:
        shapes = f"{truth_M.shape}, {protein_M.shape} and {predicted_SM.shape}"
        raise_damaged(path, f"truth, protein and predictions have shapes {shapes}", "run the benchmark again")
    arrays, fingerprint = (truth_M, protein_M, predicted_SM), str(fingerprint)
    if "sequence" not in stored:
        return Predictions(fingerprint, fingerprint, *arrays, None)
    stops = np.cumsum(stored["num_targets"])
    places = np.split(np.arange(len(truth_M)), stops[:-1])
    # the test set as (sequence, targets) pairs, which do not depend on ids or on the order of the records
    keys_M = truth_M
    if report.task.labels:
        digests = [hashlib.sha256(label.encode()).digest()[:8] for label in report.task.labels]
        keys_M = np.array(digests, dtype="S8").view(np.uint64)[truth_M]
    names = "\n".join((*report.task.binary_labels, *report.task.columns)).encode()  # of several targets, in their order
    records = [
        (digest.tobytes(), names + keys_M[rows].tobytes())
        for digest, rows in zip(stored["sequence"], places, strict=True)
    ]
    order = sorted(range(len(records)), key=records.__getitem__)
    test = hashlib.sha256(b"".join(part for record in order for part in records[record]))
    sorted_M, folds = np.concatenate([places[record] for record in order]), None
    if "fold" in stored:
        folds = FoldArrays(stored["group"], stored["fold"])
        # proteins are resampled in groups, so paired scores need the same groups
        test.update(_number_by_occurrence(folds.group_M[sorted_M]).tobytes())
        if not CHOSEN_FOLDS.fullmatch(report.task.split):  # a column of the task, such as ProteinGym's three schemes
            test.update(report.task.split.encode())
    return Predictions(fingerprint, test.hexdigest(), *arrays, sorted_M, folds, stored.get("pair"))


def _number_by_occurrence(group_M: np.ndarray) -> np.ndarray:
    """Number groups by their first occurrence, so that equal divisions have equal numbers."""
    first_G, group_M = np.unique(group_M, return_index=True, return_inverse=True)[1:]
    return np.argsort(np.argsort(first_G))[group_M]


def _align_predictions(predictions: Sequence[Predictions]) -> list[Predictions]:
    """Bring predictions on the same test sequences into one order, that of the first report."""
    tests = {found.fingerprint: found.test for found in predictions if found.sorted_M is not None}
    first: dict[str, Predictions] = {}
    aligned = []
    for found in predictions:
        if found.sorted_M is None:
            aligned.append(found._replace(test=tests.get(found.fingerprint, found.test)))
            continue
        model = first.setdefault(found.test, found)
        rows_M = np.empty_like(found.sorted_M)
        rows_M[model.sorted_M] = found.sorted_M
        predicted_SM = found.predicted_SM[:, rows_M]
        truth_M = found.truth_M[rows_M]
        folds = found.folds and FoldArrays(model.folds.group_M, found.folds.fold_RM[:, rows_M])
        aligned.append(
            found._replace(
                truth_M=truth_M,
                protein_M=model.protein_M,
                predicted_SM=predicted_SM,
                folds=folds,
                pair_M2=model.pair_M2,
            )
        )
    return aligned


def _score_predictions(report: Report, found: Predictions, resamples: int) -> dict[str, Score]:
    """Recompute the scores of the first row, and check that they are those of the report."""
    task, resampled_M = report.task, found.protein_M if found.folds is None else found.folds.group_M
    if found.pair_M2 is None or found.folds is not None:  # connected pairs are one group
        counts_RP = sample_counts(int(resampled_M.max()) + 1, resamples)
    else:
        counts_RP = sample_pair_counts(found.pair_M2[np.unique(resampled_M, return_index=True)[1]], resamples)
    thresholds = report.first.selected.get("threshold", ())
    if thresholds and found.folds is not None:
        thresholds = list(spread_thresholds(thresholds, len(found.predicted_SM), found.folds.fold_RM)[:, :, None])
    several = SeveralTargets(task.columns, task.spreads, thresholds)
    scorers = build_scorers(
        task.target, len(task.labels), task.num_bits, found.truth_M, found.predicted_SM, resampled_M, several
    )
    if found.folds is None:
        scores = score_seeds(scorers, counts_RP)
    else:
        scores = score_folds(scorers, found.truth_M, found.predicted_SM, found.folds, counts_RP, several)
    for name, stored in report.first.metrics.items():
        value = scores[name].interval.value if name in scores else math.nan
        if (
            stored.value is not None
            and math.isfinite(value)
            and not math.isclose(stored.value, value, rel_tol=1e-3, abs_tol=1e-6)
        ):
            path = report.json.with_name(report.files["predictions"])
            raise InputError(
                f"{path} belongs to another report: its {name} is {value:.4g}, that of {report.json.name} is "
                f"{stored.value:.4g}. Restore the file, or run the benchmark again.",
                code="report.other-predictions",
                metric=name,
                found=value,
                expected=stored.value,
                path=path,
            )
    return scores


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


def _render_comparison(found: ReportComparison, keys: Sequence[str]) -> str:
    """Render comparison.html: one section per test set, of which `keys` has one per report."""
    sections: list[dict[str, Any]] = []
    order = {task: place for place, task in enumerate(TASKS)}
    tests: dict[tuple[tuple[str, str], str], list[NamedReport]] = {}
    for entry, key in zip(found.reports, keys, strict=True):
        tests.setdefault((entry.test, key), []).append(entry)
    # of one task and split, in the order of the reports
    for (test, _), chosen in sorted(tests.items(), key=lambda item: (order.get(item[0][0][0], 99), item[0][0])):
        first = chosen[0].report
        metric = first.task.metric
        # an earlier version has fewer metrics than a later one
        names = list(dict.fromkeys(name for entry in chosen for name in entry.report.first.metrics))
        lines = {entry.name: entry.report.first for entry in chosen}
        # a baseline does not depend on the model, so it differs only between reports with different settings
        for entry in chosen:
            for row in entry.report.rows[1:]:
                name = describe_row(row)
                if row.kind != "baseline" or (name in lines and _get_values(lines[name]) != _get_values(row)):
                    name = f"{name} ({entry.name})"
                lines.setdefault(name, row)
        marked = [entry.name for entry in chosen]
        rows = [
            {
                "marked": shown in marked,
                "cells": [{"text": shown}, *(format_metric_cell(name, row.metrics.get(name)) for name in names)],
            }
            for shown, row in lines.items()
        ]
        draw, scores = build_score_plot(list(lines), list(lines.values()), metric, marked, {})
        title = ", ".join(test)
        if len([each for each, _ in tests if each == test]) > 1:
            title += f" (test set of {chosen[0].name})"
        figure = build_figure(
            draw, f"Test {metric_name(metric)} on {title}: {scores}",
            f"Test {metric_name(metric)} of the compared models (blue), untrained models and baselines. "
            "Bars: 95% confidence intervals.",
        )  # fmt: skip
        pairs = [
            pair.comparison.sentence
            for pair in found.pairs
            if (pair.task, pair.split) == test and pair.comparison.ours in marked
        ]
        table = {"headers": build_headers(["model", *map(metric_name, names)]), "rows": rows}
        sections.append({"title": title, "table": table, "figures": [figure], "points": pairs})
    lead = f"{format_count(len(found.reports), 'report')} on {format_count(len(tests), 'test set')}, with "
    lead += f"{format_count(len(found.pairs), 'paired comparison')}."
    method = "Paired bootstrap: both models are scored on the same resampled test proteins. Brackets: 95% confidence "
    return render_page("Benchmark comparison", lead, [f"{method}intervals."], sections)


def _get_values(row: ReportRow) -> dict[str, float | None]:
    """Return the metrics of a row without their intervals."""
    return {metric: found.value for metric, found in row.metrics.items()}
