"""Pickers for embedded proteins: the map and its colour, and one protein."""

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from html import escape
from typing import NamedTuple

import ipywidgets
import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.embedding.maps import METHODS, RESIDUES, check_method, colours, field_counts
from esm2kit.notebook.widgets import LABEL, WIDE, View, format_definitions
from esm2kit.sequences.fasta import Record

# Maximum number of ids offered for completion; any other id can be typed.
MAX_SUGGESTED_IDS = 2_000
SHOWN_VALUES = 5


class MapChoice(NamedTuple):
    """Projection of the map, and the header field that colours it."""

    projection: str
    colour_by: str


def map_picker(projection: str, colour_by: str, records: Sequence[Record]) -> View:
    """Choose a projection and a colour: parameters `projection` and `colour_by`.

    Args:
        projection: pca or umap.
        colour_by: a field of the headers, or `residues` for the length.
        records: the proteins; their headers determine the available fields.

    Returns:
        A view whose value is a MapChoice.
    """
    methods = METHODS if projection in METHODS else (*METHODS, projection)
    counts = field_counts(records)
    options = [(f"{name} ({count:,} of {len(records):,} proteins)", name) for name, count in counts.items()]
    if colour_by not in counts:
        options.append((f"{colour_by} (not in any header)", colour_by))
    controls = {
        "projection": ipywidgets.ToggleButtons(
            options=methods, value=projection, description="Projection", style=LABEL | {"button_width": "6em"}
        ),
        "colour_by": ipywidgets.Dropdown(
            options=options, value=colour_by, description="Colour by", style=LABEL, layout=WIDE
        ),
    }
    return View(controls, lambda given: _resolve_map(given["projection"], given["colour_by"], records))


def _resolve_map(projection: str, colour_by: str, records: Sequence[Record]) -> tuple[MapChoice, str]:
    check_method(projection)
    found = colours(records, colour_by)
    if np.issubdtype(found.dtype, np.number):
        values = f"a number, {found.min():,g} to {found.max():,g}"
    else:
        counts = Counter(found.tolist())
        shown = ", ".join(f"{escape(str(name))} {count:,}" for name, count in counts.most_common(SHOWN_VALUES))
        more = f" and {len(counts) - SHOWN_VALUES:,} more" if len(counts) > SHOWN_VALUES else ""
        values = f"{len(counts):,} different: {shown}{more}"
    what = "length of each protein in residues" if colour_by == RESIDUES else "header field"
    return MapChoice(projection, colour_by), format_definitions({escape(colour_by): what, "values": values})


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
