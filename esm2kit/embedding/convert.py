"""`esm2kit convert`: write embeddings in formats of other programs, in bounded memory except for AnnData."""

import csv
import importlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import atomic_path, check_output_folder
from esm2kit.core.progress import Progress
from esm2kit.embedding.config import ConvertConfig
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.sequences.alphabet import TOKENS
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.columns import read_columns
from esm2kit.tasks.labels import is_number

logger = logging.getLogger(__name__)
VALUES_PER_BLOCK = 4_000_000  # 16 MB of float32
SUFFIXES = {"npy": ".npy", "csv": ".csv", "parquet": ".parquet", "h5ad": ".h5ad"}


class _Vectors(NamedTuple):
    """The vectors of a file, with what is known about their proteins.

    Args:
        reader: the open file.
        num_rows_P: (P,) vectors per protein.
        columns: column of the table of labels -> a value per protein.
    """

    reader: EmbeddingReader
    num_rows_P: np.ndarray
    columns: dict[str, list[str | float | None]]

    @property
    def num_rows(self) -> int:
        return int(self.num_rows_P.sum())

    def read_blocks(self) -> Iterator[tuple[range, np.ndarray]]:
        """Iterate over blocks of whole proteins: their positions in the file, and their vectors as (rows, D)."""
        start, ends_P = 0, np.cumsum(self.num_rows_P)
        rows = max(1, VALUES_PER_BLOCK // self.reader.embed_dim)
        while start < len(self.reader):
            first_row = int(ends_P[start] - self.num_rows_P[start])
            stop = max(start + 1, int(np.searchsorted(ends_P, first_row + rows, side="right")))
            block = range(start, stop)
            yield block, self.reader.rows(block)
            start = stop


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Write the vectors of a file of `esm2kit embed` as NPY, CSV, Parquet or AnnData.

    Values are float32, in the order of the file. Files of vectors per residue become one row per residue.

    Args:
        config: the file, the format, and a table of labels whose columns are added.

    Returns:
        {"out", "num_proteins", "num_vectors", "embed_dim", "files"}; `files` also has the table of ids that is written
        next to a .npy file.

    Raises:
        InputError: the input is damaged or not a file of `esm2kit embed`, the output exists, or a package is missing.
    """
    check_type(config, ConvertConfig, "config")
    out = Path(config.out or config.embeddings.with_suffix(SUFFIXES[config.format]))
    if out.suffix != SUFFIXES[config.format]:
        raise InputError(
            f"{out}: a file of format {config.format} ends in {SUFFIXES[config.format]}. Change --out or --format.",
            code="convert.suffix",
            path=out,
            format=config.format,
        )
    if config.format == "h5ad":
        _import_anndata()  # before any work
    files = [out] if config.format != "npy" else [out, out.with_suffix(".tsv")]
    if existing := next((path for path in files if path.exists()), None):
        raise InputError(
            f"{existing} already exists. Choose another name with --out.", code="convert.exists", path=existing
        )
    check_output_folder(out.parent)
    with EmbeddingReader(config.embeddings) as reader:
        columns = _read_columns(config, reader)
        vectors = _Vectors(reader, reader.count_rows(), columns)
        WRITERS[config.format](vectors, out)
        summary = {"num_proteins": len(reader), "num_vectors": vectors.num_rows, "embed_dim": reader.embed_dim}
    return {"out": out, **summary, "files": files}


def _read_columns(config: ConvertConfig, reader: EmbeddingReader) -> dict[str, list[str | float | None]]:
    """Read the table of labels in the order of the file; columns of numbers become numbers."""
    if config.labels is None:
        return {}
    records = [Record(name, name, "") for name in reader.ids]
    columns = read_columns(config.labels, records, config.id)
    used = {"id"} | ({"residue"} if reader.level != "protein" else set())
    used |= {"csv": set(_name_dimensions(reader)), "parquet": {"vector"}}.get(config.format, set())
    if taken := next((name for name in columns if name in used), None):
        raise InputError(
            f"{config.labels}: the output has a column {taken!r} of its own. Rename the one of the table, or choose "
            "the column of ids with --id.",
            code="convert.column",
            name=taken,
        )
    if config.format in ("csv", "npy"):
        return dict(columns)  # text files keep the text: 42 is not 42.0
    return {name: _parse_column(values) for name, values in columns.items()}


def _parse_column(values: list[str | None]) -> list[str | float | None]:
    """Convert a column of numbers; codes with leading zeros, such as 007, are text."""
    texts = [value for value in values if value is not None]
    if any(not is_number(text) or re.match(r"[+-]?0\d", text) for text in texts):
        return list(values)
    return [None if value is None else float(value) for value in values]


def _list_index(vectors: _Vectors, block: Sequence[int]) -> dict[str, list]:
    """List the columns that identify the rows of some proteins: id, number of the residue from 1, and the labels."""
    counts = vectors.num_rows_P[list(block)]
    positions = np.repeat(np.asarray(block), counts)
    index: dict[str, list] = {"id": [vectors.reader.ids[place] for place in positions]}
    if vectors.reader.level != "protein":
        index["residue"] = [row + 1 for count in counts.tolist() for row in range(count)]
    return index | {name: [values[place] for place in positions] for name, values in vectors.columns.items()}


def _name_dimensions(reader: EmbeddingReader) -> list[str]:
    """Name the columns of a table: by token for logits, otherwise by number."""
    if reader.attributes.get("pooling") == "logits":
        return list(TOKENS)
    return [f"dim_{number}" for number in range(reader.embed_dim)]


def _follow(vectors: _Vectors, out: Path) -> Iterator[tuple[range, np.ndarray]]:
    """Iterate over the blocks, and show how many vectors are written."""
    with Progress(logger, f"{out.name}: wrote", "vectors", vectors.num_rows) as progress:
        for block, rows_RD in vectors.read_blocks():
            yield block, rows_RD
            progress.update(progress.done + len(rows_RD))


def _write_npy(vectors: _Vectors, out: Path) -> None:
    """Write an array (rows, D), and a table with one line per row next to it."""
    with (
        atomic_path(out) as part,
        atomic_path(out.with_suffix(".tsv")) as index_part,
        open(part, "wb") as file,
        open(index_part, "w", encoding="utf-8", newline="") as index_file,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (vectors.num_rows, vectors.reader.embed_dim)}
        np.lib.format.write_array_header_1_0(file, header)
        writer = csv.writer(index_file, delimiter="\t", lineterminator="\n")
        writer.writerow(_list_index(vectors, []))
        for block, rows_RD in _follow(vectors, out):
            file.write(np.ascontiguousarray(rows_RD, dtype="<f4"))
            writer.writerows(zip(*_list_index(vectors, block).values(), strict=True))


def _write_csv(vectors: _Vectors, out: Path) -> None:
    with atomic_path(out) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_list_index(vectors, []), *_name_dimensions(vectors.reader)])
        for block, rows_RD in _follow(vectors, out):
            index = zip(*_list_index(vectors, block).values(), strict=True)
            # str of a float32 has the fewest digits that identify it
            writer.writerows([*names, *map(str, row)] for names, row in zip(index, rows_RD, strict=True))


def _write_parquet(vectors: _Vectors, out: Path) -> None:
    """Write one row per vector, with the vector as a list of fixed length in the column `vector`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = vectors.reader.embed_dim
    fields = [pa.field("id", pa.string())]
    if vectors.reader.level != "protein":
        fields.append(pa.field("residue", pa.int32()))
    for name, values in vectors.columns.items():
        is_text = any(isinstance(value, str) for value in values)
        fields.append(pa.field(name, pa.string() if is_text else pa.float64()))
    schema = pa.schema([*fields, pa.field("vector", pa.list_(pa.float32(), width))])
    schema = schema.with_metadata({name: str(value) for name, value in vectors.reader.attributes.items()})
    with atomic_path(out) as part, pq.ParquetWriter(part, schema) as writer:
        for block, rows_RD in _follow(vectors, out):
            values = pa.array(np.ascontiguousarray(rows_RD, dtype=np.float32).reshape(-1))
            columns = _list_index(vectors, block) | {"vector": pa.FixedSizeListArray.from_arrays(values, width)}
            writer.write_table(pa.table(columns, schema=schema))


def _write_h5ad(vectors: _Vectors, out: Path) -> None:
    """Write an AnnData file: X has the vectors, obs the ids and labels, uns the provenance."""
    import pandas as pd

    anndata = _import_anndata()
    index = _list_index(vectors, range(len(vectors.reader)))
    rows_RD = np.concatenate([rows_RD for _, rows_RD in _follow(vectors, out)])
    names = index["id"]
    if vectors.reader.level != "protein":
        names = [f"{name}:{residue}" for name, residue in zip(names, index["residue"], strict=True)]
    texts = [name for name, values in vectors.columns.items() if any(isinstance(value, str) for value in values)]
    index |= {name: ["" if value is None else value for value in index[name]] for name in texts}
    # AnnData cannot write the string type of pandas 3
    with pd.option_context("future.infer_string", False), atomic_path(out) as part:
        data = anndata.AnnData(
            rows_RD,
            obs=pd.DataFrame(index, index=names),
            var=pd.DataFrame(index=_name_dimensions(vectors.reader)),
            uns={name: str(value) for name, value in vectors.reader.attributes.items()},
        )
        data.write_h5ad(part)


def _import_anndata() -> Any:
    try:
        return importlib.import_module("anndata")
    except ModuleNotFoundError as error:
        if error.name != "anndata":
            raise
        raise InputError(
            'format h5ad requires the anndata package. Run `pip install "esm2kit[anndata]"`, or choose parquet.',
            code="convert.missing",
            name="anndata",
        ) from error


WRITERS: dict[str, Callable[[_Vectors, Path], None]] = {
    "npy": _write_npy,
    "csv": _write_csv,
    "parquet": _write_parquet,
    "h5ad": _write_h5ad,
}
