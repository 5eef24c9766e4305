"""A benchmark's results: report.json as dataclasses, for programs; `page` writes report.html, for people.

Schema of report.json, version 1: the fields of `Report` but for its paths, in their order. Undefined numbers are null.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from esm2kit.core.errors import InputError
from esm2kit.core.files import to_json, write_json
from esm2kit.tasks.metrics import LOWER_IS_BETTER, Interval, Score, compute_paired_difference, nan_to_none
from esm2kit.tasks.published import PublishedScore

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


def metric_name(metric: str) -> str:
    """A metric as text."""
    return METRIC_NAMES.get(metric, metric)


def display_name(row: str) -> str:
    """The name of a report's row as text."""
    return BASELINE_NAMES.get(row, row)


@dataclass(frozen=True)
class TaskSummary:
    """What was predicted.

    Args:
        name: of the task.
        level: "residue" or "protein".
        target: "class" or "value".
        split: of the task.
        metric: the headline metric.
        unit: of a value.
        labels: of a class.
        num_bits: binary labels a class stands for; 0 if none.
        traffic_light: FLIP's for the split; None for other tasks.
        licence: of the split files.
        citation: of the data.
        official: the sizes are FLIP's.
        sizes: proteins of train, validation and test.
        scored_test: targets that were scored.
    """

    name: str
    level: str
    target: str
    split: str
    metric: str
    unit: str
    labels: Sequence[str]
    num_bits: int
    traffic_light: str | None
    licence: str
    citation: str
    official: bool
    sizes: Mapping[str, int]
    scored_test: int


@dataclass(frozen=True)
class ModelSummary:
    """The model whose embeddings were probed; `embeddings` holds the path of their file and its attributes."""

    name: str
    embeddings: Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings that decide the scores.

    Args:
        preset: the protocol.
        source: of the protocol.
        probe: fields of its ProbeConfig.
        seeds: of networks.
        limit: proteins of each set at most; None for all.
        resamples: bootstrap replicates.
    """

    preset: str
    source: str
    probe: Mapping[str, Any]
    seeds: Sequence[int]
    limit: int | None
    resamples: int


@dataclass(frozen=True)
class Metric:
    """One metric of one row; None where it is undefined.

    Args:
        value: mean over seeds.
        low: lower end of the 95% protein-level bootstrap interval; both ends are None where every replicate is equal,
            except for accuracy, which then has `esm2kit.tasks.metrics.compute_rule_of_three_interval`.
        high: upper end.
        seeds: the metric of every seed.
        seed_spread: standard deviation over seeds.
    """

    value: float | None
    low: float | None
    high: float | None
    seeds: Sequence[float | None]
    seed_spread: float

    @classmethod
    def from_score(cls, score: Score) -> Self:
        """A score as a report holds it."""
        value, low, high = map(nan_to_none, score.interval)
        return cls(value, low, high, [nan_to_none(seed) for seed in score.seeds], nan_to_none(score.seed_spread) or 0.0)


@dataclass(frozen=True)
class ReportRow:
    """One model on the test set.

    Args:
        name: of the model.
        kind: "finetuned", "probe", "untrained" or "baseline".
        note: how it was made.
        config: its settings.
        seconds: wall time of fitting and predicting.
        seeds: the seeds; empty where none matters.
        selected: what validation chose: a penalty, or each seed's epoch.
        metrics: by name.
        per_class: label -> {precision, recall, f1, support} of the first seed; class tasks only.
        confusion: K x K counts of the first seed; class tasks only.
        history: train_loss and validation_loss, epochs x seeds.
    """

    name: str
    kind: str
    note: str
    config: Mapping[str, Any]
    seconds: float
    seeds: Sequence[int]
    selected: Mapping[str, Any]
    metrics: Mapping[str, Metric]
    per_class: Mapping[str, Mapping[str, float]]
    confusion: Sequence[Sequence[int]]
    history: Mapping[str, Sequence[Sequence[float | None]]]


@dataclass(frozen=True)
class Comparison:
    """A paired bootstrap of two rows.

    Args:
        ours: name of one row.
        theirs: name of the other.
        metric: that is compared.
        difference: positive where `ours` is better; None where undefined.
        low: lower end of its 95% interval.
        high: upper end.
        sentence: the result in words.
    """

    ours: str
    theirs: str
    metric: str
    difference: float | None
    low: float | None
    high: float | None
    sentence: str

    @classmethod
    def from_interval(cls, ours: str, theirs: str, metric: str, difference: Interval) -> Self:
        """A difference between two rows, with its sentence."""
        text = format_comparison(display_name(ours), display_name(theirs), metric, difference)
        return cls(ours, theirs, metric, *map(nan_to_none, difference), text)


@dataclass(frozen=True)
class Report:
    """One task's results.

    Args:
        schema: SCHEMA.
        task: what was predicted.
        model: whose embeddings were probed.
        settings: that decide the scores.
        rows: one a model, the fine-tuned one or the probe first.
        comparisons: of the first row with every other one.
        published: others' scores on this task and split.
        notes: what a reader of the scores must know.
        files: name -> file beside report.json.
        provenance: stage, config, inputs with sha256, versions, git_commit, created.
        html: the page, once written.
        json: the file it was written to or read from.
    """

    schema: str
    task: TaskSummary
    model: ModelSummary
    settings: Settings
    rows: Sequence[ReportRow]
    comparisons: Sequence[Comparison]
    published: Sequence[PublishedScore]
    notes: Sequence[str]
    files: Mapping[str, str]
    provenance: Mapping[str, Any]
    html: Path | None = None
    json: Path | None = None

    @property
    def first(self) -> ReportRow:
        """The row that the report is about."""
        return self.rows[0]

    @property
    def best_baseline(self) -> ReportRow | None:
        """The baseline that is best in the headline metric; None where no baseline has a value in it."""
        rows = [row for row in self.rows if row.kind == "baseline" and self.headline(row).value is not None]
        sign = -1 if self.task.metric in LOWER_IS_BETTER else 1
        return max(rows, key=lambda row: sign * self.headline(row).value, default=None)

    def headline(self, row: ReportRow) -> Metric:
        """A row's headline metric."""
        return row.metrics[self.task.metric]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a report.json, or the one in a folder.

        Raises:
            InputError: there is none, or it is not one of this schema.
        """
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(
                f"{path} does not exist: make it with `esm2kit benchmark`", code="report.absent", path=path
            ) from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: {error}", code="report.not-json", path=path) from None
        schema = found.get("schema") if isinstance(found, dict) else type(found).__name__
        if schema != SCHEMA:
            raise InputError(
                f"{path} has the schema {schema!r}, not {SCHEMA!r}",
                code="report.schema",
                path=path,
                found=schema,
                expected=SCHEMA,
            )
        try:
            return cls(**found | _typed(found), html=path.with_suffix(".html"), json=path)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a whole report: {error}", code="report.incomplete", path=path) from None

    def write(self, folder: Path) -> Self:
        """Write report.json, whole or not at all.

        Returns:
            The report, with the paths of its files.
        """
        written = replace(self, html=Path(folder) / "report.html", json=Path(folder) / "report.json")
        write_json(written.json, {name: part for name, part in to_json(self).items() if name not in ("html", "json")})
        return written


def _typed(found: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a report.json that have a class of their own."""
    metrics = [{name: Metric(**entry) for name, entry in row["metrics"].items()} for row in found["rows"]]
    return {
        "task": TaskSummary(**found["task"]),
        "model": ModelSummary(**found["model"]),
        "settings": Settings(**found["settings"]),
        "rows": [ReportRow(**row | {"metrics": entry}) for row, entry in zip(found["rows"], metrics, strict=True)],
        "comparisons": [Comparison(**pair) for pair in found["comparisons"]],
        "published": [PublishedScore(**entry) for entry in found["published"]],
    }


def format_comparison(ours: str, theirs: str, metric: str, difference: Interval) -> str:
    """ "B beats A by 1.2 [0.4, 2.0]", or that no difference was shown."""
    name = metric_name(metric)
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


def compare_rows(
    name: str, ours: Mapping[str, Score], others: Mapping[str, Mapping[str, Score]], headline: str
) -> list[Comparison]:
    """Compare a row with every other one, under the same bootstrap draws.

    Args:
        name: the row's.
        ours: its scores, by metric.
        others: the scores of the others, by their names.
        headline: the metric to compare; values are compared with a constant, which has no rank correlation, by RMSE.
    """
    pairs = []
    for other, theirs in others.items():
        metric = headline if math.isfinite(theirs[headline].interval.value) else "rmse"
        pairs.append(
            Comparison.from_interval(
                name, other, metric, compute_paired_difference(metric, ours[metric], theirs[metric])
            )
        )
    return pairs
