"""Pictures of contact maps, one per protein."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib.pyplot as plt

from esm2kit import plots
from esm2kit.core.files import atomic_path
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import portable_name
from esm2kit.structure.contact_file import ContactReader
from esm2kit.structure.evaluate import Scored, Truth
from esm2kit.structure.inputs import Protein
from esm2kit.structure.precision import BETWEEN

DPI = 200
MAX_NAME = 100  # characters of a file name
VALUE_LABELS = {"contacts": "contact probability", "coupling": "coupling (multiples of uniform attention)"}


def draw_pictures(
    folder: Path,
    count: int,
    format: str,
    proteins: Sequence[Protein],
    truths: dict[int, Truth],
    scored: Sequence[Scored],
    reader: ContactReader,
) -> list[Path]:
    """Draw the contact maps of some proteins, first those with a structure.

    Args:
        folder: for the pictures.
        count: largest number of pictures.
        format: suffix of the pictures, such as png.
        proteins: the proteins.
        truths: index of a protein -> its structure.
        scored: precisions of the proteins with a structure.
        reader: the predicted contacts, in the order of the proteins.

    Returns:
        The pictures.
    """
    chosen = [*truths, *(index for index in range(len(proteins)) if index not in truths)][:count]
    precisions = {id(each.truth): each for each in scored}
    paths: list[Path] = []
    taken: set[str] = set()
    for index in chosen:
        protein, truth = proteins[index], truths.get(index)
        stem = portable_name(protein.id)[:MAX_NAME]
        name = stem if stem.casefold() not in taken else f"{stem}_{index + 1}"
        taken.add(name.casefold())
        path = folder / f"{name}.{format}"
        found = precisions.get(id(truth)) if truth else None
        axes = plots.contact_map(
            reader.read(index),
            truth.contacts_TT if truth else None,
            VALUE_LABELS[reader.values],
            probability=reader.values == "contacts",
            boundaries=list(accumulate(map(len, protein.chains[:-1]))),
            title=_describe(protein, truth, found),
        )
        with atomic_path(path) as part:
            metadata = {"png": None, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[format]
            with plt.rc_context({"svg.hashsalt": "esm2kit"}):
                axes.figure.savefig(part, format=format, dpi=DPI, bbox_inches="tight", metadata=metadata)
        plt.close(axes.figure)
        paths.append(path)
    return paths


def _describe(protein: Protein, truth: Truth | None, scored: Scored | None) -> str:
    name = protein.id if len(protein.id) <= plots.MAX_NAME else f"{protein.id[: plots.MAX_NAME - 2]} …"
    lengths = " + ".join(str(len(chain)) for chain in protein.chains)
    size = f"{lengths} residues" if len(protein.chains) > 1 else format_count(protein.num_residues, "residue")
    lines = [f"{name}, {size}"]
    if truth:
        line = f"structure {truth.structure.id}"
        row = next((row for row in scored.rows if (row.range, row.top) == ("long", "L")), None) if scored else None
        if row:
            line += f": long-range precision at L {row.precision:.2f}, by separation alone {row.baseline:.2f}"
        lines.append(line)
        between = next((row for row in scored.rows if (row.range, row.top) == (BETWEEN, "L")), None) if scored else None
        if between:
            lines.append(f"between chains: precision at L {between.precision:.2f}, by chance {between.baseline:.2f}")
    return "\n".join(lines)
