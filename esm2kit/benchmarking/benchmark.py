"""How good are these embeddings? Probe, untrained model and baselines on one task, with intervals, in one report."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.benchmarking.baselines.fit import baseline_names, fit_baseline
from esm2kit.benchmarking.compare import compare
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.model_features import ModelFeatures, embed_task, read_features, without_missing
from esm2kit.benchmarking.output import file_key, finished, keep_earlier, model_folder, write_predictions
from esm2kit.benchmarking.probes.config import SOURCES, ProbeConfig, preset_config
from esm2kit.benchmarking.probes.features import Fitted, ProbeTargets
from esm2kit.benchmarking.probes.fit import check_probe, fit_probe
from esm2kit.benchmarking.probes.heads import HEADS
from esm2kit.benchmarking.report import SCHEMA, comparisons, write_report
from esm2kit.benchmarking.scores import note_on_draws, protein_numbers, row_of, score_fitted
from esm2kit.core.errors import InputError
from esm2kit.core.files import sha256_file
from esm2kit.core.hardware import device_of
from esm2kit.core.provenance import provenance
from esm2kit.tasks.data import TaskData, load_task
from esm2kit.tasks.download import download_flip, obtainable
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.metrics import Score, draw_counts
from esm2kit.tasks.published import PUBLISHED

logger = logging.getLogger(__name__)

UNTRAINED_SEED = 0


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Judge embeddings on a task, or on several.

    Every finished row lies in `<out_dir>/rows`, so that a run which was stopped goes on where it was.

    Returns: the report as esm2kit.benchmarking.report describes it, with the paths "html" and "json"; for several tasks
        the comparison.
    Raises: InputError with one line on what is wrong and what to do.
    """
    judged = config.embeddings or config.hiddens or config.model or "embeddings"
    out_dir = Path(config.out_dir or Path("benchmark") / model_folder(judged))
    if config.tasks is None:
        folder = f"{Path(config.task).stem}_{config.split or ''}".rstrip("_")
        return _benchmark_one(config if config.out_dir else replace(config, out_dir=out_dir / folder))
    if config.split is not None:
        raise InputError(f"split {config.split!r} belongs to one task: give it with task, or leave it out with tasks")
    if config.tasks.strip() == "all":
        names = obtainable(Path(config.data_dir))
    else:
        names = [name.strip() for name in config.tasks.split(",")]
    folders, failed = [], {}
    for place, name in enumerate(names, 1):
        logger.info("task %d of %d: %s", place, len(names), name)
        one = replace(config, task=name, tasks=None, out_dir=out_dir / Path(name).stem)
        try:
            _benchmark_one(one)
            folders.append(one.out_dir)
        except InputError as error:
            failed[name] = str(error)
            logger.warning("%s: %s", name, error)
    if not folders:
        raise InputError("; ".join(f"{name}: {told}" for name, told in failed.items()))
    if len(folders) > 1:
        joined = compare(folders, out_dir)
    else:
        joined = {"html": str(folders[0] / "report.html"), "reports": [str(folders[0])], "pairs": []}
    if failed:
        raise InputError(
            f"{len(folders)} of {len(names)} tasks are done ({joined['html']}); "
            + "; ".join(f"{name}: {told}" for name, told in failed.items())
        )
    return joined


def score_told(metric: str, score: Score) -> str:
    """A score as the console tells it: with its interval, and in words where there is none."""
    value, low, high = score.interval
    if not math.isfinite(value):
        return f"{metric} is not defined: predictions (or targets) are constant"
    return f"{metric} {value:.4f}" + (f" [{low:.4f}, {high:.4f}]" if math.isfinite(low) else "")


def _benchmark_one(config: BenchmarkConfig) -> dict[str, Any]:
    start = time.perf_counter()
    out_dir = Path(config.out_dir)
    if config.download and config.task in TASKS:
        download_flip(config.task, Path(config.data_dir), split=config.split)
    data = load_task(config.task, config.split, Path(config.data_dir), config.target)
    if config.limit is not None:
        data = data.limited(config.limit, config.seed)
    probe = preset_config(config.preset, data.task, config.probe)
    if config.epochs is not None:
        probe = replace(probe, epochs=config.epochs)
    check_probe(probe.probe, data.task)
    known = baseline_names(data)
    baselines = known if config.baselines is None else tuple(config.baselines)
    unknown = [name for name in baselines if name not in known]
    if unknown:
        raise InputError(f"no baseline {unknown[0]!r} for task {data.task.name}: choose from {', '.join(known)}")
    device = device_of(config.device)
    data, ours, untrained = _sources(config, data, probe, out_dir)

    counts_RP = draw_counts(int(protein_numbers(data).max()) + 1, config.resamples)
    seeds = tuple(config.seeds)
    rows: list[dict[str, Any]] = []
    scores: dict[str, dict[str, Score]] = {}
    predictions: dict[str, np.ndarray] = {}

    def add(
        name: str, kind: str, note: str, settings: Any, key: Any, fit: Callable[[], tuple[Fitted, str] | None]
    ) -> None:
        found = finished(
            out_dir / "rows", name, {"data": data.sha256, "row": name, "settings": settings, "key": key}, fit
        )
        if found is None:
            return
        fitted, told = found
        scores[name] = score_fitted(fitted, data, counts_RP)
        predictions[name] = fitted.test_SM
        rows.append(row_of(name, kind, fitted, scores[name], data, told or note, settings, seeds))
        logger.info("%s: %s", name, score_told(data.task.metric, scores[name][data.task.metric]))

    targets, settings = ProbeTargets.of(data), asdict(probe) | {"seeds": list(seeds)}
    for source, kind in ((ours, "probe"), (untrained, "untrained")):
        if source is not None:
            name = f"{source.name}, {probe.probe}"
            layer = source.attributes.get("layer", "?")
            note = f"{probe.probe} on layer {layer} of {source.name}; {SOURCES[config.preset]}"
            with closing(source.features):
                add(name, kind, note, settings, file_key(source.path),
                    lambda source=source: (fit_probe(source.features, targets, probe, seeds, device), ""))  # fmt: skip
    wide = config.preset == "flip2021"
    for name in baselines:

        def fit(name: str = name) -> tuple[Fitted, str] | None:
            made = fit_baseline(name, data, seeds, wide)
            return None if made is None else (made.fitted, made.note)

        add(name, "baseline", "", {"seeds": list(seeds), "wide_cnn": wide}, None, fit)

    report = _report(config, data, probe, ours, rows, scores)
    keep_earlier(out_dir, report)
    write_predictions(out_dir / "predictions.npz", data, predictions)
    truth_M = data.targets[data.target_rows("test")]
    html = write_report(report, truth_M, predictions[rows[0]["name"]][0], out_dir)
    logger.info("%s, split %s: judged in %.0f s", data.task.name, data.split, time.perf_counter() - start)
    return report | {"html": str(html), "json": str(out_dir / "report.json")}


def _sources(
    config: BenchmarkConfig, data: TaskData, probe: ProbeConfig, out_dir: Path
) -> tuple[TaskData, ModelFeatures, ModelFeatures | None]:
    """Features of the model and of its untrained twin, made if need be; the task without proteins that lack them."""
    per_residue = data.task.level == "residue" or (probe.probe in HEADS and HEADS[probe.probe].per_protein)
    given = config.hiddens if per_residue else config.embeddings
    other = config.embeddings if per_residue else config.hiddens
    if given is None and other is not None:
        wanted = "hiddens (one vector a residue)" if per_residue else "embeddings (one vector a protein)"
        raise InputError(f"task {data.task.name} with probe {probe.probe} takes {wanted}; {other} is the other kind")
    if given is None and config.model is None:
        raise InputError("name a model, or an existing file of embeddings (hiddens for residues)")
    if given is not None:
        data = without_missing(data, Path(given), config.allow_missing)

    def made(untrained_seed: int | None) -> Path:
        return embed_task(data, config.model, config.repr_layer, per_residue, out_dir, config.device, untrained_seed)

    path = Path(given) if given is not None else made(None)
    ours = read_features(path, data, per_residue)
    untrained = None
    if config.untrained and config.model is not None:
        untrained = read_features(made(UNTRAINED_SEED), data, per_residue)
        untrained = untrained._replace(name=f"untrained {untrained.name.removesuffix('_untrained')}")
        if untrained.features.width != ours.features.width:
            widths = f"{untrained.features.width} numbers a vector, not {ours.features.width}"
            told = f"{untrained.name} has {widths}: no twin of what made these; give that as model"
            data = replace(data, notes=(*data.notes, told))
    return data, ours, untrained


def _report(
    config: BenchmarkConfig,
    data: TaskData,
    probe: ProbeConfig,
    ours: ModelFeatures,
    rows: list[dict[str, Any]],
    scores: dict[str, dict[str, Score]],
) -> dict[str, Any]:
    task = data.task
    light = task.splits[data.split].light if task.name in TASKS and data.split in task.splits else None
    first = rows[0]["name"]
    others = {name: found for name, found in scores.items() if name != first}
    published = [asdict(item) for item in PUBLISHED if (item.task, item.split) == (task.name, data.split)]
    notes = [*data.notes, *note_on_draws(scores)]
    if config.untrained and config.model is None:
        notes.append(
            "no untrained rival: name the model that made the embeddings to have it probed with random weights"
        )
    if len(config.seeds) > 1 and probe.probe in HEADS:
        notes.append("seeds differ in initial weights and dropout; the order of batches is the same for all")
    inputs: dict[str, Path | str] = {f"task/{name}": path for name, path in data.files.items()}
    inputs["embeddings"] = sha256_file(ours.path)
    return {
        "schema": SCHEMA,
        "task": {
            "name": task.name, "level": task.level, "target": task.target, "split": data.split, "metric": task.metric,
            "unit": task.unit, "labels": list(task.labels), "num_bits": len(task.binary_labels), "traffic_light": light,
            "licence": task.licence, "citation": task.citation, "official": data.official, "sizes": data.sizes,
            "scored_test": len(data.target_rows("test")),
        },
        "model": {"name": ours.name, "embeddings": {"path": str(ours.path), **ours.attributes}},
        "settings": {
            "preset": config.preset, "source": SOURCES[config.preset], "probe": asdict(probe), "seeds": config.seeds,
            "limit": config.limit, "resamples": config.resamples,
        },
        "rows": rows,
        "comparisons": comparisons(first, scores[first], others, task.metric),
        "published": published if data.official else [],
        "notes": notes,
        "files": {"predictions": "predictions.npz"},
        "provenance": provenance("benchmark", config, inputs),
    }  # fmt: skip
