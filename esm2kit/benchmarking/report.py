"""The results of a benchmark as dataclasses, and report.json. The module `page` writes report.html.

Schema of report.json: the fields of `Report` in their order, without `html` and `json`, and a digest. Undefined numbers
are null. A version adds fields with defaults, so that the reports of earlier versions are read as well; a report of a
later version is refused, because a reader cannot know what its fields change.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from esm2kit.benchmarking.fold_summary import FoldSummary
from esm2kit.benchmarking.sweep_summary import LayerSweep
from esm2kit.core.checksums import read_sealed_json, write_sealed_json
from esm2kit.core.errors import InputError
from esm2kit.core.files import to_json
from esm2kit.core.paths import expand_path
from esm2kit.tasks.metrics import HAVE_A_UNIT, LOWER_IS_BETTER, Interval, Score, compute_paired_difference, nan_to_none
from esm2kit.tasks.published import PublishedScore

SCHEMA_NAME, SCHEMA_VERSION = "esm2kit.report", 3
SCHEMA = f"{SCHEMA_NAME}/{SCHEMA_VERSION}"
# Reports of version 0.1.0 have no digest. Both earlier kinds lack the fields that have defaults below.
UNSEALED_SCHEMA = f"{SCHEMA_NAME}/1"
READ_SCHEMAS = tuple(f"{SCHEMA_NAME}/{version}" for version in range(1, SCHEMA_VERSION + 1))
MAX_CONFUSION_CLASSES = 50  # with more, the report has the MAX_CONFUSED_PAIRS most frequent confusions
MAX_CONFUSED_PAIRS = 100
METRIC_NAMES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1", "mcc": "MCC",
    "micro_f1": "micro-F1", "samples_f1": "F1 per protein", "map": "mean average precision", "auroc": "mean AUROC",
    "subset_accuracy": "all labels correct", "binary_auroc": "AUROC", "binary_ap": "average precision",
    "spearman": "Spearman", "pearson": "Pearson", "rmse": "RMSE", "r2": "R²", "ndcg": "NDCG",
}  # fmt: skip
# Names of the baselines for display. Rows and the option `baselines` use the keys.
BASELINE_NAMES = {
    "majority": "majority class", "mean": "training-set mean", "onehot_ridge": "one-hot, linear",
    "onehot_cnn": "one-hot CNN", "degree": "interactions per protein",
    "levenshtein_nearest": "nearest by edit distance", "blosum62_nearest": "nearest by BLOSUM62",
}  # fmt: skip


# Names of the probes for display.
PROBE_NAMES = {"cnn": "CNN", "fnn": "FNN", "light_attention": "light attention", "attention": "attention-pooling"}


def metric_name(metric: str, unit: str = "") -> str:
    """Return the display name of a metric, followed by the unit of the target if the metric has it."""
    name = METRIC_NAMES.get(metric, metric)
    return f"{name} ({unit})" if unit and metric in HAVE_A_UNIT else name


def format_value(metric: str, value: float | None, reference: float | None = None) -> str:
    """Format the value of a metric for every text, table and figure.

    Metrics without a unit have three decimals, as have those in the unit of the target from 0.1 to 100; larger and
    smaller ones have four significant digits.

    Args:
        metric: Name of the metric.
        value: The number; None or nan is undefined.
        reference: The point estimate, for an end of its interval or its spread, which have the same last digit.

    Returns:
        The text; a dash for an undefined number.
    """
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{_choose_format(value if reference is None else reference, metric, 3)}}"


def format_difference(metric: str, difference: Interval, absolute: bool = False) -> str:
    """Format a difference with its interval in brackets, all numbers with the same last digit.

    Args:
        metric: Name of the metric.
        difference: The difference, with its interval if that is defined.
        absolute: Whether to omit signs and to turn the interval of a negative difference around.

    Returns:
        The text; at least two significant digits of the largest number.
    """
    numbers = [number for number in difference if math.isfinite(number)]
    largest = max(map(abs, numbers), default=0.0)
    chosen = _choose_format(largest, metric, max(3, 1 - _find_exponent(largest)) if largest > 1e-9 else 3)
    if absolute and difference.value < 0:
        difference = Interval(-difference.value, -difference.high, -difference.low)
    value, low, high = (f"{number:{'' if absolute else '+'}{chosen}}" for number in difference)
    return f"{value} [{low}, {high}]" if len(numbers) == 3 else value


def _find_exponent(value: float) -> int:
    """Return the power of ten of the first digit; 0 for 0."""
    return math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0


def _choose_format(reference: float, metric: str, decimals: int) -> str:
    """Return the format of numbers of a metric that are as large as the reference."""
    exponent = _find_exponent(reference)
    if metric in HAVE_A_UNIT and exponent not in (-1, 0, 1):
        decimals = max(0, 3 - exponent)
    small = metric in HAVE_A_UNIT and exponent < -4
    return ".3e" if small or exponent >= 6 else f".{decimals}f"


def display_name(row: str) -> str:
    """Return the display name of a report's row."""
    return BASELINE_NAMES.get(row, row)


@dataclass(frozen=True)
class TaskSummary:
    """The task of a report.

    Args:
        name: Name of the task.
        level: "residue" or "protein".
        target: "class" or "value".
        split: Name of the split.
        metric: Headline metric.
        unit: Unit of the values; empty for classes.
        labels: Class labels; empty for values.
        num_bits: Number of binary labels that a class encodes; 0 if it encodes none.
        traffic_light: FLIP's rating of the split; None for other tasks.
        licence: Licence of the split files.
        citation: Citation of the data.
        official: Whether the set sizes are those of FLIP.
        sizes: Number of proteins in train, validation and test.
        scored_test: Number of scored test targets.
        binary_labels: Labels of a multi-label task.
        columns: Names of several values per protein.
        spreads: Standard deviation of the training values of each column.
        pair_features: How the vectors of two proteins become one, for a task of pairs; empty for single proteins.
        shared_test: Number of proteins of a test pair that train has ("0", "1", "2") -> number of test pairs.
        grouping: Which proteins count as one that train has.
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
    binary_labels: Sequence[str] = ()
    columns: Sequence[str] = ()
    spreads: Sequence[float] = ()
    pair_features: str = ""
    shared_test: Mapping[str, int] = field(default_factory=dict)
    grouping: str = ""

    @property
    def is_multilabel(self) -> bool:
        """Whether a protein has any number of labels."""
        return bool(self.binary_labels)


@dataclass(frozen=True)
class ModelSummary:
    """The model whose embeddings were probed.

    Args:
        name: Name of the model.
        embeddings: Path and attributes of the HDF5 file.
    """

    name: str
    embeddings: Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings that affect the scores.

    Args:
        preset: Probing protocol.
        source: Source of the protocol.
        probe: Fields of the ProbeConfig.
        seeds: Seeds of the neural probes.
        limit: Maximum number of proteins per set; None for all.
        resamples: Number of bootstrap replicates.
        folds: Number of folds, or their column; None without cross-validation.
        repeats: How often the proteins were divided into folds.
        group_by: What is never divided between folds, if it was chosen.
    """

    preset: str
    source: str
    probe: Mapping[str, Any]
    seeds: Sequence[int]
    limit: int | None
    resamples: int
    folds: int | str | None = None
    repeats: int = 1
    group_by: str | None = None


@dataclass(frozen=True)
class Metric:
    """One metric of one row. Undefined numbers are None.

    Args:
        value: Mean over seeds.
        low: Lower end of the 95% bootstrap interval over proteins. Both ends are None if all replicates are equal,
            except for accuracy, whose interval then comes from the rule of three (see `esm2kit.tasks.metrics`).
        high: Upper end of the interval.
        seeds: Metric of each seed.
        seed_spread: Standard deviation over seeds.
    """

    value: float | None
    low: float | None
    high: float | None
    seeds: Sequence[float | None]
    seed_spread: float

    @classmethod
    def from_score(cls, score: Score) -> Self:
        """Convert a score to the form of a report."""
        value, low, high = map(nan_to_none, score.interval)
        return cls(value, low, high, [nan_to_none(seed) for seed in score.seeds], nan_to_none(score.seed_spread) or 0.0)


@dataclass(frozen=True)
class ReportRow:
    """The scores of one model on the test set.

    Args:
        name: Name of the model.
        kind: "finetuned", "probe", "untrained" or "baseline".
        note: How the row was computed.
        config: Settings of the model.
        seconds: Wall time of fitting and prediction.
        seeds: Seeds; empty if the model does not depend on a seed.
        selected: Settings selected on validation: the penalty, or the epoch of each seed.
        metrics: Metrics by name.
        per_class: Label -> {precision, recall, f1, support} for the first seed; class tasks only. A multi-label task
            also has mcc, map and auroc of each label.
        confusion: (K, K) counts for the first seed, rows are true classes; empty for more than
            MAX_CONFUSION_CLASSES classes.
        history: train_loss and validation_loss, (epochs, seeds).
        confused: The most frequent wrong predictions for the first seed: {true, predicted, count}, labels and number
            of test targets; only where there is no confusion matrix.
        validation: Headline metric on validation, the mean over seeds; None if it is undefined.
        probe_file: File of the fitted probe in the folder of report.json, for `esm2kit predict`; empty if the row
            cannot predict other proteins.
        uncertainty: Of the mean over seeds, or of the first seed of a fine-tuned model; empty if there is none. For
            classes: temperature, used (by `predict`), gain (in NLL on validation, with its 90% interval),
            num_validation, before and after (scores and reliability diagram on test, see `CalibrationScores`),
            sentence. For values: coverage, found, mean_width, quantile (None if infinite), by_spread, offset (see
            `ConformalScores`), holds (whether nothing speaks against the promise on test), num_validation, num_test,
            num_seeds, curve (nominal coverage, coverage found, mean width), sentence. For several values per protein:
            columns (name -> as for values) and sentence. With folds, out_of_fold is true, each fold is tested with the
            temperature or the errors of the other folds, and inside has the coverage in each fold.
        by_shared: Number of proteins of a test pair that train has ("0", "1", "2") -> metrics by name, for pairs.
        per_target: Column -> metrics by name, for several values per protein; `metrics` has their means.
        folds: Headline metric of each fold of a cross-validation, the mean over seeds, repeat by repeat.
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
    confused: Sequence[Mapping[str, Any]] = ()
    validation: float | None = None
    probe_file: str = ""
    uncertainty: Mapping[str, Any] = field(default_factory=dict)
    per_target: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)
    folds: Sequence[float | None] = ()
    by_shared: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)


def describe_row(row: ReportRow) -> str:
    """Describe a row of a report by what was trained on which features, without the name of the model.

    Args:
        row: A row of a benchmark or fine-tuning report.

    Returns:
        A short noun phrase, such as "CNN probe on the frozen encoder".
    """
    if row.kind == "finetuned":
        return f"fine-tuned encoder {row.name[row.name.rfind('(') :]}"
    probe = row.name.rpartition(", ")[2]
    probe = f"{PROBE_NAMES.get(probe, probe)} probe"
    on = {"probe": f"{probe} on the frozen encoder", "untrained": f"{probe} on an untrained encoder"}
    return on.get(row.kind) or display_name(row.name)


@dataclass(frozen=True)
class Comparison:
    """A paired bootstrap comparison of two rows.

    Args:
        ours: Name of the first row.
        theirs: Name of the second row.
        metric: Compared metric.
        difference: Positive if the first row is better; None if undefined.
        low: Lower end of the 95% interval of the difference.
        high: Upper end of the interval.
        sentence: The result as a sentence.
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
        """Build the comparison of two rows, with its sentence."""
        text = format_comparison(display_name(ours), display_name(theirs), metric, difference)
        return cls(ours, theirs, metric, *map(nan_to_none, difference), text)


@dataclass(frozen=True)
class Report:
    """The results of a benchmark on one task.

    Args:
        schema: SCHEMA.
        task: The task.
        model: The model whose embeddings were probed.
        settings: Settings that affect the scores.
        rows: One row per model. The fine-tuned model comes first, or else the probe.
        comparisons: Comparisons of the first row with each other row.
        published: Published scores on this task and split.
        notes: What a reader of the scores must know.
        files: Name -> file in the folder of report.json.
        provenance: stage, config, inputs with sha256, versions, git_commit, created.
        verdict: The result in one sentence.
        warnings: Why the predictions of the first row should not be relied on, one sentence each.
        layer_sweep: How the layer and the pooling were chosen on validation; None if they were given.
        folds: The cross-validation; None for a test set.
        html: Path of report.html, once it is written.
        json: Path of report.json, once it is written or read.
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
    verdict: str = ""
    warnings: Sequence[str] = ()
    layer_sweep: LayerSweep | None = None
    folds: FoldSummary | None = None
    html: Path | None = None
    json: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """The paths of all files of a report that was written."""
        probes = [row.probe_file for row in self.rows if row.probe_file]
        return [self.html, self.json, *(self.json.parent / name for name in (*self.files.values(), *probes))]

    @property
    def first(self) -> ReportRow:
        """The row of the model under test."""
        return self.rows[0]

    @property
    def best_baseline(self) -> ReportRow | None:
        """The baseline with the best headline metric; None if no baseline has a defined value."""
        rows = [row for row in self.rows if row.kind == "baseline" and self.headline(row).value is not None]
        sign = -1 if self.task.metric in LOWER_IS_BETTER else 1
        return max(rows, key=lambda row: sign * self.headline(row).value, default=None)

    @property
    def best_predictor(self) -> ReportRow | None:
        """The row with the best headline metric on validation among those with a probe file; None if there is none."""
        sign = -1 if self.task.metric in LOWER_IS_BETTER else 1
        rows = [row for row in self.rows if row.probe_file]
        scored = [row for row in rows if row.validation is not None]
        return max(scored or rows, key=lambda row: sign * (row.validation or 0.0), default=None)

    def find_missing_part(self) -> str:
        """Describe the first part that every report has and this one lacks; empty if there is none."""
        if not self.rows:
            return "it has no rows"
        without = [row.name for row in self.rows if self.task.metric not in row.metrics]
        if without:
            return f"row {without[0]!r} has no {self.task.metric}"
        return "" if "predictions" in self.files else "it names no file of predictions"

    @property
    def row_names(self) -> dict[str, str]:
        """Name of each row -> its description; the name itself if two rows have one description."""
        described = [describe_row(row) for row in self.rows]
        return {
            row.name: row.name if described.count(text) > 1 else text
            for row, text in zip(self.rows, described, strict=True)
        }

    def headline(self, row: ReportRow) -> Metric:
        """Return the headline metric of a row."""
        return row.metrics[self.task.metric]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a report.json.

        Args:
            path: The file, or its folder.

        Returns:
            The report.

        Raises:
            InputError: The file does not exist, or it is not a report of this schema.
        """
        path = expand_path(path)
        path = path / "report.json" if path.is_dir() else path
        # the command line prints the path of the page
        path = path.with_name("report.json") if path.name == "report.html" else path
        if not path.is_file():
            below = sorted(str(found.parent) for found in path.parent.glob("*/report.json"))
            below += sorted(str(found.parent) for found in path.parent.glob("*/*/report.json"))
            hint = f"Pass {' or '.join(below[:3])}" if below else "Check the path, or run `esm2kit benchmark`"
            raise InputError(f"{path} does not exist. {hint}.", code="report.absent", path=path)
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} is not valid JSON ({error}). Pass the report.json of a benchmark or its folder, or run the "
                "benchmark again if the file is damaged.",
                code="report.not-json",
                path=path,
            ) from None
        schema = found.get("schema") if isinstance(found, dict) else type(found).__name__
        _check_schema(schema, path)
        if schema != UNSEALED_SCHEMA:
            found = read_sealed_json(path, "run the benchmark again")
        try:
            report = cls(**found | _parse_parts(found), html=path.with_suffix(".html"), json=path)
            absent = report.find_missing_part()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            absent = f"{type(error).__name__}: {error}"
        if absent:
            raise InputError(
                f"{path} is not a complete report ({absent}). Run the benchmark again.",
                code="report.incomplete",
                path=path,
                found=absent,
            )
        return report

    def write(self, folder: Path) -> Self:
        """Write report.json atomically.

        Args:
            folder: Folder for the file.

        Returns:
            The report with the paths of its files.
        """
        written = replace(self, html=Path(folder) / "report.html", json=Path(folder) / "report.json")
        parts = to_json(replace(self, schema=SCHEMA))
        write_sealed_json(written.json, {name: part for name, part in parts.items() if name not in ("html", "json")})
        return written


def _check_schema(schema: Any, path: Path) -> None:
    """Raise InputError for a schema that this version does not read."""
    if schema in READ_SCHEMAS:
        return
    name, _, version = str(schema).partition("/")
    if name == SCHEMA_NAME and version.isascii() and version.isdigit() and int(version) > SCHEMA_VERSION:
        raise InputError(
            f"{path} was written by a later version of esm2kit: its schema is {schema!r}, and this version reads up to "
            f"{SCHEMA!r}. Update esm2kit, or run the benchmark again with this version.",
            code="report.newer",
            path=path,
            found=schema,
            expected=SCHEMA,
        )
    raise InputError(
        f"{path}: the schema is {schema!r}, expected {SCHEMA!r}. Pass a report.json of `esm2kit benchmark`.",
        code="report.schema",
        path=path,
        found=schema,
        expected=SCHEMA,
    )


def _parse_parts(found: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the parts of a report.json to their dataclasses."""
    rows = [
        ReportRow(
            **row
            | {"metrics": _parse_metrics(row["metrics"])}
            | {
                part: {name: _parse_metrics(entry) for name, entry in row.get(part, {}).items()}
                for part in ("per_target", "by_shared")
            }
        )
        for row in found["rows"]
    ]
    return {
        "task": TaskSummary(**found["task"]),
        "model": ModelSummary(**found["model"]),
        "settings": Settings(**found["settings"]),
        "rows": rows,
        "comparisons": [Comparison(**pair) for pair in found["comparisons"]],
        "published": [PublishedScore(**entry) for entry in found["published"]],
        "layer_sweep": LayerSweep.parse(found.get("layer_sweep")),
        "folds": FoldSummary.parse(found.get("folds")),
    }


def _parse_metrics(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Metric]:
    return {name: Metric(**entry) for name, entry in found.items()}


def format_comparison(ours: str, theirs: str, metric: str, difference: Interval, unit: str = "") -> str:
    """Write the difference of two models as a sentence, such as "B beats A by 1.2 [0.4, 2.0] in RMSE".

    Args:
        ours: Display name of the first model.
        theirs: Display name of the second model.
        metric: Compared metric.
        difference: Positive if the first model is better, with its 95% interval.
        unit: Unit of the target, for metrics that have it.

    Returns:
        The sentence, without a full stop.
    """
    name = metric_name(metric)
    low, high = difference.low, difference.high
    size = format_difference(metric, difference, absolute=True)
    signed = format_difference(metric, difference)
    if unit and metric in HAVE_A_UNIT:
        size, signed = f"{size} {unit}", f"{signed} {unit}"
    sign = f" (positive means a lower {name}, which is better)" if metric in LOWER_IS_BETTER else ""
    if math.isfinite(difference.value) and not math.isfinite(low):
        differs = f"{name} differs by {signed}{sign} in every bootstrap replicate"
        return f"{ours} and {theirs}: {differs}, so there is no interval"
    if not all(map(math.isfinite, difference)):
        return f"{ours} and {theirs}: {name} is undefined for one of the two"
    lower = " (lower is better)" if metric in LOWER_IS_BETTER else ""
    if low > 0:
        return f"{ours} beats {theirs} by {size} in {name}{lower}"
    if high < 0:
        return f"{theirs} beats {ours} by {size} in {name}{lower}"
    return f"No significant difference between {ours} and {theirs}: {signed} in {name}{sign}"


def compare_rows(
    name: str, ours: Mapping[str, Score], others: Mapping[str, Mapping[str, Score]], headline: str
) -> list[Comparison]:
    """Compare a row with each other row by a paired bootstrap.

    Args:
        name: Name of the row.
        ours: Scores of the row by metric.
        others: Name -> scores of each other row.
        headline: Metric to compare. RMSE is used where it is undefined: a constant has no rank correlation.

    Returns:
        One comparison per other row, in the same order.
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
