"""A model's features for a task: embedded if need be, read where they lie, refused if they are another task's."""

import hashlib
import json
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.benchmarking.probes.features import Features, FileRows
from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.tasks.data import SET_NAMES, TaskData

logger = logging.getLogger(__name__)


class ModelFeatures(NamedTuple):
    """Embeddings of one model.

    Args:
        name: the model's.
        path: the HDF5 file.
        attributes: what the file says of itself: model_name, layer, input_sha256, ...
        features: its rows in the task's order.
    """

    name: str
    path: Path
    attributes: dict[str, Any]
    features: Features


def embed_task(
    data: TaskData,
    model: str,
    repr_layer: int,
    per_residue: bool,
    out_dir: Path,
    device: str = "auto",
    untrained_seed: int | None = None,
) -> Path:
    """Embed a task's proteins; an unfinished run is taken up, a finished one is left alone.

    Args:
        data: the task.
        model: as EmbedConfig.
        repr_layer: the layer to keep.
        per_residue: one vector a residue (float16) instead of one a protein (float32).
        out_dir: files go to a folder of their own in `<out_dir>/embeddings`.
        device: auto, cpu or cuda.
        untrained_seed: random weights from this seed instead of the model's.
    Returns: the HDF5 file.
    Raises: InputError if one id stands for two sequences, or the model cannot be loaded.
    """
    from esm2kit.embedding.embed import (  # models and their weights, which files already made do not need
        EmbedConfig,
        embed,
    )

    sequences = dict(zip(data.ids, data.sequences, strict=True))
    if any(sequences[name] != sequence for name, sequence in zip(data.ids, data.sequences, strict=True)):
        raise InputError(
            f"task {data.task.name}: one id stands for two different sequences; give them ids of their own",
            code="task.repeated-id",
            task=data.task.name,
        )
    fasta = Path(out_dir) / "proteins.fasta"
    text = "".join(f">{name}\n{sequence}\n" for name, sequence in sequences.items())
    if not fasta.is_file() or fasta.read_text() != text:
        with atomic_path(fasta) as part:
            part.write_text(text)
    what = json.dumps([text, str(model), repr_layer, per_residue])
    result = embed(
        EmbedConfig(
            fasta=fasta,
            out_dir=Path(out_dir) / "embeddings" / hashlib.sha256(what.encode()).hexdigest()[:8],
            name="trained" if untrained_seed is None else "untrained",
            model=str(model),
            repr_layers=[repr_layer],
            per_protein=not per_residue,
            per_residue=per_residue,
            untrained_seed=untrained_seed,
            long_proteins="window",
            dtype="float16" if per_residue else "float32",
            layout="packed",
            device=device,
        ),
        replace=True,
    )
    return result.hiddens if per_residue else result.embeddings


def drop_missing(data: TaskData, path: Path, allow_missing: bool) -> TaskData:
    """The task without the proteins that a file of embeddings lacks.

    Raises: InputError listing them unless that is allowed, or if a set would be left empty.
    """
    with EmbeddingReader(path) as reader:
        missing = [row for row, name in enumerate(data.ids) if name not in reader]
    if not missing:
        return data
    named = ", ".join(data.ids[row] for row in missing[:5]) + (", ..." if len(missing) > 5 else "")
    if not allow_missing:
        raise InputError(
            f"{path} lacks {len(missing)} of {len(data.ids)} proteins ({named}); embed them, or leave them "
            "out by --allow_missing",
            code="embeddings.missing",
            path=path,
            missing=[data.ids[row] for row in missing],
            proteins=len(data.ids),
        )
    present = np.setdiff1d(np.arange(len(data.ids)), missing)
    for name in SET_NAMES:
        if not (data.sets[present] == name).any():
            raise InputError(
                f"{path}: no protein of the {name} set has an embedding",
                code="embeddings.empty-set",
                path=path,
                set=name,
            )
    kept = data.subset(present)
    note = f"{len(missing)} of {len(data.ids)} proteins have no embedding and were left out ({named})"
    logger.warning("%s", note)
    return replace(kept, official=False, notes=(*data.notes, note))


def read_features(path: Path, data: TaskData, per_residue: bool) -> ModelFeatures:
    """A file's rows in the task's order; those of residues stay in the file, whatever its layout, until a batch asks.

    Args:
        path: a file of `esm2kit embed`.
        data: the task.
        per_residue: the kind of vectors that are wanted.

    Raises:
        InputError: the file holds the other kind, or rows of other sequences.
    """
    path = Path(path)
    with EmbeddingReader(path) as reader:
        kept = {k: v for k, v in reader.attributes.items() if isinstance(v, str | int | float) and k != "provenance"}
        name, wanted = str(kept.get("model_name", path.stem)), "residue" if per_residue else "protein"
        if reader.level != wanted:
            raise InputError(
                f"{path} holds one vector a {reader.level}; this probe needs one a {wanted}",
                code="embeddings.level",
                path=path,
                expected=wanted,
            )
        starts_P, offsets, dtype = reader.locate_rows(data.ids)
        wrong = np.flatnonzero(np.diff(offsets) != data.num_residues) if per_residue else ()
        if len(wrong):
            first = wrong[0]
            raise InputError(
                f"{path}: protein {data.ids[first]!r} has {offsets[first + 1] - offsets[first]} rows for "
                f"{data.num_residues[first]} residues ({len(wrong)} proteins differ); embed these very "
                "sequences, whole",
                code="features.rows",
                protein=data.ids[first],
                found=int(offsets[first + 1] - offsets[first]),
                expected=int(data.num_residues[first]),
                differ=len(wrong),
            )
        rows = FileRows(path, starts_P, offsets, reader.embed_dim, dtype)
    features = Features(rows, offsets, str(path))
    if not per_residue:
        with closing(rows):
            features = Features(features.take(np.arange(len(rows))).numpy(), offsets, str(path))
    return ModelFeatures(name, path, kept, features)
