"""What a fine-tuned model is worth: its test scores beside the probe of the weights it began with, and the baselines.

The report is the benchmark stage's own, with the fine-tuned row first.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.benchmarking.benchmark import benchmark, score_told
from esm2kit.benchmarking.compare import load_scores
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.benchmarking.report import comparisons, read_report, write_report
from esm2kit.benchmarking.scores import metric_entry, note_on_draws, protein_numbers, row_of, score_fitted
from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.finetuning.config import SOURCES, FinetuneConfig
from esm2kit.finetuning.model_file import FinetunedModel, load_finetuned
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.load import load_model
from esm2kit.tasks.data import TaskData
from esm2kit.tasks.metrics import Score, draw_counts

logger = logging.getLogger(__name__)


def predict_set(model: FinetunedModel, data: TaskData, set_name: str) -> np.ndarray:
    """Predictions (M,) for the targets of a set that count, in the task's order."""
    rows = data.rows(set_name)
    outputs = model.outputs([data.sequences[row] for row in rows])
    if data.task.level == "protein":
        return model.decide(np.stack(outputs))
    scored = np.concatenate([data.scored[data.offsets[row] : data.offsets[row + 1]] for row in rows])
    return model.decide(np.concatenate(outputs)[scored])


def write_finetune_report(
    config: FinetuneConfig,
    run: FinetuneConfig,
    data: TaskData,
    models: Sequence[Path],
    histories: Sequence[list[dict[str, str]]],
    manifest: dict[str, Any],
) -> dict[str, Any]:
    """Score the test set once and write predictions.npz and, with `benchmark`, report.json and report.html.

    Args:
        config: as given.
        run: settled.
        data: the task.
        models: finetuned.safetensors of every seed.
        histories: rows of every seed's metrics.csv.
        manifest: the run's provenance.
    Returns: {"name", "test", "predictions", "report", "html"}; the last two are None without `benchmark`.
    """
    out_dir = Path(config.out_dir)
    test, validation = [], []
    for path in models:
        model = load_finetuned(path, device=config.accelerator)
        test.append(predict_set(model, data, "test"))
        validation.append(predict_set(model, data, "validation"))
    fitted = Fitted(
        np.stack(test),
        np.stack(validation),
        _curves(histories),
        {"epoch": [_kept_validation(rows) for rows in histories]},
        sum(map(_seconds, histories)),
    )
    counts_RP = draw_counts(int(protein_numbers(data).max()) + 1, config.resamples)
    scores = score_fitted(fitted, data, counts_RP)
    base = model.facts["base"]["name"]
    name = f"{base}, fine-tuned ({run.mode}, {run.head})"
    logger.info("%s: test %s", name, score_told(data.task.metric, scores[data.task.metric]))
    result: dict[str, Any] = {
        "name": name,
        "test": {metric: metric_entry(score) for metric, score in scores.items()},
        "predictions": str(out_dir / "predictions.npz"),
        "report": None,
        "html": None,
    }
    predictions = {f"predicted/{name}": fitted.test_SM}
    truth_M = data.targets[data.target_rows("test")]
    stored: dict[str, Any] = {"truth": truth_M, "protein": protein_numbers(data)}
    report = None
    if config.benchmark:
        try:
            report = _benchmark(config, base)
        except InputError as error:
            logger.warning("no report, only the scores: %s", error)
    if report is not None:
        note = f"{SOURCES[run.preset]}; {run.max_steps} updates of {run.layout.global_batch_size} sequences at most"
        row = row_of(name, "finetuned", fitted, scores, data, note, _settings(run), tuple(config.seeds))
        report = _with_row(report, row, scores, data, manifest)
        with np.load(out_dir / "benchmark" / "predictions.npz") as theirs:
            stored |= {key: theirs[key] for key in theirs.files if not key.startswith("predicted/")}
            predictions |= {key: theirs[key] for key in theirs.files if key.startswith("predicted/")}
    with atomic_path(out_dir / "predictions.npz") as part, open(part, "wb") as file:
        np.savez_compressed(file, **stored, **predictions)
    if report is not None:
        html = write_report(report, truth_M, fitted.test_SM[0], out_dir)
        result |= {"report": str(out_dir / "report.json"), "html": str(html)}
    return result


def _settings(run: FinetuneConfig) -> dict[str, Any]:
    names = ("mode", "head", "hidden", "dropout", "lr", "head_lr", "layer_lr_decay", "warmup_steps", "schedule")
    settings = {name: getattr(run, name) for name in (*names, "weight_decay", "max_steps", "patience", "precision")}
    return settings | {"global_batch_size": run.layout.global_batch_size}


def _curves(histories: Sequence[list[dict[str, str]]]) -> dict[str, list[list[float]]]:
    """Losses at each validation, validations x seeds; train_loss is the mean of what was logged since the last one.

    A seed that stopped early keeps its last figures to the end of the table.
    """
    curves: list[list[tuple[float, float]]] = []
    for rows in histories:
        points, since = [], []
        for row in rows:
            since += [float(row["train_loss"])] if row["train_loss"] else []
            if row["val_loss"]:
                points.append((float(np.mean(since)) if since else float(row["val_loss"]), float(row["val_loss"])))
                since = []
        curves.append(points)
    length = max(map(len, curves), default=0)
    if not all(curves):
        return {}
    padded = [points + points[-1:] * (length - len(points)) for points in curves]
    return {
        kind: [[points[place][column] for points in padded] for place in range(length)]
        for column, kind in enumerate(("train_loss", "validation_loss"))
    }


def _seconds(rows: list[dict[str, str]]) -> float:
    """What training took, over all its processes: the clock of a row is that of the process that wrote it."""
    clock = [float(row["seconds"]) for row in rows]
    return sum(now for now, then in zip(clock, [*clock[1:], 0.0], strict=False) if then < now)


def _kept_validation(rows: list[dict[str, str]]) -> int:
    """Number, from 1, of the validation whose weights were kept."""
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    return int(np.argmin(losses)) + 1 if losses else 0


def _benchmark(config: FinetuneConfig, base: str) -> dict[str, Any]:
    """The benchmark stage on the weights the run began with."""
    out_dir, model = Path(config.out_dir) / "benchmark", str(config.model)
    if config.untrained_seed is not None:
        path = out_dir / f"{base}.safetensors"
        esm2, _ = load_model(config.model, config.untrained_seed)
        tensors = {f"model.{name}": tensor for name, tensor in esm2.state_dict().items()}
        metadata = {"model": esm2.config, "step": 0, "untrained_seed": config.untrained_seed}
        write_checkpoint(path, tensors, metadata)
        model = str(path)
    benchmark(
        BenchmarkConfig(
            task=config.task,
            split=config.split,
            data_dir=config.data_dir,
            download=False,
            target=config.target,
            model=model,
            preset=config.preset,
            seeds=config.seeds,
            untrained=config.untrained_seed is None,
            limit=config.limit,
            resamples=config.resamples,
            device=config.accelerator,
            out_dir=out_dir,
        )
    )
    return read_report(out_dir)


def _with_row(
    report: dict[str, Any], row: dict[str, Any], scores: dict[str, Score], data: TaskData, manifest: dict[str, Any]
) -> dict[str, Any]:
    """A benchmark's report with one more row, the first, and every other row compared with it."""
    others = {other["name"]: load_scores(report, other["name"])[1] for other in report["rows"]}
    kept = {key: value for key, value in report.items() if key != "folder"}
    return kept | {
        "rows": [row, *report["rows"]],
        "comparisons": comparisons(row["name"], scores, others, data.task.metric),
        "notes": [*report["notes"], *note_on_draws({row["name"]: scores})],
        "files": {"predictions": "predictions.npz"},
        "provenance": manifest,
    }
