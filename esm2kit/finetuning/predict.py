"""Predict labels for a FASTA file with a fine-tuned model or a probe. Writes TSV, CSV or HDF5, atomically."""

import csv
import hashlib
import itertools
import json
import logging
import math
import time
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from esm2kit.benchmarking.uncertainty import compute_ends, describe_prediction
from esm2kit.benchmarking.verdict import evaluate_new_predictions, log_verdict
from esm2kit.core.checksums import write_sealed_json
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import atomic_path, check_output_folder, sha256_file, to_json
from esm2kit.core.hardware import explain_out_of_memory
from esm2kit.core.launch import run_in_workers, starts_workers
from esm2kit.core.process_group import Process, gather_on_rank_0, join_process_group, run_on_rank_0
from esm2kit.core.progress import Progress
from esm2kit.core.provenance import build_provenance
from esm2kit.finetuning.config import SUFFIXES, PredictConfig
from esm2kit.finetuning.pair_inputs import read_new_pairs
from esm2kit.finetuning.prediction_summary import PredictionSummary
from esm2kit.finetuning.predictor import Predictor, load_predictor
from esm2kit.models.encoder import TOKENS_PER_BATCH
from esm2kit.models.layerwise import LayerwiseEncoder
from esm2kit.models.memory import InferenceSettings
from esm2kit.models.memory_guard import explain_inference_memory
from esm2kit.models.sharded import stop_with_peers
from esm2kit.sequences.fasta import Record, find_fasta_files, read_fasta
from esm2kit.sequences.letters import LetterCounts
from esm2kit.sequences.pipes import copy_pipes
from esm2kit.tasks.label_sets import format_label_set
from esm2kit.tasks.pair_files import ProteinPair
from esm2kit.tasks.scaling import TargetScale

logger = logging.getLogger(__name__)

# Proteins in memory together. Batches are sorted by length, the output has the order of the FASTA file.
PROTEINS_AT_ONCE = 2048
ID_SEPARATOR = "\t"  # between the ids of a pair of proteins
# The pairs to predict and their files; None for a model of single proteins.
NewPairs = tuple[list[ProteinPair], dict[str, Path]] | None


def predict(config: PredictConfig) -> dict[str, Any]:
    """Predict labels and write them to a file.

    A table has one row per protein (`id`, `prediction`, and `p_<label>` for classes) or one row per residue (`id`,
    `position` from 1, `residue`, ...). The prediction of a multi-label task is the labels above the threshold,
    separated by semicolons; several values have one column each instead of `prediction`. Values have an interval
    (`lower` and `upper`), and `spread`, the standard deviation over the seeds, if the model has several. HDF5 has one
    dataset per protein, "0", "1", ... in the order of the FASTA file, with the attribute `original_id`: (C,) or
    (residues, C) probabilities in float32, or values in float64. Intervals and spreads of values are attributes of the
    same names, (residues,) for a residue task. The
    attributes of the root contain the names of the columns.

    Args:
        config: Model, FASTA file and output file.

    Returns:
        {"out", "manifest", "plot", "num_proteins", "task", "labels", "uncertainty", "verdict", "warnings", "files"}.
        The plot is None without `plot`.

    Raises:
        InputError: A file cannot be read, or the base is not the one of the adapters.
    """
    check_type(config, PredictConfig, "config")
    if starts_workers(config.devices):
        found = run_in_workers("predict", config, logger)
        paths = {name: found[name] and Path(found[name]) for name in ("out", "manifest", "plot")}
        return found | paths | {"files": [Path(path) for path in found["files"]]}
    process = join_process_group()
    out, files = Path(config.out), find_fasta_files(config.fasta)
    check_output_folder(out.parent)
    if out.is_dir():
        raise InputError(f"{out} is a folder. Choose a file for --out.", code="output.unwritable", path=out)
    how = (config.device, config.precision, config.layer_by_layer, config.shard)
    with explain_out_of_memory("loading the model", lambda: _list_loading_remedies(config)):
        model = load_predictor(Path(config.model), config.base, *how)
    if isinstance(model.encoder, LayerwiseEncoder) and config.batch_tokens:
        model.encoder.batch_tokens = config.batch_tokens
    copied = copy_pipes(files, out.parent, f"{out.stem}_input.fasta", process.world_size)
    with copied as files, stop_with_peers(), _close(model):
        pairs = read_new_pairs(config, model, files)
        if pairs is None:
            run_on_rank_0(process, lambda: _check_records(files))
        result = None if process.rank else _predict_files(config, model, files, process, pairs)
        if process.rank:
            for _ in _predict_blocks(config, model, files, process, pairs):
                pass
        return run_on_rank_0(process, lambda: result)


def _predict_blocks(
    config: PredictConfig, model: Predictor, files: list[Path], process: Process, pairs: NewPairs
) -> Iterator[list[tuple[Record, tuple[np.ndarray, np.ndarray | None]]]]:
    """Predict the records in blocks, of which each process computes a share.

    Yields:
        The records of a block with their outputs and spreads, in order; an empty list on ranks other than the first.
    """
    records: Iterator[Any] = itertools.chain.from_iterable(read_fasta(path) for path in files)
    if pairs is not None:
        named = (f"{first[0]}{ID_SEPARATOR}{second[0]}" for first, second in pairs[0])
        sequences = ((first[1], second[1]) for first, second in pairs[0])
        records = (Record(name, name, both) for name, both in zip(named, sequences, strict=True))
    compute = model.outputs_and_spreads if pairs is None else model.pair_outputs
    while block := list(itertools.islice(records, PROTEINS_AT_ONCE * process.world_size)):
        own = [record.sequence for record in block[process.rank :: process.world_size]]
        with _explain_memory(config, model):
            found = compute(own, config.batch_tokens) if own else []
            if model.encoder is not None:
                model.encoder.finish()
        shares = gather_on_rank_0(process, found)
        if shares is None:
            yield []
            continue
        outputs: list[Any] = [None] * len(block)
        for rank, share in enumerate(shares):
            outputs[rank :: process.world_size] = share
        yield list(zip(block, outputs, strict=True))


@contextmanager
def _close(model: Predictor) -> Iterator[None]:
    """Close the encoder at the end, also after an error, which other processes of a sharded model must notice."""
    try:
        yield
    finally:
        if model.encoder is not None:
            model.encoder.close()


def _explain_memory(config: PredictConfig, model: Predictor) -> AbstractContextManager[None]:
    """Return the context in which exhausted memory is an error that names the settings that help."""
    encoder = model.encoder
    if encoder is None:  # a probe on letters
        return nullcontext()
    kind = encoder.compute_device.type
    tokens = config.batch_tokens or TOKENS_PER_BATCH[kind]
    settings = InferenceSettings(tokens=tokens, precision=encoder.precision, device=kind, shards=encoder.shards)
    options = ("batch_tokens", "precision", "device", "layer_by_layer")
    return explain_inference_memory(encoder.config, settings, options[:3] if encoder.group_tokens else options)


def _list_loading_remedies(config: PredictConfig) -> list[str]:
    """List the settings with which the model needs less memory before it predicts."""
    found = [] if config.layer_by_layer else ["--layer_by_layer true"]
    return [*found, *([] if config.device == "cpu" else ["--device cpu"]), "a smaller model"]


def _predict_files(
    config: PredictConfig, model: Predictor, files: list[Path], process: Process, pairs: NewPairs
) -> dict[str, Any]:
    out = Path(config.out)
    labels = list(model.task.binary_labels or model.task.labels or model.task.columns)
    names = ["fasta"] if len(files) == 1 else [f"fasta_{number}" for number in range(len(files))]
    inputs = dict(zip(names, files, strict=True)) if pairs is None else dict(pairs[1])
    inputs |= {"model": sha256_file(model.source)}
    encoder = model.encoder
    recorded = config if encoder is None else replace(config, precision=encoder.precision)
    manifest = build_provenance("predict", recorded, inputs)
    about = {"task": model.task.name, "level": model.task.level, "target": model.task.target, "labels": labels}
    about |= {"unit": model.task.unit, "model_name": model.model_name, "mode": model.mode}
    noun = "proteins" if pairs is None else "pairs"
    about["uncertainty"] = describe_prediction(model.uncertainty, model.task.target, config.coverage, noun)
    about |= {"coverage": config.coverage} if model.task.target == "value" else {}
    if model.task.is_multilabel:
        divisor = model.uncertainty.divisor if model.uncertainty else 1.0
        about["threshold"] = scale_threshold(model.threshold, divisor)
    about |= {} if pairs is None else {"pair_features": model.pair_features}
    started, progress = time.monotonic(), Progress(logger, "predicted", noun)
    if out.exists():
        logger.info("%s already exists and will be replaced; choose another --out to keep it", out)
    writer = _write_table if out.suffix in SUFFIXES else _write_hdf5
    summary = PredictionSummary(model.task, model.scale)
    with progress, atomic_path(out) as part, writer(part, out.suffix, model, about, manifest) as write:
        for block in _predict_blocks(config, model, files, process, pairs):
            for record, (values, spread) in block:
                write(record, values, spread)
                summary.add(record.id, model.decide(values if model.task.level == "residue" else values[None]))
            progress.update(progress.done + len(block))
    plot = summary.write_plot(out.with_name(f"{out.name}.svg"), model.training_labels) if config.plot else None
    described = summary.describe()
    verdict = evaluate_new_predictions(model.task, described, model.training_labels, noun)
    path = out.with_name(f"{out.name}.json")
    about |= {"num_proteins": progress.done, "predictions": described, "verdict": verdict.sentence}
    write_sealed_json(path, {**about, "warnings": verdict.warnings, "provenance": manifest})
    logger.info("predicted %d %s in %.1f s", progress.done, noun, time.monotonic() - started)
    logger.info("%s", about["uncertainty"])
    log_verdict(*verdict)
    result = {"out": out, "manifest": path, "plot": plot, "num_proteins": progress.done, "task": model.task.name}
    result |= {
        "labels": labels,
        "uncertainty": about["uncertainty"],
        "verdict": verdict.sentence,
        "warnings": list(verdict.warnings),
    }
    return result | {"files": [each for each in (out, path, plot) if each is not None]}


def _check_records(files: list[Path]) -> None:
    """Read the files once before any work: all records must be valid, and an id must name a single sequence."""
    letters = LetterCounts()
    keys: array[int] = array("Q")  # of a protein, 64 bits of the digests of its id and of its sequence
    for record in itertools.chain.from_iterable(read_fasta(path) for path in files):
        letters.add(record.sequence)
        keys.extend(_hash_text(text) for text in (record.id, record.sequence))
    keys_P2 = np.frombuffer(keys, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((np.arange(len(keys_P2)), keys_P2[:, 0]))
    found = keys_P2[order]
    wrong = np.flatnonzero((found[1:, 0] == found[:-1, 0]) & (found[1:, 1] != found[:-1, 1]))
    named = " and ".join(map(str, files))
    if wrong.size:
        first, second = (int(row) for row in order[wrong[0] : wrong[0] + 2])
        records = itertools.chain.from_iterable(read_fasta(path) for path in files)
        protein = next(itertools.islice(records, first, None)).id
        raise InputError(
            f"{named}: records {first + 1} and {second + 1} have the same id {protein!r} but different sequences. Use "
            "a different id for each sequence.",
            code="predict.ambiguous-id",
            id=protein,
            records=(first + 1, second + 1),
        )
    letters.report(files)


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@contextmanager
def _write_table(
    part: Path, suffix: str, model: Predictor, about: dict[str, Any], manifest: dict[str, Any]
) -> Iterator[Any]:
    """Yield a function that writes rows of text, with seven significant digits of probabilities and of spreads."""
    digits = _count_digits(model.scale)
    task, per_residue = model.task, model.task.level == "residue"
    columns = ["prediction", *(f"p_{label}" for label in about["labels"]), *list_interval_columns(model)]
    columns = [*task.columns, *list_interval_columns(model)] if task.columns else columns
    ids = ["protein_a", "protein_b"] if "pair_features" in about else ["id"]
    with open(part, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter=SUFFIXES[suffix], lineterminator="\n")
        rows.writerow([*ids, *(["position", "residue"] if per_residue else []), *columns])

        def write(record: Record, outputs: np.ndarray, spread: np.ndarray | None) -> None:
            outputs_MC = outputs if per_residue else outputs[None]
            decided, names = model.decide(outputs_MC), record.id.split(ID_SEPARATOR)
            if task.target == "value":
                numbers = compute_interval_columns(model, decided, spread, about["coverage"])
                more = [[f"{value:.{digits}g}" for value in row] for row in numbers]
            else:
                more = [[f"{value:.7g}" for value in row] for row in model.probabilities(outputs_MC)]
            if task.columns:
                rows.writerow([*names, *(f"{value:.{digits}g}" for value in decided[0]), *more[0]])
                return
            if task.is_multilabel:
                shown = [format_label_set(decided[0], task.binary_labels)]
            elif task.target == "class":
                shown = [task.labels[place] for place in decided]
            else:
                shown = [f"{value:.{digits}g}" for value in decided]
            for place, (label, others) in enumerate(zip(shown, more, strict=True)):
                where = [place + 1, record.sequence[place]] if per_residue else []
                rows.writerow([*names, *where, label, *others])

        yield write


def list_interval_columns(model: Predictor) -> list[str]:
    """Return the columns with the intervals of values: lower and upper, and the spread of several seeds.

    For several values per protein the name of the target follows, such as lower_Tm.
    """
    has_ends = model.uncertainty is not None and bool(model.uncertainty.intervals)
    kinds = [*(["lower", "upper"] if has_ends else []), *(["spread"] if model.has_spread else [])]
    names = [f"_{name}" for name in model.task.columns] or [""]
    return [f"{kind}{name}" for name in names for kind in kinds]


def scale_threshold(threshold: float, divisor: float) -> float:
    """Return the probability of a label at the threshold, after division of its logit."""
    if divisor == 1 or not 0 < threshold < 1:
        return threshold
    return 1 / (1 + math.exp(-math.log(threshold / (1 - threshold)) / divisor))


def compute_interval_columns(
    model: Predictor, predicted: np.ndarray, spread: np.ndarray | None, coverage: float
) -> np.ndarray:
    """Compute the columns of `list_interval_columns`.

    Args:
        model: The model.
        predicted: (M,) values, or (M, C) of several targets.
        spread: Standard deviation over seeds of the same values, None for a single seed.
        coverage: Share of new values that the intervals should contain.

    Returns:
        (M, columns).
    """
    predicted_MC = predicted.reshape(len(predicted), -1)
    spread_MC = None if spread is None else spread.reshape(predicted_MC.shape)
    ends = compute_ends(model.uncertainty, predicted_MC, spread_MC, coverage) or ()
    columns = [*ends, *([] if spread_MC is None else [spread_MC])]
    return np.stack(columns, axis=2).reshape(len(predicted), -1) if columns else np.empty((len(predicted), 0))


def _count_digits(scale: TargetScale) -> int:
    """Return the significant digits of a value: seven, and more if values share their first digits."""
    shared = max(abs(each.centre) / each.spread if each.spread else math.inf for each in scale.columns)
    return min(15, 7 + math.ceil(math.log10(min(max(shared, 1.0), 1e8))))


@contextmanager
def _write_hdf5(
    part: Path, suffix: str, model: Predictor, about: dict[str, Any], manifest: dict[str, Any]
) -> Iterator[Any]:
    """Yield a function that writes one dataset per protein."""
    per_residue = model.task.level == "residue"
    # attributes of more than 64 KB, the intervals of long proteins, need the format of HDF5 1.8
    with h5py.File(part, "w", libver=("v108", "latest") if per_residue else None) as file:
        text = h5py.string_dtype()
        for name, value in about.items():
            file.attrs.create(name, value, dtype=text) if name == "labels" else file.attrs.create(name, value)
        file.attrs["provenance"] = json.dumps(to_json(manifest))

        columns = list_interval_columns(model)

        def write(record: Record, outputs: np.ndarray, spread: np.ndarray | None) -> None:
            dataset = file.create_dataset(str(len(file)), data=model.probabilities(outputs))
            dataset.attrs["original_id"] = record.id.replace(ID_SEPARATOR, " ")
            if columns:
                decided = model.decide(outputs if per_residue else outputs[None])
                found = compute_interval_columns(model, decided, spread, about["coverage"])
                for name, numbers in zip(columns, found.T, strict=True):
                    dataset.attrs[name] = numbers if per_residue else numbers[0]

        yield write
