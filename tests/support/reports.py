"""Small reports with only the fields that summaries, tables and charts read."""

from collections.abc import Sequence

from esm2kit.benchmarking.report import (
    SCHEMA,
    Comparison,
    Metric,
    ModelSummary,
    Report,
    ReportRow,
    Settings,
    TaskSummary,
)

BLANK = {"note": "", "config": {}, "seconds": 0.0, "seeds": [], "selected": {}, "per_class": {}, "confusion": []}


def score(value: float | None, low: float | None = None, high: float | None = None) -> Metric:
    return Metric(value, low, high, [value], 0.0)


def row(kind: str, name: str, metrics: dict[str, Metric], **more: object) -> ReportRow:
    return ReportRow(kind=kind, name=name, metrics=metrics, **BLANK | {"history": {}} | more)


def report(metric: str, rows: Sequence[ReportRow], comparisons: Sequence[Comparison] = (), train: int = 0) -> Report:
    level, target = "protein", "value" if metric in ("rmse", "spearman") else "class"
    sizes = {"train": train, "validation": 0, "test": 0}
    task = TaskSummary("t", level, target, "s", metric, "", (), 0, None, "", "", False, sizes, 0)
    settings = Settings("esm2kit", "", {}, [0], None, 1000)
    return Report(SCHEMA, task, ModelSummary("m", {}), settings, rows, comparisons, [], [], {}, {})
