"""Report of a fine-tuned model: test scores compared with a probe of the initial weights and the baselines."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.benchmarking.benchmark import benchmark_task, load_task_features
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.output import write_predictions, write_report
from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.benchmarking.report import Metric
from esm2kit.benchmarking.scores import ScoredModel, format_score, number_proteins, score_fitted
from esm2kit.benchmarking.uncertainty import (
    Uncertainty,
    describe_test_uncertainty,
    estimate_uncertainty,
    keep_first_seed,
)
from esm2kit.benchmarking.verdict import evaluate, score_constant
from esm2kit.core.errors import InputError
from esm2kit.finetuning.config import SOURCES, FinetuneConfig
from esm2kit.finetuning.model_file import FinetunedModel, load_finetuned
from esm2kit.models.checkpoint import read_checkpoint, write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import TOKENS_PER_BATCH
from esm2kit.models.load import load_model
from esm2kit.models.memory import InferenceSettings
from esm2kit.models.memory_guard import explain_inference_memory
from esm2kit.tasks.metrics import sample_counts
from esm2kit.tasks.task_data import TaskData
from esm2kit.training.precision import encoder_precision
from esm2kit.training.trainer import resolve_accelerator

logger = logging.getLogger(__name__)


def explain_scoring_memory(shape: ESM2Config, config: FinetuneConfig) -> AbstractContextManager[None]:
    """Return the context in which exhausted memory outside the training loop names the options that help.

    Args:
        shape: Architecture of the encoder.
        config: The run.

    Returns:
        The context, for the passes of an `Encoder` before and after training.
    """
    device = resolve_accelerator(config)
    precision = encoder_precision(config.precision, device)
    settings = InferenceSettings(tokens=count_scoring_tokens(config), precision=precision, device=device)
    names = {"batch_tokens": "tokens_per_validation_batch", "device": "accelerator"}
    return explain_inference_memory(shape, settings, ("batch_tokens", "device"), names=names)


def count_scoring_tokens(config: FinetuneConfig) -> int:
    """Return the tokens per batch of the test set, at most those of validation, so that both need the same memory."""
    return min(TOKENS_PER_BATCH[resolve_accelerator(config)], config.tokens_per_validation_batch)


def compute_set_outputs(
    model: FinetunedModel, data: TaskData, set_name: str, tokens_per_batch: int | None = None
) -> np.ndarray:
    """Compute the outputs for the scored targets of a set (M, C), in the order of the task."""
    rows = data.rows(set_name)
    outputs = model.outputs([data.sequences[row] for row in rows], tokens_per_batch)
    if data.task.level == "protein":
        return np.stack(outputs)
    scored = np.concatenate([data.scored[data.offsets[row] : data.offsets[row + 1]] for row in rows])
    return np.concatenate(outputs)[scored]


def predict_set(
    model: FinetunedModel, data: TaskData, set_name: str, tokens_per_batch: int | None = None
) -> np.ndarray:
    """Predict the scored targets of a set (M,), in the order of the task; (M, C) for several targets per protein."""
    return _decode(model, compute_set_outputs(model, data, set_name, tokens_per_batch))


def _decode(model: FinetunedModel, outputs_MC: np.ndarray) -> np.ndarray:
    """Convert outputs to the predictions of `Fitted`: values, classes, or probabilities of labels."""
    return model.probabilities(outputs_MC) if model.task.has_columns else model.decide(outputs_MC)


def _predict_seeds(config: FinetuneConfig, data: TaskData, models: Sequence[Path]) -> tuple[FinetunedModel, Fitted]:
    """Predict test and validation with the model of each seed, and add to its file what validation says about it.

    Returns:
        The last model, and the predictions of all seeds with the logits of the first.
    """
    device = resolve_accelerator(config)
    precision = encoder_precision(config.precision, device)
    runs = []
    for path in models:
        model = load_finetuned(path, device=device, precision=precision)
        with explain_scoring_memory(model.encoder.config, config):
            found = [
                compute_set_outputs(model, data, set_name, count_scoring_tokens(config))
                for set_name in ("test", "validation")
            ]
        fitted = Fitted(*(_decode(model, outputs_MC)[None] for outputs_MC in found))
        if data.task.is_multilabel:
            fitted = fitted._replace(selected={"threshold": [model.threshold]})
        if data.task.target == "class":
            fitted = fitted._replace(test_logits_MC=found[0], validation_logits_MC=found[1])
        _store_uncertainty(path, estimate_uncertainty(fitted, data))
        runs.append(fitted)
    predicted = (np.concatenate(each) for each in zip(*((run.test_SM, run.validation_SM) for run in runs), strict=True))
    logits = {"test_logits_MC": runs[0].test_logits_MC, "validation_logits_MC": runs[0].validation_logits_MC}
    thresholds = {"threshold": [run.thresholds[0] for run in runs]} if data.task.is_multilabel else {}
    return model, Fitted(*predicted, selected=thresholds, **logits)


def _store_uncertainty(path: Path, uncertainty: Uncertainty | None) -> None:
    """Add the uncertainty to the metadata of a fine-tuned model."""
    tensors, metadata = read_checkpoint(path)
    facts = metadata["finetune"] | {"uncertainty": uncertainty and uncertainty.describe()}
    write_checkpoint(path, tensors, metadata | {"finetune": facts})


def write_finetune_report(
    config: FinetuneConfig,
    run: FinetuneConfig,
    data: TaskData,
    models: Sequence[Path],
    histories: Sequence[list[dict[str, str]]],
    manifest: dict[str, Any],
) -> dict[str, Any]:
    """Score the test set and write predictions.npz, and with `benchmark` also report.json and report.html.

    Args:
        config: Configuration of the user.
        run: Configuration with resolved defaults.
        data: The task.
        models: finetuned.safetensors of each seed.
        histories: Rows of each seed's metrics.csv.
        manifest: Provenance of the run.

    Returns:
        {"name", "test", "uncertainty" (see `ReportRow`), "predictions", "report", "html", "verdict", "warnings"}.
        report and html are None without `benchmark`.
    """
    out_dir = Path(config.out_dir)
    model, fitted = _predict_seeds(config, data, models)
    fitted = fitted._replace(
        history=_build_curves(histories),
        selected=fitted.selected | {"epoch": [_find_best_validation(rows) for rows in histories]},
        seconds=sum(map(_sum_seconds, histories)),
    )
    counts_RP = sample_counts(int(number_proteins(data).max()) + 1, config.resamples)
    base = model.facts["base"]["name"]
    name = f"{base}, fine-tuned ({run.mode}, {run.head})"
    note = f"{SOURCES[run.preset]}; up to {run.max_steps} updates of {run.layout.global_batch_size} sequences"
    scored = ScoredModel(name, "finetuned", note, _select_settings(run), fitted, score_fitted(fitted, data, counts_RP))
    logger.info("%s: test %s", name, format_score(data.task.metric, scored.scores[data.task.metric]))
    result: dict[str, Any] = {
        "name": name,
        "test": {metric: asdict(Metric.from_score(score)) for metric, score in scored.scores.items()},
        "uncertainty": describe_test_uncertainty(keep_first_seed(fitted), data, counts_RP, config.coverage),
        "predictions": str(out_dir / "predictions.npz"),
        "report": None,
        "html": None,
    }
    verdict = evaluate(data, scored, score_constant(data, counts_RP))
    if config.benchmark:
        try:
            settings = _build_benchmark_config(config, base)
            data, start, untrained = load_task_features(settings, data)
            report, predictions = benchmark_task(data, start, untrained, settings, manifest, scored)
        except InputError as error:
            logger.warning("scores are written without a report: %s", error)
        else:
            folder = Path(settings.out_dir).relative_to(out_dir)  # of the probes
            rows = [replace(row, probe_file=row.probe_file and f"{folder}/{row.probe_file}") for row in report.rows]
            report = write_report(replace(report, rows=rows), data, predictions, out_dir)
            paths = [str(path) for path in report.paths]
            result |= {"report": str(report.json), "html": str(report.html), "files": paths}
            return result | {"verdict": report.verdict, "warnings": list(report.warnings)}
    result |= {"verdict": verdict.sentence, "warnings": list(verdict.warnings)}
    write_predictions(out_dir / "predictions.npz", data, {name: fitted.test_SM})
    return result | {"files": [result["predictions"]]}


def _select_settings(run: FinetuneConfig) -> dict[str, Any]:
    """Return the settings that the report shows."""
    names = ("mode", "head", "hidden", "dropout", "lr", "head_lr", "layer_lr_decay", "warmup_steps", "schedule")
    settings = {name: getattr(run, name) for name in (*names, "weight_decay", "max_steps", "patience", "precision")}
    return settings | {"global_batch_size": run.layout.global_batch_size}


def _build_curves(histories: Sequence[list[dict[str, str]]]) -> dict[str, list[list[float]]]:
    """Return the losses at each validation (validations, seeds); train_loss is the mean since the last validation.

    A seed that stopped early repeats its last values.
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


def _sum_seconds(rows: list[dict[str, str]]) -> float:
    """Sum the training time of all processes of a run; each process starts its clock at 0."""
    clock = [float(row["seconds"]) for row in rows]
    return sum(now for now, then in zip(clock, [*clock[1:], 0.0], strict=False) if then < now)


def _find_best_validation(rows: list[dict[str, str]]) -> int:
    """Return the number, from 1, of the validation with the lowest loss; its weights are kept."""
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    return int(np.argmin(losses)) + 1 if losses else 0


def _build_benchmark_config(config: FinetuneConfig, base: str) -> BenchmarkConfig:
    """Build the settings for the probe of the initial weights; random weights are written to a file first."""
    out_dir, model = Path(config.out_dir) / "benchmark", str(config.model)
    if config.untrained_seed is not None:
        path = out_dir / f"{base}.safetensors"
        esm2, _ = load_model(config.model, config.untrained_seed)
        tensors = {f"model.{name}": tensor for name, tensor in esm2.state_dict().items()}
        metadata = {"model": esm2.config, "step": 0, "untrained_seed": config.untrained_seed}
        write_checkpoint(path, tensors, metadata)
        model = str(path)
    return BenchmarkConfig(
        task=config.task,
        split=config.split,
        model=model,
        preset=config.preset,
        seeds=config.seeds,
        untrained=config.untrained_seed is None,
        limit=config.limit,
        resamples=config.resamples,
        coverage=config.coverage,
        device=config.accelerator,
        out_dir=out_dir,
    )
