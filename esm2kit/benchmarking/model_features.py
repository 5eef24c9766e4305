"""Features of a model for a task: embed the proteins if necessary, and check and read files of embeddings."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.benchmarking.probes.features import Features, FileRows
from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.embedding.config import POOLINGS
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.tasks.task_data import SET_NAMES, TaskData

logger = logging.getLogger(__name__)

INPUT_SETTINGS = ("dtype", "precision", "long_proteins", "max_residues", "window_overlap")


class ModelFeatures(NamedTuple):
    """Embeddings of one model.

    Args:
        name: Name of the model.
        path: HDF5 file.
        attributes: Attributes of the file: model_name, layer, input_sha256, ...
        features: Rows of the file in the order of the task.
        manifest: Provenance of the file, with the model; empty for files of other programs.
        settings: Settings of the embedding run that determine the vectors.
    """

    name: str
    path: Path
    attributes: dict[str, Any]
    features: Features
    manifest: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}


def embed_task(
    data: TaskData,
    model: str,
    layers: Sequence[int],
    poolings: Sequence[str],
    out_dir: Path,
    device: str = "auto",
    untrained_seed: int | None = None,
) -> dict[tuple[int, str], Path]:
    """Embed the proteins of a task in one pass. An interrupted run resumes; a finished one is not repeated.

    Args:
        data: The task.
        model: Model as in EmbedConfig.
        layers: Layers to save.
        poolings: How the vectors of a protein are pooled, and "none", the last, for one vector per residue. Vectors per
            residue are float16 unless pooled ones are saved too; those are float32.
        out_dir: Folder of the benchmark. The files go to a subfolder of `<out_dir>/embeddings`.
        device: auto, cpu, cuda or mps.
        untrained_seed: Seed of random weights that replace those of the model.

    Returns:
        (layer, pooling) -> path of the HDF5 file.

    Raises:
        InputError: Two different sequences have the same id, or the model cannot be loaded.
    """
    from esm2kit.embedding.embed import EmbedConfig, embed  # slow import that existing embeddings do not need

    sequences = dict(zip(data.ids, data.sequences, strict=True))
    if any(sequences[name] != sequence for name, sequence in zip(data.ids, data.sequences, strict=True)):
        raise InputError(
            f"task {data.task.name}: two different sequences have the same id. Give each sequence a unique id.",
            code="task.repeated-id",
            task=data.task.name,
        )
    fasta, text = Path(out_dir) / "proteins.fasta", _format_fasta(sequences)
    if not fasta.is_file() or fasta.read_text(encoding="utf-8") != text:
        with atomic_path(fasta) as part:
            part.write_text(text, encoding="utf-8")
    pooled, per_residue = [name for name in poolings if name != "none"], "none" in poolings
    kind = "residues" if per_residue else "proteins"
    single = len(layers) == 1 and list(poolings) in (["mean"], ["none"])
    named = [layers[0], per_residue] if single else [list(layers), list(poolings)]
    digest = hashlib.sha256(json.dumps([text, str(model), *named]).encode()).hexdigest()
    folder = f"layer{layers[0]}_{kind}" if len(layers) == 1 else f"{len(layers)}_layers_{kind}"
    result = embed(
        EmbedConfig(
            fasta=fasta,
            out_dir=Path(out_dir) / "embeddings" / f"{folder}_{digest[:8]}",
            name="trained" if untrained_seed is None else "untrained",
            model=str(model),
            repr_layers=list(layers),
            per_protein=bool(pooled),
            pooling=pooled or ["mean"],
            per_residue=per_residue,
            untrained_seed=untrained_seed,
            long_proteins="window",
            dtype=stored_dtype(poolings),
            layout="packed",
            device=device,
        ),
        replace=True,
    )
    return dict(zip(product(layers, [*pooled, *(["none"] if per_residue else [])]), result.files, strict=True))


def stored_dtype(poolings: Sequence[str]) -> str:
    """Return the type of the stored values: float16 if only vectors per residue are saved, else float32."""
    return "float16" if list(poolings) == ["none"] else "float32"


def _format_fasta(sequences: dict[str, str]) -> str:
    # the id of a table may contain blanks, at which the id of a header ends
    return "".join(f">{name.replace(' ', '%20')}\n{sequence}\n" for name, sequence in sequences.items())


def _find_proteins(reader: EmbeddingReader, data: TaskData) -> np.ndarray:
    """Find the rows of a task's proteins in a file (P,), -1 where it has no vector of the sequence."""
    # version 0.1.0 did not record sequences; a file that it embedded for this task has the hash of exactly this text
    text = _format_fasta(dict(zip(data.ids, data.sequences, strict=True)))
    same_input = reader.attributes.get("input_sha256") == hashlib.sha256(text.encode()).hexdigest()
    return reader.find_proteins(data.ids, data.sequences, same_input)


def drop_missing(data: TaskData, path: Path, allow_missing: bool) -> TaskData:
    """Drop the proteins of a task whose sequences are missing from a file of embeddings.

    Args:
        data: The task.
        path: File of embeddings.
        allow_missing: Whether proteins may be missing.

    Returns:
        The task with the remaining proteins and a note on the missing ones.

    Raises:
        InputError: Proteins are missing or have other sequences and that is not allowed, or a set would be empty.
    """
    with EmbeddingReader(path) as reader:
        missing = np.flatnonzero(_find_proteins(reader, data) < 0).tolist()
        differ = [data.ids[row] for row in missing if data.ids[row] in reader]
    if not missing:
        return data
    if differ and not allow_missing:
        raise InputError(
            f"{path}: protein {differ[0]!r} has another sequence there than in the task ({len(differ)} of "
            f"{len(data.ids)} proteins differ). Embed the proteins of this task, or skip them with --allow_missing.",
            code="embeddings.sequence",
            path=path,
            protein=differ[0],
            differ=len(differ),
            proteins=len(data.ids),
        )
    named = ", ".join(data.ids[row] for row in missing[:5]) + (", ..." if len(missing) > 5 else "")
    if not allow_missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(data.ids)} proteins are missing ({named}). Embed them, or skip them "
            "with --allow_missing.",
            code="embeddings.missing",
            path=path,
            missing=[data.ids[row] for row in missing],
            proteins=len(data.ids),
        )
    present = np.setdiff1d(np.arange(len(data.ids)), missing)
    for name in SET_NAMES:
        if (data.sets == name).any() and not (data.sets[present] == name).any():
            raise InputError(
                f"{path}: no protein of the {name} set has an embedding. Embed the proteins of this task.",
                code="embeddings.empty-set",
                path=path,
                set=name,
            )
    kept = data.subset(present)
    note = f"{len(missing)} of {len(data.ids)} proteins have no embedding and were skipped ({named})"
    logger.warning("%s", note)
    return replace(kept, official=False, notes=(*data.notes, note))


def read_features(path: Path, data: TaskData, per_residue: bool, loads: bool = True) -> ModelFeatures:
    """Open the rows of a file in the order of the task. Rows of residues are read from the file batch by batch.

    Args:
        path: File of `esm2kit embed`, in any layout.
        data: The task.
        per_residue: Whether one vector per residue is required, instead of one per protein.
        loads: Whether to read vectors of proteins into memory.

    Returns:
        The features, with the name of the model and the attributes of the file.

    Raises:
        InputError: The file has vectors of the other level, or rows of other sequences.
    """
    path = Path(path)
    with EmbeddingReader(path) as reader:
        kept = {k: v for k, v in reader.attributes.items() if isinstance(v, str | int | float) and k != "provenance"}
        manifest, settings = (_parse_attribute(reader.attributes.get(each)) for each in ("provenance", "settings"))
        name, expected = str(kept.get("model_name", path.stem)), "residue" if per_residue else "protein"
        if reader.level != expected:
            raise InputError(
                f"{path} contains one vector per {reader.level}, but this probe requires one per {expected}",
                code="embeddings.level",
                path=path,
                expected=expected,
            )
        found_P = _find_proteins(reader, data)
        assert (found_P >= 0).all(), "drop_missing was called before"
        starts_P, offsets, dtype = reader.locate_rows(rows=found_P)
        wrong = np.flatnonzero(np.diff(offsets) != data.num_residues) if per_residue else ()
        if len(wrong):
            first = wrong[0]
            raise InputError(
                f"{path}: protein {data.ids[first]!r} has {offsets[first + 1] - offsets[first]} rows for "
                f"{data.num_residues[first]} residues ({len(wrong)} proteins differ). Embed the sequences of "
                "this task, untruncated.",
                code="features.rows",
                protein=data.ids[first],
                found=int(offsets[first + 1] - offsets[first]),
                expected=int(data.num_residues[first]),
                differ=len(wrong),
            )
        if unnamed := sum(name not in reader for name in data.ids):
            logger.info(
                "%s: %d of %d proteins have other ids there; found by their sequences", path, unnamed, len(starts_P)
            )
        rows = FileRows(path, starts_P, offsets, reader.embed_dim, dtype)
    features = Features(rows, offsets, str(path))
    if not per_residue and loads:
        with closing(rows):
            features = features.load()
    return ModelFeatures(name, path, kept, features, manifest, settings)


def _parse_attribute(value: Any) -> dict[str, Any]:
    """Parse a JSON attribute of a file; empty if it has none."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def find_place(source: ModelFeatures, model: str) -> tuple[list[int], list[str]] | None:
    """Find the layer and the pooling of existing vectors, so that an untrained model is embedded in the same way.

    Args:
        source: The vectors.
        model: The model whose architecture the untrained one has.

    Returns:
        The layer and the pooling, each in a list; None if the file does not record them or the model has no such layer.
    """
    from esm2kit.models.load import find_model  # slow import that existing embeddings do not need

    layer, pooling = source.attributes.get("layer"), source.attributes.get("pooling")
    last = find_model(model, 0).config.num_layers
    if not isinstance(layer, int) or not 0 <= layer <= last or pooling not in (*POOLINGS, "none"):
        return None
    return [-1 if layer == last else layer], [pooling]


def records_inputs(source: ModelFeatures) -> bool:
    """Whether a file records its model and its settings, so that a probe of its vectors can predict other proteins."""
    return isinstance(source.manifest.get("model"), dict) and all(name in source.settings for name in INPUT_SETTINGS)


def describe_inputs(source: ModelFeatures, model: str | None) -> dict[str, Any]:
    """Describe how the vectors of a probe are computed, so that it can predict other proteins.

    Args:
        source: The features of the probe, which record their inputs.
        model: Location of the model that computed them in this run; None for a file of an earlier run.

    Returns:
        {"kind": "encoder", "layer", "pooling", "dtype", "precision", "long_proteins", "max_residues",
        "window_overlap", "encoder": {"model", "name", "untrained_seed", "weights_sha256", "file_sha256"}}. The digest
        of the weights is None if the model is not where the file was computed from.
    """
    from esm2kit.models.load import find_model, load_model  # slow import that existing embeddings do not need
    from esm2kit.models.lora import weights_sha256

    record = source.manifest["model"]
    seed = record.get("untrained_seed")
    location, weights = model or record["source"], None
    if model is not None or Path(location).exists():
        found = find_model(location, seed)
        if found.sha256 == record["sha256"]:
            weights = weights_sha256(load_model(location, seed)[0])
        if found.path is not None and found.download is None:
            location = str(found.path.resolve())
    encoder = {"model": str(location), "name": record["name"], "untrained_seed": seed}
    encoder |= {"weights_sha256": weights, "file_sha256": record["sha256"]}
    settings = {name: source.settings[name] for name in INPUT_SETTINGS}
    place = {"layer": int(source.attributes["layer"]), "pooling": str(source.attributes["pooling"])}
    return {"kind": "encoder", **place, **settings, "encoder": encoder}
