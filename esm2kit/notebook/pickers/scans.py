"""Pickers for the scores of mutations: proteins from a file or a pasted sequence, and a position."""

import re
from collections.abc import Sequence
from html import escape

import ipywidgets

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.notebook.pickers.tasks import file_picker
from esm2kit.notebook.widgets import LABEL, WIDE, View, format_definitions
from esm2kit.sequences.alphabet import RESIDUE_LETTERS
from esm2kit.sequences.fasta import Record, read_fasta

PASTED = "pasted"


def sequence_picker(fasta: str, sequence: str) -> View:
    """Choose the proteins: parameters `fasta` and `sequence`.

    Args:
        fasta: a FASTA file.
        sequence: residues, which are used instead of the file; blanks, numbers and a header line are left out.

    Returns:
        A view whose value is the list of records.
    """
    file = file_picker(fasta)
    pasted = ipywidgets.Textarea(
        value=sequence,
        description="or paste",
        placeholder="a sequence, used instead of the file",
        style=LABEL,
        layout=WIDE,
        continuous_update=False,
    )

    def resolve(given: dict[str, str]) -> tuple[list[Record], str]:
        if given["sequence"].strip():
            record = read_pasted(given["sequence"])
            return [record], format_definitions({record.id: format_count(len(record.sequence), "residue")})
        path, card = file.value_of({"fasta": given["fasta"]})
        return list(read_fasta(path)), card

    return View({"fasta": file.controls["fasta"], "sequence": pasted}, resolve)


def read_pasted(text: str) -> Record:
    """Read a pasted sequence.

    Args:
        text: residues, with or without a header line, blanks and numbers.

    Returns:
        The protein, with the id of the header or `pasted`.

    Raises:
        InputError: there is more than one protein, or a letter that is not a residue.
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    headers = [line[1:].strip() for line in lines if line.startswith(">")]
    residues = re.sub(r"[\s\d]", "", "".join(line for line in lines if not line.startswith(">"))).upper().rstrip("*")
    if len(headers) > 1:
        raise InputError(
            f"{len(headers)} proteins were pasted. Paste one, or save them as a FASTA file.",
            code="pasted.several",
            found=len(headers),
        )
    if wrong := next((letter for letter in residues if letter not in RESIDUE_LETTERS), None) or (not residues and "_"):
        where = "is empty" if not residues else f"has {wrong!r}, which is not the letter of an amino acid"
        raise InputError(f"The pasted sequence {where}. Paste one-letter codes.", code="pasted.letter", found=wrong)
    header = headers[0] if headers and headers[0] else PASTED
    return Record(header.split()[0], header, residues)


def position_picker(position: int, records: Sequence[Record]) -> View:
    """Choose a position with a slider: parameter `position`.

    Args:
        position: from 1.
        records: the proteins; the slider is as long as the longest.

    Returns:
        A view whose value is the position.
    """
    longest = max(len(record.sequence) for record in records)
    slider = ipywidgets.IntSlider(
        value=min(max(position, 1), longest), min=1, max=longest, description="Position", style=LABEL, layout=WIDE,
        continuous_update=False,
    )  # fmt: skip
    return View({"position": slider}, lambda given: (given["position"], _describe_position(given["position"])))


def _describe_position(position: int) -> str:
    return format_definitions({"position": escape(f"{position:,}, counted from 1")})
