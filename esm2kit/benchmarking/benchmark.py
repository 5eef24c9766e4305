"""How good are these embeddings? Probe, untrained model and baselines on one task, with intervals, in one report."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.benchmarking.baselines.fit import fit_baseline, list_baselines
from esm2kit.benchmarking.compare import ReportComparison, write_comparison
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.model_features import ModelFeatures, drop_missing, embed_task, read_features
from esm2kit.benchmarking.output import finished, format_folder_name, move_earlier_report, read_file_key, write_report
from esm2kit.benchmarking.probes.config import SOURCES, ProbeConfig, preset_config
from esm2kit.benchmarking.probes.features import Fitted, ProbeTargets
from esm2kit.benchmarking.probes.fit import check_probe, fit_probe
from esm2kit.benchmarking.probes.heads import HEADS
from esm2kit.benchmarking.report import SCHEMA, ModelSummary, Report, Settings, TaskSummary, compare_rows
from esm2kit.benchmarking.scores import ScoredModel, build_interval_notes, format_score, number_proteins, score_fitted
from esm2kit.core.errors import InputError
from esm2kit.core.files import sha256_file
from esm2kit.core.hardware import resolve_device
from esm2kit.core.provenance import build_provenance
from esm2kit.tasks.data import TaskData, load_task
from esm2kit.tasks.download import download_flip, list_downloadable_tasks
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.metrics import sample_counts
from esm2kit.tasks.published import PUBLISHED
from esm2kit.tasks.task import Task

logger = logging.getLogger(__name__)

UNTRAINED_SEED = 0


def benchmark(config: BenchmarkConfig) -> Report | ReportComparison:
    """Score embeddings on a task, or on several.

    Every finished row lies in `<out_dir>/rows`, so a run that was stopped resumes there.

    Returns:
        The report, as it was written; for several tasks their comparison.

    Raises:
        InputError: one line on what is wrong and what to do.
    """
    embedded = config.embeddings or config.hiddens or config.model or "embeddings"
    out_dir = Path(config.out_dir or Path("benchmark") / format_folder_name(embedded))
    if config.tasks is None:
        folder = f"{Path(config.task).stem}_{config.split or ''}".rstrip("_")
        return _run_task(config if config.out_dir else replace(config, out_dir=out_dir / folder))
    if config.split is not None:
        raise InputError(
            f"split {config.split!r} belongs to one task: give it with task, or leave it out with tasks",
            code="benchmark.split",
            split=config.split,
        )
    if config.tasks.strip() == "all":
        names = list_downloadable_tasks(Path(config.data_dir))
    else:
        names = [name.strip() for name in config.tasks.split(",")]
    folders = [Path(name).stem for name in names]
    if len(set(folders)) < len(folders):
        raise InputError(
            f"tasks {config.tasks}: two of them have one name, and so one folder; run them apart",
            code="benchmark.same-name",
            tasks=names,
        )
    reports, failed = [], {}
    for place, name in enumerate(names, 1):
        logger.info("task %d of %d: %s", place, len(names), name)
        try:
            reports.append(_run_task(replace(config, task=name, tasks=None, out_dir=out_dir / Path(name).stem)))
        except InputError as error:
            failed[name] = error
            logger.warning("%s: %s", name, error)
    errors = "; ".join(f"{name}: {error}" for name, error in failed.items())
    if not reports:
        raise InputError(errors, code="benchmark.some-failed", failed=failed, done=0)
    found = write_comparison(reports, out_dir) if len(reports) > 1 else reports[0]
    if failed:
        raise InputError(
            f"{len(reports)} of {len(names)} tasks are done ({found.html}); {errors}",
            code="benchmark.some-failed",
            failed=failed,
            done=len(reports),
        )
    return found


def _run_task(config: BenchmarkConfig) -> Report:
    start = time.perf_counter()
    if config.download and config.task in TASKS:
        download_flip(config.task, Path(config.data_dir), split=config.split)
    data = load_task(config.task, config.split, Path(config.data_dir), config.target)
    if config.limit is not None:
        data = data.limit_proteins(config.limit, config.seed)
    choose_baselines(config, data)  # an unknown name is reported before anything is embedded
    data, ours, untrained = load_task_features(config, data)
    inputs: dict[str, Path | str] = {f"task/{name}": path for name, path in data.files.items()}
    inputs["embeddings"] = sha256_file(ours.path)
    manifest = build_provenance("benchmark", config, inputs)
    report, predictions = benchmark_task(data, ours, untrained, config, manifest)
    move_earlier_report(Path(config.out_dir), report)
    report = write_report(report, data, predictions, Path(config.out_dir))
    logger.info("%s, split %s: scored in %.0f s", data.task.name, data.split, time.perf_counter() - start)
    return report


def resolve_probe(config: BenchmarkConfig, task: Task) -> ProbeConfig:
    """The probe's settings: the preset's for the task, but for those the user gave.

    Raises:
        InputError: the probe does not fit the task.
    """
    probe = preset_config(config.preset, task, config.probe)
    check_probe(probe.probe, task)
    return probe if config.epochs is None else replace(probe, epochs=config.epochs)


def choose_baselines(config: BenchmarkConfig, data: TaskData) -> tuple[str, ...]:
    """Names of the baselines to fit.

    Raises:
        InputError: one that the task does not have.
    """
    known = list_baselines(data)
    chosen = known if config.baselines is None else tuple(config.baselines)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(
            f"no baseline {unknown[0]!r} for task {data.task.name}: choose from {', '.join(known)}",
            code="baseline.unknown",
            name=unknown[0],
            allowed=known,
        )
    return chosen


def load_task_features(config: BenchmarkConfig, data: TaskData) -> tuple[TaskData, ModelFeatures, ModelFeatures | None]:
    """Features of the model and of the untrained one, embedded where no file is given.

    Args:
        config: model, embeddings or hiddens, repr_layer, untrained, allow_missing, device, out_dir.
        data: the task.

    Returns:
        The task without the proteins that a given file lacks, the model's features, the untrained model's.

    Raises:
        InputError: no model and no file, a file of the wrong level, or one without some of the proteins.
    """
    probe = resolve_probe(config, data.task)
    per_residue = data.task.level == "residue" or (probe.probe in HEADS and HEADS[probe.probe].per_protein)
    given = config.hiddens if per_residue else config.embeddings
    other = config.embeddings if per_residue else config.hiddens
    if given is None and other is not None:
        kind = "hiddens (one vector a residue)" if per_residue else "embeddings (one vector a protein)"
        raise InputError(
            f"task {data.task.name} with probe {probe.probe} takes {kind}; {other} is the other kind",
            code="embeddings.level",
            path=other,
            probe=probe.probe,
            expected="residue" if per_residue else "protein",
        )
    if given is None and config.model is None:
        raise InputError(
            "name a model, or an existing file of embeddings (hiddens for residues)", code="benchmark.no-source"
        )
    if given is not None:
        data = drop_missing(data, Path(given), config.allow_missing)

    def embedded(untrained_seed: int | None) -> Path:
        out_dir = Path(config.out_dir)
        return embed_task(data, config.model, config.repr_layer, per_residue, out_dir, config.device, untrained_seed)

    path = Path(given) if given is not None else embedded(None)
    ours = read_features(path, data, per_residue)
    untrained = None
    if config.untrained and config.model is not None:
        untrained = read_features(embedded(UNTRAINED_SEED), data, per_residue)
        untrained = untrained._replace(name=f"untrained {untrained.name.removesuffix('_untrained')}")
        if untrained.features.width != ours.features.width:
            widths = f"{untrained.features.width} numbers a vector, not {ours.features.width}"
            note = f"{untrained.name} has {widths}: no twin of what made these; give that as model"
            data = replace(data, notes=(*data.notes, note))
    return data, ours, untrained


def benchmark_task(
    data: TaskData,
    ours: ModelFeatures,
    untrained: ModelFeatures | None,
    config: BenchmarkConfig,
    manifest: Mapping[str, Any],
    finetuned: ScoredModel | None = None,
) -> tuple[Report, dict[str, np.ndarray]]:
    """Fit probe and baselines, and score every model on the test set.

    Args:
        data: the task.
        ours: features of the model; closed afterwards.
        untrained: features of the same architecture with random weights, or None; closed afterwards.
        config: preset, probe, epochs, seeds, baselines, limit, resamples and device; out_dir keeps finished rows.
        manifest: the report's provenance.
        finetuned: a fine-tuned model's scores under `config.resamples` replicates, for the first row.

    Returns:
        The report, and test predictions of every row by its name.
    """
    task, probe, seeds = data.task, resolve_probe(config, data.task), tuple(config.seeds)
    device, wide, rows = resolve_device(config.device), config.preset == "flip2021", Path(config.out_dir) / "rows"
    counts_RP = sample_counts(int(number_proteins(data).max()) + 1, config.resamples)
    targets, models = ProbeTargets.from_task(data), [] if finetuned is None else [finetuned]

    def add(
        name: str,
        kind: str,
        note: str,
        settings: dict[str, Any],
        key: Any,
        fit: Callable[[], tuple[Fitted, str]],
    ) -> None:
        decides = {"data": data.sha256, "row": name, "settings": settings, "key": key}
        fitted, own_note = finished(rows, name, decides, fit)
        scores = score_fitted(fitted, data, counts_RP)
        models.append(ScoredModel(name, kind, own_note or note, settings, fitted, scores))
        logger.info("%s: %s", name, format_score(task.metric, scores[task.metric]))

    for source, kind in ((ours, "probe"), (untrained, "untrained")):
        if source is not None:
            note = f"{probe.probe} on layer {source.attributes.get('layer', '?')} of {source.name}"
            settings = asdict(probe) | {"seeds": list(seeds)}
            with closing(source.features):

                def fit_source(source: ModelFeatures = source) -> tuple[Fitted, str]:
                    return fit_probe(source.features, targets, probe, seeds, device), ""

                name = f"{source.name}, {probe.probe}"
                add(name, kind, f"{note}; {SOURCES[config.preset]}", settings, read_file_key(source.path), fit_source)
    for name in choose_baselines(config, data):

        def fit(name: str = name) -> tuple[Fitted, str]:
            made = fit_baseline(name, data, seeds, wide)
            return made.fitted, made.note

        add(name, "baseline", "", {"seeds": list(seeds), "wide_cnn": wide}, None, fit)

    first, scores = models[0], {model.name: model.scores for model in models}
    light = task.splits[data.split].light if task.name in TASKS and data.split in task.splits else None
    published = [entry for entry in PUBLISHED if (entry.task, entry.split) == (task.name, data.split)]
    report = Report(
        schema=SCHEMA,
        task=TaskSummary(
            name=task.name, level=task.level, target=task.target, split=data.split, metric=task.metric, unit=task.unit,
            labels=task.labels, num_bits=len(task.binary_labels), traffic_light=light, licence=task.licence,
            citation=task.citation, official=data.official, sizes=data.sizes,
            scored_test=len(data.target_rows("test")),
        ),
        model=ModelSummary(ours.name, {"path": str(ours.path), **ours.attributes}),
        settings=Settings(
            config.preset, SOURCES[config.preset], asdict(probe), config.seeds, config.limit, config.resamples
        ),
        rows=[model.row(data, seeds) for model in models],
        comparisons=compare_rows(first.name, scores.pop(first.name), scores, task.metric),
        published=published if data.official else [],
        notes=_notes(config, data, probe, models),
        files={"predictions": "predictions.npz"},
        provenance=manifest,
    )  # fmt: skip
    return report, {model.name: model.fitted.test_SM for model in models}


def _notes(config: BenchmarkConfig, data: TaskData, probe: ProbeConfig, models: list[ScoredModel]) -> list[str]:
    frozen, finetuned = (
        {model.name: model.scores for model in models if (model.kind == "finetuned") == chosen}
        for chosen in (False, True)
    )
    notes = [*data.notes, *build_interval_notes(frozen)]
    if config.untrained and config.model is None:
        notes.append(
            "no untrained rival: name the model that made the embeddings to have it probed with random weights"
        )
    if len(config.seeds) > 1 and probe.probe in HEADS:
        notes.append("seeds differ in initial weights and dropout; the order of batches is the same for all")
    return notes + build_interval_notes(finetuned)
