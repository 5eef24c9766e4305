"""Saved probes: one safetensors file with a fitted probe, its task, and how its inputs are computed.

`<out_dir>/probes/<row>.safetensors` of a benchmark is a checkpoint without an encoder: tensors `probe.*`, and metadata
with the task, the scale of the values, and the inputs of the probe. Inputs are vectors of an encoder (layer, pooling,
data type, windows, and the location and the digest of its weights), letters, or nothing for a constant.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esm2kit.benchmarking.baselines.fit import compute_composition, encode_one_hot
from esm2kit.benchmarking.pair_features import combine_vectors
from esm2kit.benchmarking.probes.features import Features, Fitted
from esm2kit.benchmarking.probes.parameters import ProbeParameters
from esm2kit.benchmarking.uncertainty import Uncertainty, estimate_uncertainty
from esm2kit.core.errors import InputError
from esm2kit.core.hardware import choose_device
from esm2kit.core.processes import local_rank
from esm2kit.embedding.batch import Output, count_columns, embed_batch
from esm2kit.models.checkpoint import read_checkpoint, read_metadata, write_checkpoint
from esm2kit.models.encoder import TOKENS_PER_BATCH, Encoder, Precision
from esm2kit.models.layerwise import load_encoder
from esm2kit.models.load import ModelFile, find_model
from esm2kit.models.sharded import Shard, choose_sharding
from esm2kit.sequences.batching import split_by_tokens
from esm2kit.sequences.windows import Windowing
from esm2kit.tasks.conformal import merge_seeds
from esm2kit.tasks.label_metrics import DEFAULT_THRESHOLD, choose_threshold
from esm2kit.tasks.labels import average_seeds, compute_probabilities, decide_outputs
from esm2kit.tasks.scaling import TargetScale
from esm2kit.tasks.task import PairFeatures, Task, describe_task, read_task
from esm2kit.tasks.task_data import TaskData

logger = logging.getLogger(__name__)

FOLDER = "probes"
# Features that a baseline computes from the letters of a sequence.
LETTER_FEATURES = {"composition": compute_composition, "one_hot": encode_one_hot}


def name_probe_file(row: str) -> str:
    """Return the file name of a row's probe, such as esm2_t6_8M_UR50D-ridge.safetensors."""
    plain = re.sub(r"[^\w.=+-]+", "-", row).strip("-")
    if len(plain) > 120:  # file systems allow 255 bytes
        plain = f"{plain[:100]}-{hashlib.sha256(row.encode()).hexdigest()[:12]}"
    return f"{plain}.safetensors"


def describe_labels(data: TaskData) -> dict[str, Any]:
    """Describe the training labels.

    Args:
        data: The task.

    Returns:
        {"count"} and for values {"mean", "deviation", "quantiles"} with 21 quantiles from the minimum to the maximum,
        for classes {"classes": {label: count}}, for a multi-label task {"labels": {label: count}}. For several values
        {"count", "columns": {name: as for values}}.
    """
    y_N = data.targets[data.target_rows("train")]
    if data.task.is_multilabel:
        counts_L = zip(data.task.binary_labels, y_N.sum(0).tolist(), strict=True)
        return {"count": len(y_N), "labels": dict(counts_L)}
    if data.task.columns:
        columns = {name: _describe_values(y[np.isfinite(y)]) for name, y in zip(data.task.columns, y_N.T, strict=True)}
        return {"count": len(y_N), "columns": columns}
    if data.task.target == "class":
        names = data.task.labels
        counts_K = np.bincount(y_N, minlength=len(names)).tolist()
        return {
            "count": len(y_N),
            "classes": {name: count for name, count in zip(names, counts_K, strict=True) if count},
        }
    return _describe_values(y_N)


def _describe_values(y_N: np.ndarray) -> dict[str, Any]:
    scale = TargetScale.from_values(y_N)
    return {
        "count": len(y_N),
        "mean": scale.centre,
        "deviation": scale.spread,
        "quantiles": [float(value) for value in np.quantile(y_N, np.linspace(0, 1, 21))],
    }


def save_probe(
    path: Path,
    row: str,
    digest: str,
    fitted: Fitted,
    data: TaskData,
    inputs: Mapping[str, Any],
    held_out: tuple[Fitted, TaskData, bool] | None = None,
) -> None:
    """Write the probe of a row atomically.

    Args:
        path: The file.
        row: Name of the row in the report.
        digest: Identifies everything that determines the row.
        fitted: The fitted probe.
        data: The task.
        inputs: How the feature rows are computed: kind (encoder, composition, one_hot or none) and its settings.
        held_out: Predictions from which the uncertainty is estimated, the task with these proteins in validation, and
            whether they are out-of-fold predictions.
            None uses those of `fitted` and `data`.
    """
    parameters, uncertainty = fitted.parameters, estimate_uncertainty(*(held_out or (fitted, data)))
    metadata = {
        "step": 0,
        "probe": {
            "row": row,
            "digest": digest,
            "probe": parameters.probe,
            "hidden": parameters.hidden,
            "seeds": list(parameters.seeds),
            "target_centre": parameters.scale.centre,
            "target_spread": parameters.scale.spread,
            "task": describe_task(data.task),
            "split": data.split,
            "inputs": dict(inputs),
            "training_labels": describe_labels(data),
            "uncertainty": uncertainty and uncertainty.describe(),
        },
    }
    if data.task.is_multilabel:
        metadata["probe"]["threshold"] = _choose_mean_threshold(*(held_out or (fitted, data, False)))
    write_checkpoint(path, {f"probe.{name}": tensor for name, tensor in parameters.tensors.items()}, metadata)


def _choose_mean_threshold(fitted: Fitted, data: TaskData, out_of_fold: bool) -> float:
    """Choose the threshold for the mean probabilities of all seeds, with which a saved probe predicts."""
    if len(fitted.test_SM) == 1 and not out_of_fold:  # each fold has a threshold of its own
        return fitted.thresholds[0]
    return choose_threshold(data.targets[data.target_rows("validation")], fitted.validation_SM.mean(0))


def read_probe_digest(path: Path) -> str | None:
    """Return the digest of the row in a probe's file; None if there is no intact file."""
    try:
        return read_checkpoint(path)[1]["probe"]["digest"] if path.is_file() else None
    except (InputError, KeyError):
        return None


def is_probe(path: Path) -> bool:
    """Whether a safetensors file is a saved probe.

    Args:
        path: The file.

    Returns:
        True or False.

    Raises:
        InputError: The file is damaged or is not of esm2kit.
    """
    return "probe" in read_metadata(path)


@dataclass(frozen=True)
class SavedProbe:
    """A probe for prediction, with the encoder that computes its inputs.

    Args:
        parameters: The fitted probe.
        task: The task.
        facts: Metadata of the file.
        source: The file.
        encoder: The encoder; None for a probe that reads letters.
    """

    parameters: ProbeParameters
    task: Task
    facts: dict[str, Any]
    source: Path
    encoder: Encoder | None = None

    @property
    def scale(self) -> TargetScale:
        """Scale of the values during training."""
        return self.parameters.scale

    @property
    def threshold(self) -> float:
        """Probability above which a label of a multi-label task is predicted."""
        return self.facts.get("threshold", DEFAULT_THRESHOLD)

    @property
    def model_name(self) -> str:
        """Name of the row in the report."""
        return self.facts["row"]

    @property
    def mode(self) -> str:
        """How the model was trained, for the manifest of predictions."""
        return f"probe {self.parameters.probe}"

    @property
    def training_labels(self) -> dict[str, Any]:
        """Description of the training labels, see `describe_labels`."""
        return self.facts["training_labels"]

    @cached_property
    def uncertainty(self) -> Uncertainty | None:
        """What validation says about the predictions; None in files of earlier versions."""
        return Uncertainty.from_description(self.facts.get("uncertainty"))

    @property
    def has_spread(self) -> bool:
        """Whether values are the mean of several seeds, which have a spread."""
        return self.task.target == "value" and len(self.parameters.seeds) > 1

    def outputs(self, sequences: Sequence[str], tokens_per_batch: int | None = None) -> list[np.ndarray]:
        """Compute the outputs; see `outputs_and_spreads`."""
        return [outputs for outputs, _ in self.outputs_and_spreads(sequences, tokens_per_batch)]

    def outputs_and_spreads(
        self, sequences: Sequence[str], tokens_per_batch: int | None = None
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Compute the outputs, values in the unit of the target, and the spread of the seeds.

        The outputs of several seeds are averaged: values, or probabilities of classes and binary labels.

        Args:
            sequences: Amino-acid sequences.
            tokens_per_batch: Tokens per batch of the encoder. It changes the outputs only by rounding.

        Returns:
            For each sequence the outputs, (C,) for a protein task or (residues, C) for a residue task, values in
            float64; and in the same shape the standard deviation of values over seeds, None for a single seed and for
            classes.
        """
        found: list[tuple[np.ndarray, np.ndarray | None]] = [(np.empty(0), None)] * len(sequences)
        budget = tokens_per_batch or TOKENS_PER_BATCH[self.encoder.device.type if self.encoder else "cpu"]
        if self.encoder:
            budget = max(budget, self.encoder.group_tokens)
        for batch in split_by_tokens([len(sequence) + 2 for sequence in sequences], budget):
            rows = self._compute_rows([sequences[place] for place in batch], budget)
            sizes = [len(part) for part in rows]
            merged_NC, spread_NC = self._merge_outputs(self.parameters.outputs(torch.cat(rows), sizes, self.task))
            ends = np.cumsum(sizes)[:-1]
            outputs = self._split(merged_NC, ends)
            spreads = [None] * len(batch) if spread_NC is None else self._split(spread_NC, ends)
            for place, *parts in zip(batch, outputs, spreads, strict=True):
                found[place] = tuple(parts)
        return found

    def _merge_outputs(self, outputs_SNC: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the mean outputs of the seeds (N, C), and the spread of values, None for a single seed and classes."""
        merged_NC = average_seeds(outputs_SNC, self.task).numpy()
        if self.task.target != "value" or len(outputs_SNC) == 1:
            return merged_NC, None
        return merged_NC, merge_seeds(outputs_SNC.flatten(1).numpy())[1].reshape(merged_NC.shape)

    @property
    def pair_features(self) -> PairFeatures | None:
        """How the vectors of two proteins become one, for a probe of pairs; None for one of single proteins."""
        return self.facts["inputs"].get("pair_features")

    def pair_outputs(
        self, pairs: Sequence[tuple[str, str]], tokens_per_batch: int | None = None
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Compute the outputs of pairs, as `outputs_and_spreads` does for proteins. Each protein is embedded once.

        Args:
            pairs: Sequences of both proteins.
            tokens_per_batch: Tokens per batch of the encoder.

        Returns:
            For each pair the outputs (C,), and the spread of values.
        """
        sequences = sorted({sequence for pair in pairs for sequence in pair})
        budget = tokens_per_batch or TOKENS_PER_BATCH[self.encoder.device.type if self.encoder else "cpu"]
        row_of: dict[str, Tensor] = {}
        for batch in split_by_tokens([len(sequence) + 2 for sequence in sequences], budget):
            chosen = [sequences[place] for place in batch]
            row_of |= dict(zip(chosen, self._compute_rows(chosen, budget), strict=True))
        first_ND, second_ND = (torch.cat([row_of[pair[side]] for pair in pairs]) for side in (0, 1))
        combined_NX = combine_vectors(first_ND, second_ND, self.pair_features)
        outputs_SNC = self.parameters.outputs(combined_NX, [1] * len(pairs), self.task)
        merged_NC, spread_NC = self._merge_outputs(outputs_SNC)
        return [(outputs, None if spread_NC is None else spread_NC[row]) for row, outputs in enumerate(merged_NC)]

    def _split(self, values_NC: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
        """Split the rows of a batch into those of each protein."""
        return list(values_NC) if self.task.level == "protein" else np.split(values_NC, ends)

    def _compute_rows(self, sequences: list[str], budget: int) -> list[Tensor]:
        """Compute the feature rows of each protein, (1, D) or (residues, D) float32."""
        inputs = self.facts["inputs"]
        if inputs["kind"] == "encoder":
            columns = count_columns(inputs["pooling"], self.encoder.config.embed_dim)
            output = Output("probe", inputs["layer"], inputs["pooling"], columns)
            window = inputs["max_residues"]
            if inputs["long_proteins"] == "truncate":
                sequences = [sequence[:window] for sequence in sequences]
            windowing = Windowing(window, inputs["window_overlap"], budget)
            (arrays,) = embed_batch(self.encoder, sequences, [output], windowing, inputs["dtype"])
            rows = [torch.from_numpy(array).float() for array in arrays]
            return rows if output.reads == "residues" else [row[None] for row in rows]
        counts = [1 if self.task.level == "protein" else len(sequence) for sequence in sequences]
        if inputs["kind"] == "none":
            return [torch.zeros(count, 1) for count in counts]
        names, nothing = [str(number) for number in range(len(sequences))], np.zeros(sum(counts))
        data = TaskData(self.task, "", names, sequences, np.array([""] * len(names)), nothing, nothing > 0, {})
        features: Features = LETTER_FEATURES[inputs["kind"]](data)
        return list(features.take(np.arange(sum(counts))).split(counts))

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        """Convert outputs (..., C) to classes (int64), values (float64), or labels that are present (int64)."""
        return decide_outputs(outputs, self.task, self.threshold)

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Convert outputs to probabilities (..., C) of classes or binary labels; values are returned unchanged."""
        return compute_probabilities(outputs, self.task, self.uncertainty.divisor if self.uncertainty else 1.0)


def load_probe(
    path: Path,
    base: str | None = None,
    device: str = "cpu",
    precision: Precision = "auto",
    layer_by_layer: bool | None = None,
    shard: Shard = False,
) -> SavedProbe:
    """Load a saved probe and its encoder.

    Args:
        path: The file.
        base: Encoder of the probe. Default: its location during the benchmark.
        device: auto, cpu, cuda or mps, for the encoder.
        precision: Precision of the encoder. auto uses that of the benchmark.
        layer_by_layer: See `load_encoder`.
        shard: See `load_encoder`.

    Returns:
        The probe.

    Raises:
        InputError: The file is damaged or is not a probe, or the encoder does not exist or has other weights.
    """
    tensors, metadata = read_checkpoint(path)
    if "probe" not in metadata:
        raise InputError(
            f"{path} is not a saved probe. `esm2kit benchmark` writes them to {FOLDER}/.",
            code="probe.not-saved",
            path=path,
        )
    facts = metadata["probe"]
    task = read_task(facts["task"])
    scale = TargetScale.from_stored(facts["target_centre"], facts["target_spread"])
    kept = {name.removeprefix("probe."): tensor for name, tensor in tensors.items()}
    parameters = ProbeParameters(facts["probe"], kept, scale, facts["hidden"], tuple(facts["seeds"]))
    parameters.check(task, path)
    inputs, encoder = facts["inputs"], None
    if inputs["kind"] == "encoder":
        exact = inputs["precision"] if precision == "auto" else precision
        how = (exact, choose_device(device, local_rank()))

        def load(source: ModelFile, check_digest: Callable[[str], None] | None = None) -> Encoder:
            divided = choose_sharding(shard, source.config, source.name, *how, layer_by_layer=layer_by_layer)
            return load_encoder(source, *how, layer_by_layer, check_digest=check_digest, shard=divided)

        encoder = _load_encoder(path, inputs["encoder"], base, load)
    elif base is not None:
        raise InputError(
            f"{path} reads the letters of a sequence and no encoder, so base {base!r} is not used: omit base",
            code="finetuned.base-unused",
            path=path,
            base=base,
        )
    return SavedProbe(parameters, task, facts, Path(path), encoder)


def _load_encoder(path: Path, named: Mapping[str, Any], base: str | None, load: Callable[..., Encoder]) -> Encoder:
    """Load the encoder of a probe with `load`, if its digest is the recorded one."""

    def check(expected: str, found: str) -> None:
        if found != expected:
            raise InputError(
                f"{path}: this probe was trained on {named['name']} (weights {expected[:12]}), but {source.name} has "
                f"weights {found[:12]}. Set base to the model it was trained on.",
                code="probe.other-encoder",
                path=path,
                expected=expected,
                found=found,
            )

    seed = named["untrained_seed"] if base is None else None
    location = base or named["model"]
    try:
        source = find_model(location, seed)
        if not named["weights_sha256"]:
            check(named["file_sha256"], source.sha256)
            return load(source)
        return load(source, check_digest=partial(check, named["weights_sha256"]))
    except InputError as error:
        if base is not None or error.code.startswith(("probe.", "precision.", "shard.")):
            raise
        raise InputError(
            f"{path}: the encoder of this probe, {named['name']}, cannot be loaded from {location} ({error}). Set base "
            "to its new location.",
            code="probe.encoder-absent",
            path=path,
            model=location,
        ) from None
