"""Pickers for embedded proteins: the map and its colour, and one protein."""

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from html import escape
from pathlib import Path
from typing import NamedTuple

import ipywidgets
import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.embedding.maps import (
    METHOD_NAMES,
    RESIDUES,
    available_methods,
    check_method,
    colours,
    default_field,
    field_counts,
    field_name,
)
from esm2kit.notebook.widgets import LABEL, WIDE, View, format_definitions
from esm2kit.sequences.fasta import Record

# Maximum number of ids offered for completion; any other id can be typed.
MAX_SUGGESTED_IDS = 2_000
SHOWN_VALUES = 5


class MapChoice(NamedTuple):
    """A projection, and what colours the map.

    Args:
        projection: pca, tsne or umap.
        colour_by: column, header field or `residues`.
        name: of the colour, for a legend.
        values_P: (P,) numbers, with NaN for missing ones, or words.
    """

    projection: str
    colour_by: str
    name: str
    values_P: np.ndarray


def map_picker(
    projection: str,
    colour_by: str,
    records: Sequence[Record],
    fasta: Path | str = "",
    columns: Mapping[str, Sequence[str | None]] | None = None,
) -> View:
    """Choose a projection and a colour: parameters `projection` and `colour_by`.

    Args:
        projection: pca, tsne or umap.
        colour_by: a column, a field of the headers, or `residues` for the length; empty for `maps.default_field`.
        records: the proteins; their headers determine the available fields.
        fasta: their file, which may name the target.
        columns: name -> a value per protein, from a table.

    Returns:
        A view whose value is a MapChoice.
    """
    methods = [(METHOD_NAMES[method], method) for method in available_methods()]
    if projection not in [value for _, value in methods]:
        methods.append((f"{METHOD_NAMES.get(projection, projection)} (not available)", projection))
    counts, default = field_counts(records, columns), default_field(records, columns)

    def describe(name: str) -> str:
        known = f"{counts[name]:,} of {len(records):,} proteins" if counts[name] < len(records) else "all proteins"
        named = field_name(name, fasta)
        return f"{name}: {named} ({known})" if named != name else f"{name} ({known})"

    options = [(f"the first that fits: {default}", ""), *((describe(name), name) for name in counts)]
    if colour_by and colour_by not in counts:
        options.append((f"{colour_by} (no protein has it)", colour_by))
    controls = {
        "projection": ipywidgets.Dropdown(
            options=methods, value=projection, description="Projection", style=LABEL, layout=WIDE
        ),
        "colour_by": ipywidgets.Dropdown(
            options=options, value=colour_by, description="Colour by", style=LABEL, layout=WIDE
        ),
    }

    def resolve(given: dict[str, str]) -> tuple[MapChoice, str]:
        check_method(given["projection"])
        field = given["colour_by"] or default
        values_P = colours(records, field, columns)
        choice = MapChoice(given["projection"], field, field_name(field, fasta), values_P)
        where = "column of the table" if field in (columns or {}) else "field of the headers"
        what = "length of each protein in residues" if field == RESIDUES else where
        return choice, format_definitions({escape(field): what, "values": _describe_values(values_P)})

    return View(controls, resolve)


def _describe_values(values_P: np.ndarray) -> str:
    if np.issubdtype(values_P.dtype, np.number):
        known = values_P[np.isfinite(values_P)]
        missing = f"; {len(values_P) - len(known):,} proteins have none" if len(known) < len(values_P) else ""
        return f"a number, {known.min():,g} to {known.max():,g}{missing}"
    counts = Counter(values_P.tolist())
    shown = ", ".join(f"{escape(str(name))} {count:,}" for name, count in counts.most_common(SHOWN_VALUES))
    more = f" and {len(counts) - SHOWN_VALUES:,} more" if len(counts) > SHOWN_VALUES else ""
    return f"{len(counts):,} different: {shown}{more}"


def protein_picker(protein: str, records: Sequence[Record]) -> View:
    """Choose a protein by its id: parameter `protein`.

    Args:
        protein: an id; empty for the first protein.
        records: the proteins.

    Returns:
        A view whose value is the index of the protein in records.
    """
    places: dict[str, int] = {}
    for place, record in enumerate(records):
        places.setdefault(record.id, place)
    field = ipywidgets.Combobox(
        value=protein,
        options=list(places)[:MAX_SUGGESTED_IDS],
        placeholder=f"{records[0].id} (the first)",
        description="Protein",
        style=LABEL,
        layout=WIDE,
        continuous_update=False,
    )
    return View({"protein": field}, lambda given: _resolve_protein(given["protein"].strip(), records, places))


def _resolve_protein(protein: str, records: Sequence[Record], places: dict[str, int]) -> tuple[int, str]:
    place = places.get(protein) if protein else 0
    if place is None:
        near = get_close_matches(protein, list(places)[:MAX_SUGGESTED_IDS], 3) or list(places)[:3]
        raise InputError(
            f"protein {protein!r} is not among the {len(records):,} proteins: choose an id such as {', '.join(near)}",
            code="protein.unknown",
            name=protein,
            near=near,
        )
    record = records[place]
    header = record.description if len(record.description) <= 120 else f"{record.description[:120]} …"
    return place, format_definitions({"header": escape(header), "residues": f"{len(record.sequence):,}"})
