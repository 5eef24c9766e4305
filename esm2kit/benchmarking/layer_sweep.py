"""Choose the layer and the pooling on validation: one pass of the model for all of them, and one probe for each."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.benchmarking.config import ATTENTION, BenchmarkConfig, parse_layers
from esm2kit.benchmarking.model_features import ModelFeatures, embed_task, read_features, stored_dtype
from esm2kit.benchmarking.output import load_or_fit, read_file_key
from esm2kit.benchmarking.pair_features import combine_features, list_proteins
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, Fitted, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_fnns, fit_probe, resolve_probe_device
from esm2kit.benchmarking.probes.heads import reads_residues
from esm2kit.benchmarking.report import format_value, metric_name
from esm2kit.benchmarking.scores import format_score, sample_test_counts, score_fitted
from esm2kit.benchmarking.sweep_summary import LayerSweep, SweepPoint, describe_place
from esm2kit.core.errors import InputError
from esm2kit.core.hardware import explain_out_of_memory, resolve_device
from esm2kit.core.numbers import format_count
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.cost import estimate_cost
from esm2kit.models.config import ESM2Config
from esm2kit.models.load import find_model
from esm2kit.sequences.windows import Windowing
from esm2kit.tasks.metrics import LOWER_IS_BETTER, Score, compute_paired_difference, nan_to_none
from esm2kit.tasks.task_data import TaskData

logger = logging.getLogger(__name__)

BYTES_TOGETHER = 1 << 30  # vectors of layers whose FNNs are trained together


class Candidate(NamedTuple):
    """One layer with one pooling.

    Args:
        layer: Number of the layer.
        pooling: See `SweepPoint.pooling`.
        source: The vectors, in the order of the task's proteins; for pairs, in the order of `list_proteins`.
        probe: The probe that reads them.
    """

    layer: int
    pooling: str
    source: ModelFeatures
    probe: ProbeConfig


class Choice(NamedTuple):
    """The candidate with the best validation score.

    Args:
        index: Place of the candidate.
        summary: The scores of all candidates.
    """

    index: int
    summary: LayerSweep


class Selection(NamedTuple):
    """The result of a sweep.

    Args:
        config: The configuration with the chosen layer, pooling and probe.
        path: File with the chosen vectors.
        summary: The scores of all layers and poolings.
    """

    config: BenchmarkConfig
    path: Path
    summary: LayerSweep


def sweep_layers(config: BenchmarkConfig, data: TaskData, probe: ProbeConfig) -> Selection:
    """Embed the proteins of a task with all requested layers and poolings, and choose on validation.

    Args:
        config: model, repr_layer, pooling, seeds, resamples, device and out_dir. Finished probes go to out_dir.
        data: The task.
        probe: The probe of all poolings but attention, which is trained with a neural probe.

    Returns:
        The choice.

    Raises:
        InputError: The model has no such layer, or no score is defined.
    """
    candidates = load_candidates(config, data, probe)
    device = resolve_probe_device(config.device)
    rows = Path(config.out_dir) / "rows"
    try:
        choice = choose_features(candidates, data, tuple(config.seeds), device, config.resamples, rows)
    finally:
        close_candidates(candidates)
    best = candidates[choice.index]
    logger.info("%s", choice.summary.sentence)
    return Selection(use_candidate(config, best), best.source.path, choice.summary)


def use_candidate(config: BenchmarkConfig, candidate: Candidate) -> BenchmarkConfig:
    """Return the configuration with the layer, the pooling and the probe of a candidate."""
    pooling = None if candidate.pooling == "none" else [candidate.pooling]
    return replace(config, repr_layer=candidate.layer, pooling=pooling, probe=candidate.probe.probe)


def load_candidates(config: BenchmarkConfig, data: TaskData, probe: ProbeConfig) -> list[Candidate]:
    """Embed the proteins of a task in one pass of the model, and open the vectors of each layer and pooling.

    Args:
        config: model, repr_layer, pooling, device and out_dir.
        data: The task.
        probe: The probe of all poolings but attention.

    Returns:
        The candidates, layer by layer. `close_candidates` closes their files.

    Raises:
        InputError: The model has no such layer.
    """
    model = find_model(config.model).config
    layers = parse_layers(config.repr_layer)
    layers = list(range(model.num_layers + 1)) if layers is None else model.resolve_layers(layers)
    if len(set(layers)) < len(layers):
        raise InputError(
            f"repr_layer {config.repr_layer} has a layer twice: the model has layers 0 to {model.num_layers}. Remove "
            "one.",
            code="embed.layer-twice",
            found=config.repr_layer,
        )
    reads = data.task.level == "residue" or reads_residues(probe.probe)
    poolings = ["none"] if reads else config.pooling or ["mean"]
    stored = [*(name for name in poolings if name not in (ATTENTION, "none"))]
    stored += ["none"] if len(stored) < len(poolings) else []
    logger.info("%s", describe_cost(config, data, model, layers, poolings, stored))
    proteins = data if data.pairs is None else list_proteins(data)
    paths = embed_task(proteins, config.model, layers, stored, Path(config.out_dir), config.device)
    candidates = []
    for layer in layers:
        for pooling in poolings:
            path = paths[layer, "none" if pooling == ATTENTION else pooling]
            source = read_features(path, proteins, pooling in (ATTENTION, "none"), loads=False)
            own = replace(probe, probe="attention") if pooling == ATTENTION else probe
            candidates.append(Candidate(layer, pooling, source, own))
    return candidates


def describe_cost(
    config: BenchmarkConfig,
    data: TaskData,
    model: ESM2Config,
    layers: Sequence[int],
    poolings: Sequence[str],
    stored: Sequence[str],
) -> str:
    """Describe what a sweep will take: time and bytes of the pass of the model, and the number of probes.

    Args:
        config: device, and untrained, which adds a pass for the chosen layer.
        data: The task.
        model: Architecture of the model.
        layers: The layers.
        poolings: The poolings.
        stored: What is saved, as for `embed_task`.

    Returns:
        One line.
    """
    proteins = data if data.pairs is None else list_proteins(data)
    num_residues = [len(sequence) for sequence in dict(zip(proteins.ids, proteins.sequences, strict=True)).values()]
    windows = {field.name: field.default for field in fields(EmbedConfig)}
    windowing = Windowing(windows["max_residues"], windows["window_overlap"], 0)
    device = resolve_device(config.device)
    cost = estimate_cost(model, num_residues, len(layers), stored, stored_dtype(stored), device, windowing)
    untrained = "; the untrained model takes as long again, for the chosen layer only" if config.untrained else ""
    several = f" and {len(poolings)} poolings" if len(poolings) > 1 else ""
    return (
        f"{format_count(len(layers), 'layer')}{several} of {len(num_residues):,} proteins "
        f"({sum(num_residues):,} residues): one pass of the model, {cost}, then "
        f"{format_count(len(layers) * len(poolings), 'probe')}{untrained}"
    )


def close_candidates(candidates: Sequence[Candidate]) -> None:
    """Close the files of candidates."""
    for candidate in candidates:
        candidate.source.features.close()


def choose_features(
    candidates: Sequence[Candidate],
    data: TaskData,
    seeds: tuple[int, ...] = (0,),
    device: str = "cpu",
    resamples: int = 1000,
    rows: Path | None = None,
) -> Choice:
    """Choose the candidate whose probe, fitted on train, has the best score on validation; test has no part in it.

    Args:
        candidates: The layers and poolings, with vectors in the order of the task's proteins.
        data: The task. Its sets may differ between calls, as in nested cross-validation.
        seeds: Seeds of neural probes.
        device: Device of neural probes.
        resamples: Bootstrap replicates of the intervals.
        rows: Folder of finished probes, from which an interrupted call resumes. None keeps none.

    Returns:
        The choice; of equal scores, the candidate that comes first.

    Raises:
        InputError: No candidate has a defined score on validation.
    """
    counts_RP = sample_test_counts(data, resamples, "validation")
    scores = []
    fits = _Fits(candidates, data, seeds, device)
    for number, candidate in enumerate(candidates):
        place = describe_place(candidate.layer, candidate.pooling)
        remedies = ["fewer layers (--repr_layer)", "--device cpu", "--limit", "--seeds 0 (a single seed)"]
        with explain_out_of_memory(f"fitting the probe on {place}", lambda names=remedies: names):
            fit = partial(fits.fit, number)
            fitted = fit()[0] if rows is None else load_or_fit(rows, *_identify(candidate, data, seeds), fit)[0]
        scores.append(score_fitted(fitted, data, counts_RP, "validation"))
        found = format_score(data.task.metric, scores[-1][data.task.metric])
        logger.info("%d of %d: %s: validation %s", number + 1, len(candidates), place, found)
    return _choose(candidates, scores, data)


def _identify(candidate: Candidate, data: TaskData, seeds: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """Return the name of a finished probe, and everything that determines it."""
    name = f"{candidate.source.name}, {describe_place(candidate.layer, candidate.pooling)}, {candidate.probe.probe}"
    settings = asdict(candidate.probe) | {"seeds": list(seeds)}
    inputs = {"data": data.sha256, "row": name, "settings": settings, "key": read_file_key(candidate.source.path)}
    return f"validation of {name}", inputs


class _Fits:
    """Fits the probes of candidates, the FNNs of several together.

    Args:
        candidates: The layers and poolings.
        data: The task.
        seeds: Seeds of neural probes.
        device: Device of neural probes.
    """

    def __init__(self, candidates: Sequence[Candidate], data: TaskData, seeds: tuple[int, ...], device: str) -> None:
        self.candidates, self.data, self.seeds, self.device = candidates, data, seeds, device
        self.targets = ProbeTargets.from_task(data)
        self.ready: dict[int, Fitted] = {}

    def fit(self, number: int) -> tuple[Fitted, str]:
        """Fit the probe of a candidate, and keep its predictions of validation only.

        Args:
            number: Place of the candidate.

        Returns:
            The predictions, and an empty note.
        """
        if number not in self.ready:
            places = self._choose_group(number)
            features = [self._load(place) for place in places]
            probe = self.candidates[number].probe
            if len(places) > 1:
                found = fit_fnns(features, self.targets, probe, self.seeds, self.device)
            else:
                found = [fit_probe(features[0], self.targets, probe, self.seeds, self.device)]
            self.ready |= zip(places, found, strict=True)
        fitted = self.ready.pop(number)
        kept = {"parameters": None, "test_logits_MC": None, "validation_logits_MC": None}
        return fitted._replace(test_SM=fitted.test_SM[:, :0], **kept), ""

    def _load(self, place: int) -> Features:
        """Load the features of a candidate, those of pairs combined."""
        features = self.candidates[place].source.features.load()
        return features if self.data.pairs is None else combine_features(features, self.data)

    def _choose_group(self, number: int) -> list[int]:
        """Choose the candidates that are fitted together: this one, and those after it that fit into the memory."""
        first = self.candidates[number]
        if first.probe.probe != "fnn" or self.targets.task.level == "residue":
            return [number]
        width = first.source.features.width
        places = [
            place
            for place, other in enumerate(self.candidates)
            if place >= number and other.probe == first.probe and other.source.features.width == width
        ]
        columns = width if self.data.pairs is None else 3 * width
        most = BYTES_TOGETHER // (4 * columns * len(self.data.ids))
        return places[: max(1, most)]


def _choose(candidates: Sequence[Candidate], scores: Sequence[dict[str, Score]], data: TaskData) -> Choice:
    """Choose by the headline metric, or by RMSE or accuracy if that is undefined for all candidates."""
    spare = "rmse" if data.task.target == "value" else "accuracy"
    for metric in filter(scores[0].__contains__, (data.task.metric, spare)):
        values = [score[metric].interval.value for score in scores]
        signed = [-value if metric in LOWER_IS_BETTER else value for value in values]
        if any(map(math.isfinite, signed)):
            break
    else:
        raise InputError(
            f"task {data.task.name}: no layer has a defined score on validation. Choose one layer with --repr_layer.",
            code="sweep.undefined",
            metric=data.task.metric,
        )
    index = int(np.nanargmax(signed))
    points = []
    for candidate, score in zip(candidates, scores, strict=True):
        value, low, high = map(nan_to_none, score[metric].interval)
        difference = compute_paired_difference(metric, scores[index][metric], score[metric])
        is_distinct = bool(difference.low > 0) or value is None
        points.append(
            SweepPoint(candidate.layer, candidate.pooling, candidate.probe.probe, value, low, high, is_distinct)
        )
    num_proteins = scores[index][metric].num_proteins
    noun = "proteins" if data.pairs is None else "pairs"
    sentence = _describe(points, index, metric, num_proteins, noun)
    return Choice(index, LayerSweep(metric, num_proteins, points, index, sentence))


def _describe(points: Sequence[SweepPoint], index: int, metric: str, num_proteins: int, noun: str) -> str:
    """Describe a choice in one sentence, with what cannot be distinguished from it."""
    best = points[index]
    value, low, high = (format_value(metric, end, best.value) for end in (best.value, best.low, best.high))
    between = "" if best.low is None else f" [{low}, {high}]"
    layers = len({point.layer for point in points})
    poolings = len({point.pooling for point in points})
    among = f"{layers} layer{'s' if layers > 1 else ''}" + (f" and {poolings} poolings" if poolings > 1 else "")
    alike = [point for place, point in enumerate(points) if place != index and not point.is_distinct]
    alike.sort(key=lambda point: point.value, reverse=metric not in LOWER_IS_BETTER)
    names = [describe_place(point.layer, point.pooling if poolings > 1 else "none") for point in alike]
    shown = "; ".join([*names[:5], *([f"{len(names) - 5} more"] if names[5:] else [])])
    rest = f"Not distinguishable from it on validation: {shown}" if names else "It is better than all others there"
    chosen = describe_place(best.layer, best.pooling if poolings > 1 else "none").capitalize()
    return (
        f"{chosen} was chosen on validation among {among} ({metric_name(metric)} {value}{between}, {num_proteins:,} "
        f"{noun}). {rest}."
    )
