"""The page of a map: its points show the protein under the pointer, and can be searched.

The page is one HTML file that loads nothing from the network.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.colors import to_hex

from esm2kit.core.files import atomic_path
from esm2kit.core.numbers import format_count
from esm2kit.embedding.maps import NOT_GIVEN, Projection, field_name, grouped, header_fields, protein_name
from esm2kit.pages import render_page
from esm2kit.plots import MUTED, PALETTE
from esm2kit.sequences.fasta import Record

logger = logging.getLogger(__name__)
TEMPLATES = files("esm2kit.embedding") / "templates"
MAX_POINTS = 20_000  # with about 200 bytes each
MAX_COLUMNS = 12  # of values per protein
MAX_CHARACTERS = 160  # of a value
SHADES = 64  # of a scale of numbers
DARKEST = 0.15  # start of the scale, which is visible on a dark page


def write_map_page(
    path: Path,
    projected: Projection,
    records: Sequence[Record],
    field: str,
    values_P: np.ndarray,
    columns: Mapping[str, Sequence[str | None]],
    caption: str,
) -> None:
    """Write the page of a map.

    Args:
        path: of the page.
        projected: the map.
        records: the proteins.
        field: the field that colours the map.
        values_P: (P,) its numbers, with NaN for missing ones, or words.
        columns: further values per protein, None for a missing one.
        caption: describes the map.
    """
    rows = np.arange(len(records))
    facts = [f"Axes: {projected.axes[0]} (across) and {projected.axes[1]} (up)."]
    if len(records) > MAX_POINTS:
        rows = np.sort(np.random.default_rng(0).choice(len(records), MAX_POINTS, replace=False))
        facts.append(
            f"This page shows a random sample of {MAX_POINTS:,} of {len(records):,} proteins (seed 0). The picture and "
            "the table have all."
        )
        logger.info("%s shows a random sample of %d of %d proteins", path, MAX_POINTS, len(records))
    figure = _render_figure(projected, [records[row] for row in rows], rows, field, values_P, columns, caption)
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("map.css", "map.js.j2"))
    text = render_page(
        f"Map of {format_count(len(records), 'protein')}",
        caption,
        facts,
        [{"title": "Proteins", "figures": [{"html": figure, "caption": _explain()}]}],
        style=style,
        script=script,
    )
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def _explain() -> str:
    return (
        "Point at a protein, or tap it, to see it. Double-click or + enlarges the map, and dragging moves it. The "
        "legend hides groups."
    )


def _render_figure(
    projected: Projection,
    records: Sequence[Record],
    rows: np.ndarray,
    field: str,
    values_P: np.ndarray,
    columns: Mapping[str, Sequence[str | None]],
    caption: str,
) -> str:
    """Render the map and its data as HTML."""
    shown_P, rest = grouped(values_P)
    legend, colours, colour_N, group_N = _choose_colours(shown_P, rest, rows)
    xy_N2 = projected.xy_P2[rows]
    low_2, high_2 = projected.xy_P2.min(0), projected.xy_P2.max(0)
    unit_N2 = (xy_N2 - low_2) / np.where(high_2 > low_2, high_2 - low_2, 1)
    named = _list_values(records, rows, field, values_P, columns)
    is_rest_N = np.array([colours[place] == MUTED for place in colour_N], dtype=bool)
    data = {
        "id": [record.id for record in records],
        "about": [_shorten(protein_name(record.description)) for record in records],
        "x": unit_N2[:, 0].round(5).tolist(),
        "y": unit_N2[:, 1].round(5).tolist(),
        "group": group_N.tolist(),
        "colours": colours,
        "colour": colour_N.tolist(),
        # grey points are below the others
        "order": np.argsort(~is_rest_N, kind="stable").tolist(),
        "columns": list(named),
        "values": list(named.values()),
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # cannot end the element
    templates = Environment(loader=PackageLoader("esm2kit.embedding"), autoescape=True, trim_blocks=True)
    return templates.get_template("map.html.j2").render(
        data=text, name=field_name(field), alt=caption.replace("*", ""), **legend
    )


def _choose_colours(
    shown_P: np.ndarray, rest: str | None, rows: np.ndarray
) -> tuple[dict[str, Any], list[str], np.ndarray, np.ndarray]:
    """Choose the legend, the list of colours, and the colour and the group of each protein."""
    if np.issubdtype(shown_P.dtype, np.number):
        values_P = shown_P.astype(float)
        known_P = np.isfinite(values_P)
        low, high = float(values_P[known_P].min()), float(values_P[known_P].max())
        shades = [
            to_hex(mpl.colormaps["viridis"](DARKEST + (1 - DARKEST) * place / (SHADES - 1))) for place in range(SHADES)
        ]
        step = (high - low) / (SHADES - 1) or 1.0
        values_N, known_N = values_P[rows], known_P[rows]
        colour_N = np.where(known_N, np.rint((np.where(known_N, values_N, low) - low) / step), SHADES).astype(int)
        legend: dict[str, Any] = {"gradient": ", ".join(shades[::7]), "low": f"{low:.4g}", "high": f"{high:.4g}"}
        missing = int((~known_N).sum())
        # group 0 is the only one that can be hidden
        legend["groups"] = [{"name": NOT_GIVEN, "colour": MUTED, "count": f"{missing:,}"}] if missing else []
        return legend, [*shades, MUTED], colour_N, np.where(known_N, 1, 0)
    shown_N = [str(shown_P[row]) for row in rows]
    names = sorted(set(shown_N) - {rest}) + ([rest] if rest in shown_N else [])
    colours = [MUTED if name == rest else to_hex(PALETTE[place % len(PALETTE)]) for place, name in enumerate(names)]
    place_N = np.array([names.index(name) for name in shown_N])
    counts = Counter(shown_N)
    groups = [
        {"name": name, "colour": colour, "count": f"{counts[name]:,}"}
        for name, colour in zip(names, colours, strict=True)
    ]
    return {"groups": groups}, colours, place_N, place_N


def _list_values(
    records: Sequence[Record],
    rows: np.ndarray,
    field: str,
    values_P: np.ndarray,
    columns: Mapping[str, Sequence[str | None]],
) -> dict[str, list[str]]:
    """List what is known of each protein: the field of the colour first, then columns, header fields and length."""
    numbers = np.issubdtype(values_P.dtype, np.number)
    first = [
        "" if text in ("nan", NOT_GIVEN) else text
        for text in (f"{values_P[row]:.6g}" if numbers else str(values_P[row]) for row in rows)
    ]
    named = {field_name(field): [_shorten(text) for text in first]}
    for name, texts in columns.items():
        if name != field:
            named[name] = [_shorten(texts[row] or "") for row in rows]
    fields_N = [header_fields(record.description) for record in records]
    for name in dict.fromkeys(name for fields in fields_N for name in fields):
        named.setdefault(field_name(name), [_shorten(fields.get(name, "")) for fields in fields_N])
    named = dict(list(named.items())[: MAX_COLUMNS - 1])
    return named | {"residues": [str(len(record.sequence)) for record in records]}


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"
