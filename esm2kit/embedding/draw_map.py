"""Draw the proteins of a FASTA file as a map of their embeddings: a picture, a page and a table of coordinates."""

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import atomic_path
from esm2kit.embedding.config import MapConfig
from esm2kit.embedding.embed import embed
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.embedding.map_page import write_map_page
from esm2kit.embedding.maps import (
    METHOD_NAMES,
    MIN_PROTEINS,
    Projection,
    check_method,
    colours,
    default_field,
    field_name,
    grouped,
    project,
)
from esm2kit.plots import embedding_scatter
from esm2kit.sequences.fasta import Record, find_fasta_files, read_fasta
from esm2kit.sequences.pipes import is_pipe
from esm2kit.tasks.columns import read_columns, read_table_proteins
from esm2kit.tasks.sources import parse_split_name
from esm2kit.tasks.tables import find_same_columns

logger = logging.getLogger(__name__)
DPI = 200


def draw_map(config: MapConfig) -> dict[str, Any]:
    """Embed the proteins of a FASTA file and draw them in two dimensions, coloured by a measurement or a class.

    Embeddings that exist from the same input, model and settings are used as they are.

    Args:
        config: the proteins, the model, the table of measurements and the projection.

    Returns:
        {"map", "page", "table", "embeddings", "num_proteins", "colour_by", "neighbours_kept", "files"}: the picture;
        a page that shows the protein under the pointer; the table with the columns id, x, y and the values; the share
        of the ten nearest neighbours that the map keeps; the paths of all files.

    Raises:
        InputError: the FASTA, the table, the model or the field is not valid, or there are fewer than four proteins.
    """
    check_type(config, MapConfig, "config")
    check_method(config.method)
    files = find_fasta_files(config.fasta)
    if pipe := next(filter(is_pipe, files), None):
        raise InputError(
            f"'{pipe}' is a pipe, but a map reads its FASTA twice. Save it to a file.", code="map.pipe", path=pipe
        )
    table = read_table_proteins(files[0]) if len(files) == 1 else None
    records = table.records if table else [record for path in files for record in read_fasta(path)]
    if len(records) < MIN_PROTEINS:
        raise InputError(
            f"a map requires at least {MIN_PROTEINS} proteins, found {len(records)}",
            code="map.too-few",
            found=len(records),
        )
    columns = read_columns(config.labels or "", records, config.id)
    columns = table.columns if table and config.labels is None else columns
    field = config.colour_by or (table.target if table and config.labels is None else default_field(records, columns))
    if len(same := find_same_columns(list(columns), field)) == 1:  # Tm for Tm (C)
        field = list(columns)[same[0]]
    values_P = colours(records, field, columns)  # before the model is loaded: the field may not exist
    if table:  # of a kind with the sequences in a column
        config = replace(config, fasta=_write_fasta(config.out_dir, files[0], records))
    made = embed(config.embed_config())
    assert made.embeddings is not None
    with EmbeddingReader(made.embeddings) as reader:
        rows_P = reader.find_proteins(
            [record.id for record in records], [record.sequence for record in records], same_input=True
        )
        vectors_PD = reader.matrix()[rows_P]
    stem = made.embeddings.with_name(made.embeddings.name.removesuffix("_embeddings.h5") + "_map")
    projected = project(vectors_PD, config.method, config.seed)
    axes = plot_map(projected, values_P, field_name(field))
    if (existing := stem.with_name(f"{stem.name}.{config.format}")).exists():
        logger.info("%s already exists and will be replaced; choose another name to keep it", existing)
    picture, coordinates = write_map(stem, config.format, axes, records, projected, {field: values_P})
    plt.close(axes.figure)
    caption = describe_map(projected, config.method, field_name(field)).replace("*", "")
    page = stem.with_name(f"{stem.name}.html")
    write_map_page(page, projected, records, field, values_P, columns, caption)
    logger.info("%s: %s", picture, caption)
    return {
        "map": picture,
        "page": page,
        "table": coordinates,
        "embeddings": made.embeddings,
        "num_proteins": len(records),
        "colour_by": field,
        "neighbours_kept": projected.kept,
        "files": [made.embeddings, coordinates, page, picture, *([config.fasta] if table else [])],
    }


def _write_fasta(folder: Path, path: Path, records: Sequence[Record]) -> Path:
    """Write the proteins of a table as a FASTA with the name of the table."""
    fasta = folder / f"{parse_split_name(path.name) or path.stem}.fasta"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(fasta) as part:
        part.write_text("".join(f">{record.id}\n{record.sequence}\n" for record in records), encoding="utf-8")
    return fasta


def plot_map(projected: Projection, values_P: np.ndarray, name: str) -> Axes:
    """Plot a map of proteins; the less frequent of many words are merged.

    Args:
        projected: the map.
        values_P: (P,) numbers, with NaN for missing ones, or words.
        name: of the values, for the legend.

    Returns:
        The axes.
    """
    shown_P, rest = grouped(values_P)
    return embedding_scatter(projected.xy_P2, shown_P, label_name=name, axes=projected.axes, rest=rest)


def describe_map(projected: Projection, method: str, name: str) -> str:
    """Describe a map, as its caption.

    Args:
        projected: the map.
        method: pca, tsne or umap.
        name: of the values that colour it.

    Returns:
        Markdown.
    """
    return (
        f"*{len(projected.xy_P2):,} proteins by {METHOD_NAMES[method]}, coloured by {name}.* The colour was not used "
        f"to compute the map. Of a protein's ten nearest neighbours, {projected.kept:.0%} are also among its ten "
        "nearest on the map."
    )


def write_map(
    stem: Path,
    format: str,
    axes: Axes,
    records: Sequence[Record],
    projected: Projection,
    values: Mapping[str, np.ndarray],
) -> tuple[Path, Path]:
    """Write the picture of a map and a table of its coordinates.

    Args:
        stem: path of both files without the suffix.
        format: suffix of the picture, such as png.
        axes: the picture.
        records: the proteins.
        projected: the map.
        values: name -> (P,) further columns of the table.

    Returns:
        Paths of the picture and of the table.
    """
    picture, table = (stem.with_name(f"{stem.name}.{suffix}") for suffix in (format, "csv"))
    with atomic_path(picture) as part:
        metadata = {"png": None, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[format]
        with plt.rc_context({"svg.hashsalt": "esm2kit"}):
            axes.figure.savefig(part, format=format, dpi=DPI, bbox_inches="tight", metadata=metadata)
    with atomic_path(table) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "x", "y", *values])
        for record, (x, y), *row in zip(records, projected.xy_P2, *values.values(), strict=True):
            writer.writerow([record.id, f"{x:.7g}", f"{y:.7g}", *row])
    return picture, table
