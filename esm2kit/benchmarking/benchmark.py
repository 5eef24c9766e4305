"""Benchmark embeddings on a labelled task: probe, untrained model and baselines, with confidence intervals."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.benchmarking.baselines.fit import list_baselines, name_baseline_inputs
from esm2kit.benchmarking.compare import ReportComparison, write_comparison
from esm2kit.benchmarking.config import ATTENTION, BenchmarkConfig, parse_layers
from esm2kit.benchmarking.cross_validation import TABLE_FILE, CrossValidation
from esm2kit.benchmarking.hold_out import HoldOut
from esm2kit.benchmarking.layer_sweep import close_candidates, load_candidates, sweep_layers, use_candidate
from esm2kit.benchmarking.model_features import (
    ModelFeatures,
    describe_inputs,
    drop_missing,
    embed_task,
    find_place,
    read_features,
    records_inputs,
)
from esm2kit.benchmarking.output import (
    format_folder_name,
    load_or_fit,
    move_earlier_report,
    read_file_key,
    write_report,
)
from esm2kit.benchmarking.pair_features import check_pair_options, combine_features, list_proteins, score_by_shared
from esm2kit.benchmarking.probes.config import SOURCES, ProbeConfig, preset_config
from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.benchmarking.probes.fit import check_probe, resolve_probe_device
from esm2kit.benchmarking.probes.heads import HEADS, reads_residues
from esm2kit.benchmarking.report import (
    SCHEMA,
    ModelSummary,
    Report,
    ReportRow,
    Settings,
    TaskSummary,
    compare_rows,
)
from esm2kit.benchmarking.saved_probe import FOLDER as PROBES
from esm2kit.benchmarking.saved_probe import name_probe_file, read_probe_digest, save_probe
from esm2kit.benchmarking.scores import ScoredModel, build_interval_notes, format_score
from esm2kit.benchmarking.uncertainty import keep_first_seed
from esm2kit.benchmarking.verdict import evaluate, log_verdict
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import check_output_folder, sha256_file
from esm2kit.core.hardware import explain_out_of_memory
from esm2kit.core.paths import portable_name
from esm2kit.core.provenance import build_provenance
from esm2kit.tasks.data import format_column_names, load_pooled_task, load_task_of
from esm2kit.tasks.download import download_flip, list_downloadable_tasks
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.pairs import SHARED, count_shared
from esm2kit.tasks.published import PUBLISHED
from esm2kit.tasks.split_file import SPLIT_FILE, write_split
from esm2kit.tasks.tables import format_column_name
from esm2kit.tasks.task import Task
from esm2kit.tasks.task_data import TaskData

logger = logging.getLogger(__name__)

UNTRAINED_SEED = 0


def benchmark(config: BenchmarkConfig) -> Report | ReportComparison:
    """Score embeddings on one task or several.

    Every finished row is saved in `<out_dir>/rows`, so an interrupted run resumes from there.

    Args:
        config: The embeddings or the model, the tasks and the probe.

    Returns:
        The report of the task, or the comparison of the reports for several tasks.

    Raises:
        InputError: The input or the configuration is not valid, or at least one of several tasks failed.
    """
    check_type(config, BenchmarkConfig, "config")
    embedded = config.embeddings or config.hiddens or config.model or "embeddings"
    out_dir = Path(config.out_dir or Path("benchmark") / format_folder_name(embedded))
    check_output_folder(out_dir)
    together = config.joint or config.target_type == "multilabel"
    if config.tasks is None and (len(config.target or []) < 2 or together):
        name, suffix = Path(config.task).stem, config.split or ""
        if config.labels is not None:
            name, suffix = config.labels.stem, format_column_names(config.target) if config.target else ""
        folder = portable_name(f"{name}_{suffix}".rstrip("_"))
        return _run_task(config if config.out_dir else replace(config, out_dir=out_dir / folder))
    runs = _list_runs(config, out_dir)
    reports, failed = [], {}
    for number, (name, run) in enumerate(runs.items(), 1):
        logger.info("task %d of %d: %s", number, len(runs), name)
        try:
            reports.append(_run_task(run))
        except InputError as error:
            failed[name] = error
            logger.warning("%s: %s", name, error)
    errors = "; ".join(f"{name}: {error}" for name, error in failed.items())
    if not reports:
        raise InputError(errors, code="benchmark.some-failed", failed=failed, done=0)
    result: Report | ReportComparison = reports[0]
    if len(reports) > 1:
        files = [path for report in reports for path in report.paths]
        result = replace(write_comparison(reports, out_dir), report_files=files)
    if failed:
        raise InputError(
            f"{len(reports)} of {len(runs)} tasks finished ({result.html}); failed: {errors}",
            code="benchmark.some-failed",
            failed=failed,
            done=len(reports),
        )
    return result


def _list_runs(config: BenchmarkConfig, out_dir: Path) -> dict[str, BenchmarkConfig]:
    """List the runs for several tasks, or for several targets of one task.

    Returns:
        Name of the task or target -> configuration.

    Raises:
        InputError: A split is combined with several tasks, or two runs would share a folder.
    """
    if config.tasks is None:
        folders = {target: portable_name(format_column_name(target)) for target in config.target}
        runs = {name: replace(config, target=name, out_dir=out_dir / folder) for name, folder in folders.items()}
    elif config.labels is not None or len(config.target or []) > 1:
        raise InputError(
            f"tasks {config.tasks!r} cannot be combined with labels or several targets: use one of them",
            code="benchmark.tasks-and-labels",
            tasks=config.tasks,
        )
    elif config.split is not None:
        raise InputError(
            f"split {config.split!r} cannot be combined with tasks: use task for a single task, or omit split",
            code="benchmark.split",
            split=config.split,
        )
    else:
        every = config.tasks.strip() == "all"
        names = list_downloadable_tasks(Path(config.data_dir)) if every else config.tasks.split(",")
        folders = {name.strip(): portable_name(Path(name.strip()).stem) for name in names}
        runs = {
            name: replace(config, task=name, tasks=None, out_dir=out_dir / folder) for name, folder in folders.items()
        }
    if len({folder.casefold() for folder in folders.values()}) < len(folders):  # macOS and Windows ignore the case
        raise InputError(
            f"{', '.join(map(repr, folders))}: two of them have the same name and would share a folder. Run them "
            "separately.",
            code="benchmark.same-name",
            tasks=list(folders),
        )
    return runs


def _run_task(config: BenchmarkConfig) -> Report:
    """Load one task, compute its features, score all models and write the report."""
    start = time.perf_counter()
    if config.labels is None and config.download and config.task in TASKS:
        download_flip(config.task, Path(config.data_dir), split=config.split)
    data = loaded = load_task_of(config) if config.folds is None else load_pooled_task(config, config.fold_columns)
    if data.pairs is not None:
        check_pair_options(resolve_probe(config, data.task).probe, config.pooling or (), config.allow_missing)
        data = replace(data, pairs=replace(data.pairs, features=config.pair_features))
    if config.limit is not None:
        data = data.limit_proteins(config.limit, config.seed)
    choose_baselines(config, data)  # reports an unknown name before embedding
    used, sweep, embedded = config, None, None
    if config.folds is not None:
        return _run_folds(config, data, start)
    if config.sweeps:
        used, embedded, sweep = sweep_layers(config, data, resolve_probe(config, data.task))
    data, trained, untrained = load_task_features(used, data, embedded)
    inputs: dict[str, Path | str] = {f"task/{name}": path for name, path in data.files.items()}
    inputs |= {"data": data.sha256, "embeddings": sha256_file(trained.path)}
    manifest = build_provenance("benchmark", config, inputs)
    report, predictions = benchmark_task(data, trained, untrained, used, manifest)
    report = replace(report, layer_sweep=sweep)
    move_earlier_report(Path(config.out_dir), report)
    report = write_report(report, data, predictions, Path(config.out_dir))
    write_split(loaded, Path(config.out_dir))
    _log_end(config, report, start)
    return report


def _run_folds(config: BenchmarkConfig, data: TaskData, start: float) -> Report:
    """Compute the features of a task, score all models by cross-validation and write the report."""
    used, embedded, folds = config, None, None
    if data.pairs is not None:  # pairs that cannot be divided are refused before their proteins are embedded
        folds = CrossValidation.from_config(config, data)
    if config.sweeps:
        folds = folds or CrossValidation.from_config(config, data)
        candidates = load_candidates(config, data, resolve_probe(config, data.task))
        try:
            rows = Path(config.out_dir) / "rows"
            folds = folds.sweep(candidates, tuple(config.seeds), resolve_probe_device(config.device), rows)
        finally:
            close_candidates(candidates)
        best = candidates[folds.most_chosen]
        used, embedded = use_candidate(config, best), best.source.path
    data, trained, untrained = load_task_features(used, data, embedded)
    folds = folds or CrossValidation.from_config(config, data)
    inputs: dict[str, Path | str] = {f"task/{name}": path for name, path in data.files.items()}
    inputs |= {"data": folds.data.sha256, "folds": folds.fingerprint, "embeddings": sha256_file(trained.path)}
    manifest = build_provenance("benchmark", config, inputs)
    report, predictions = benchmark_task(folds.data, trained, untrained, used, manifest, folds=folds)
    table = folds.format_table(predictions)
    report = replace(report, folds=folds.summarise(table))
    move_earlier_report(Path(config.out_dir), report)
    report = write_report(report, folds.data, predictions, Path(config.out_dir), folds.arrays, table)
    _log_end(config, report, start)
    return report


def _log_end(config: BenchmarkConfig, report: Report, start: float) -> None:
    """Log the duration, the size of the embeddings and the verdict."""
    cached = sorted((Path(config.out_dir) / "embeddings").rglob("*.h5"))
    megabytes = sum(path.stat().st_size for path in cached) / 1e6
    kept = f"; the embeddings ({megabytes:,.1f} MB) are kept in {cached[0].parents[1]}" if cached else ""
    name, seconds = report.task.name, time.perf_counter() - start
    logger.info("%s, split %s: finished in %.0f s%s", name, report.task.split, seconds, kept)
    log_verdict(report.verdict, report.warnings)


def resolve_probe(config: BenchmarkConfig, task: Task) -> ProbeConfig:
    """Return the preset's probe settings for a task, with the user's probe and epochs if they are set.

    Attention is trained with the FNN. Next to it, the FNN reads the other poolings too, so that only they differ.

    Args:
        config: Preset, probe, pooling and epochs.
        task: The task to probe.

    Returns:
        The resolved settings.

    Raises:
        InputError: The probe or the pooling does not fit the task.
    """
    if config.pooling and task.level == "residue":
        raise InputError(
            f"task {task.name} has one target per residue, so its vectors are not pooled. Omit pooling.",
            code="pooling.residue-task",
            task=task.name,
        )
    name = config.probe
    if ATTENTION in (config.pooling or ()):
        name = "attention" if len(config.pooling) == 1 else "fnn"
    probe = preset_config(config.preset, task, name)
    check_probe(probe.probe, task)
    return probe if config.epochs is None else replace(probe, epochs=config.epochs)


def choose_baselines(config: BenchmarkConfig, data: TaskData) -> tuple[str, ...]:
    """Return the names of the baselines to fit.

    Args:
        config: The requested baselines, or None for all.
        data: The task.

    Returns:
        Names in the order of the report.

    Raises:
        InputError: The task has no baseline of a requested name.
    """
    known = list_baselines(data)
    chosen = known if config.baselines is None else tuple(config.baselines)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(
            f"task {data.task.name} has no baseline {unknown[0]!r}: choose from {', '.join(known)}",
            code="baseline.unknown",
            name=unknown[0],
            allowed=known,
        )
    return chosen


def load_task_features(
    config: BenchmarkConfig, data: TaskData, embedded: Path | None = None
) -> tuple[TaskData, ModelFeatures, ModelFeatures | None]:
    """Load the features of the trained and the untrained model; embed the proteins if no file is specified.

    The features of a task of pairs are those of both proteins combined.

    Args:
        config: model, embeddings or hiddens, repr_layer (one), pooling (one), untrained, allow_missing, device and
            out_dir.
        data: The task.
        embedded: Vectors of the model that were computed for this task.

    Returns:
        The task without proteins that have no embedding, the features of the trained model, and those of the
        untrained model (None if it was not requested).

    Raises:
        InputError: Neither a model nor a file is specified, or the file has the wrong level or lacks proteins.
    """
    if data.pairs is not None:
        proteins, *sources = load_task_features(config, list_proteins(data), embedded)
        combined = (each and each._replace(features=combine_features(each.features, data)) for each in sources)
        return (replace(data, notes=proteins.notes), *combined)
    probe = resolve_probe(config, data.task)
    per_residue = data.task.level == "residue" or reads_residues(probe.probe)
    given = config.hiddens if per_residue else config.embeddings
    other = config.embeddings if per_residue else config.hiddens
    if given is None and other is not None:
        kind = "hiddens (one vector per residue)" if per_residue else "embeddings (one vector per protein)"
        raise InputError(
            f"{other}: task {data.task.name} with probe {probe.probe} requires {kind}; pass a file of that kind",
            code="embeddings.level",
            path=other,
            probe=probe.probe,
            expected="residue" if per_residue else "protein",
        )
    if given is None and config.model is None:
        raise InputError(
            "no embeddings to score: specify model, embeddings (one vector per protein) or hiddens (per residue)",
            code="benchmark.no-source",
        )
    if given is not None:
        data = drop_missing(data, Path(given), config.allow_missing)

    place = (parse_layers(config.repr_layer), ["none"] if per_residue else config.pooling or ["mean"])

    def embed(layers: list[int], poolings: list[str], untrained_seed: int | None = None) -> Path:
        out_dir = Path(config.out_dir)
        (path,) = embed_task(data, config.model, layers, poolings, out_dir, config.device, untrained_seed).values()
        return path

    path = Path(given) if given is not None else embedded or embed(*place)
    trained = read_features(path, data, per_residue)
    untrained = None
    if config.untrained and config.model is not None:
        place = place if given is None else find_place(trained, config.model) or place
        untrained = read_features(embed(*place, UNTRAINED_SEED), data, per_residue)
        untrained = untrained._replace(name=f"untrained {untrained.name.removesuffix('_untrained')}")
        found, expected = untrained.features.width, trained.features.width
        if found != expected:
            note = f"{untrained.name} has vectors of {found} dimensions, but the embeddings have {expected}"
            note += ": set model to the model that computed the embeddings."
            data = replace(data, notes=(*data.notes, note))
    return data, trained, untrained


def benchmark_task(
    data: TaskData,
    trained: ModelFeatures,
    untrained: ModelFeatures | None,
    config: BenchmarkConfig,
    manifest: Mapping[str, Any],
    finetuned: ScoredModel | None = None,
    folds: CrossValidation | None = None,
) -> tuple[Report, dict[str, np.ndarray]]:
    """Fit the probe and the baselines, and score every model on the test set, or by cross-validation.

    Args:
        data: The task, with its sets, or with all proteins in test.
        trained: Features of the trained model. They are closed after use.
        untrained: Features of the same architecture with random weights, or None. They are closed after use.
        config: preset, probe, epochs, seeds, baselines, limit, resamples and device. Finished rows go to out_dir.
        manifest: Provenance for the report.
        finetuned: Scores of a fine-tuned model with `config.resamples` bootstrap replicates, for the first row.
        folds: The folds, in each of which all models are fitted. None fits them on the sets of the task.

    Returns:
        The report, and the test predictions of every row by its name.
    """
    task, probe, seeds = data.task, resolve_probe(config, data.task), tuple(config.seeds)
    wide, rows = config.preset == "flip2021", Path(config.out_dir) / "rows"
    device = resolve_probe_device(config.device)
    held = folds or HoldOut(data)
    counts_RP = held.sample_counts(config.resamples)
    models = [] if finetuned is None else [finetuned]

    def add(
        name: str,
        kind: str,
        note: str,
        settings: dict[str, Any],
        key: Any,
        fit: Callable[[], tuple[Fitted, str]],
        describe: Callable[[], dict[str, Any]] | None,
    ) -> None:
        inputs = {"data": data.sha256, "row": name, "settings": settings, "key": key}
        inputs |= {"folds": folds.fingerprint} if folds else {}
        # each fold has chosen its own candidate; the other inputs are those of the one that most folds chose
        inputs |= {"candidates": folds.candidate_keys} if folds and folds.swept and kind == "probe" else {}
        path = Path(config.out_dir) / PROBES / name_probe_file(name)

        def save(digest: str, fitted: Fitted) -> None:
            if describe is not None:
                save_probe(path, name, digest, fitted, held.labelled, describe(), held.get_held_out(fitted))

        def is_saved(digest: str) -> bool:
            return describe is None or read_probe_digest(path) == digest

        with explain_out_of_memory(f"fitting the row {name}", lambda: list_probe_remedies(data, device)):
            fitted, own_note = load_or_fit(rows, name, inputs, fit, is_saved, save)
        fitted = held.complete(fitted)
        scores = held.score(fitted, counts_RP)
        saved = "" if describe is None else f"{PROBES}/{path.name}"
        validation, parts = held.score_validation(fitted), held.score_each_fold(fitted)
        found = ScoredModel(
            name, kind, own_note or note, settings, fitted, scores, saved, validation, parts, held.repeats
        )
        models.append(found)
        logger.info("%s: %s", name, format_score(task.metric, scores[task.metric]))

    pair_inputs = {} if data.pairs is None else {"pair_features": data.pairs.features}
    for source, kind in ((trained, "probe"), (untrained, "untrained")):
        if source is not None:
            pooled = source.attributes.get("pooling", "mean")
            pooled = "" if pooled in ("mean", "none") else f", pooling {pooled},"
            note = f"{probe.probe} on layer {source.attributes.get('layer', '?')}{pooled} of {source.name}"
            settings = asdict(probe) | {"seeds": list(seeds)}
            with closing(source.features):

                def fit_source(source: ModelFeatures = source, kind: str = kind) -> tuple[Fitted, str]:
                    is_saved = records_inputs(source)
                    return held.fit_source(kind, source.features, probe, seeds, device, is_saved), ""

                def describe_source(source: ModelFeatures = source) -> dict[str, Any]:
                    found = describe_inputs(source, None if config.embeddings or config.hiddens else config.model)
                    return found | pair_inputs

                name, key = f"{source.name}, {probe.probe}", read_file_key(source.path)
                describe = describe_source if records_inputs(source) else None
                add(name, kind, f"{note}; {SOURCES[config.preset]}", settings, key, fit_source, describe)
    for name in choose_baselines(config, data):
        reads = name_baseline_inputs(name, task.level)

        def fit(name: str = name, is_saved: bool = reads is not None) -> tuple[Fitted, str]:
            baseline = held.fit_baseline(name, seeds, wide, is_saved)
            return baseline.fitted, baseline.note

        describe = None if reads is None else partial(dict, kind=reads, **pair_inputs)
        add(name, "baseline", "", {"seeds": list(seeds), "wide_cnn": wide}, None, fit, describe)

    verdict = evaluate(data, models[0], held.score_constant(counts_RP), models[1:])
    first, scores = models[0], {model.name: model.scores for model in models}
    is_flip = TASKS.get(task.name) == task  # and not a task of one's own with the same name
    light = task.splits[data.split].light if is_flip and data.split in task.splits else None
    published = [entry for entry in PUBLISHED if (entry.task, entry.split) == (task.name, data.split)]
    report = Report(
        schema=SCHEMA,
        task=TaskSummary(
            name=task.name, level=task.level, target=task.target, split=data.split, metric=task.metric, unit=task.unit,
            labels=task.labels, num_bits=len(task.binary_labels), traffic_light=light, licence=task.licence,
            citation=task.citation, official=data.official, sizes=data.sizes,
            scored_test=len(data.target_rows("test")),
            binary_labels=task.binary_labels if task.is_multilabel else (), columns=task.columns,
            spreads=held.several.spreads, **_describe_pairs(data),
        ),
        model=ModelSummary(trained.name, {"path": str(trained.path), **trained.attributes}),
        settings=Settings(
            config.preset, SOURCES[config.preset], asdict(probe), config.seeds, config.limit, config.resamples,
            config.folds, config.repeats, config.group_by,
        ),
        rows=[_build_row(model, held, data, seeds, counts_RP, config.coverage) for model in models],
        comparisons=compare_rows(first.name, scores.pop(first.name), scores, task.metric),
        published=published if data.official else [],
        notes=_build_notes(config, data, probe, models),
        files={"predictions": "predictions.npz"} | ({"split": SPLIT_FILE} if data.split_method else {})
        | ({"table": TABLE_FILE} if folds else {}),
        provenance=manifest,
        verdict=verdict.sentence,
        warnings=verdict.warnings,
    )  # fmt: skip
    return report, {model.name: model.fitted.test_SM for model in models}


def _build_row(
    model: ScoredModel,
    held: HoldOut | CrossValidation,
    data: TaskData,
    seeds: Sequence[int],
    counts_RP: np.ndarray,
    coverage: float,
) -> ReportRow:
    """Build the row of a model with its uncertainty, that of the first seed for a fine-tuned model."""
    fitted = keep_first_seed(model.fitted) if model.kind == "finetuned" else model.fitted
    uncertainty = held.describe_uncertainty(fitted, counts_RP, coverage)
    by_shared = {} if data.pairs is None or model.folds else score_by_shared(model.fitted, data, len(counts_RP))
    return replace(model.to_row(data, seeds), uncertainty=uncertainty, by_shared=by_shared)


def _describe_pairs(data: TaskData) -> dict[str, Any]:
    """Return the fields of a TaskSummary about pairs of proteins."""
    if data.pairs is None:
        return {}
    shared_T, has_train = count_shared(data.pairs, data.sets)[data.sets == "test"], bool((data.sets == "train").any())
    counts = {str(number): int((shared_T == number).sum()) for number in SHARED} if has_train else {}  # none in folds
    return {"pair_features": data.pairs.features, "shared_test": counts, "grouping": data.pairs.grouping}


def list_probe_remedies(data: TaskData, device: str) -> list[str]:
    """List the settings with which a probe needs less memory."""
    most = max(data.sizes.values())
    remedies = ["--device cpu"] if device != "cpu" else []
    return [*remedies, f"--limit {most // 2} (the largest set has {most} proteins)", "--seeds 0 (a single seed)"]


def _build_notes(config: BenchmarkConfig, data: TaskData, probe: ProbeConfig, models: list[ScoredModel]) -> list[str]:
    """Return what a reader of the scores must know, as sentences."""
    frozen = {model.name: model.scores for model in models if model.kind != "finetuned"}
    finetuned = {model.name: model.scores for model in models if model.kind == "finetuned"}
    resampled = "test proteins" if data.pairs is None else "test pairs"
    resampled = resampled if config.folds is None else "groups of proteins"
    notes = [*data.notes, *build_interval_notes(frozen, resampled)]
    if config.untrained and config.model is None:
        notes.append(
            "No untrained model was probed: set model to the model that computed the embeddings to add this comparison."
        )
    if len(config.seeds) > 1 and probe.probe in HEADS:
        notes.append("Seeds differ in initial weights and dropout. All seeds share one batch order.")
    return notes + build_interval_notes(finetuned, resampled)
