"""A small set of entries of the Protein Data Bank, for the precision of contacts."""

import logging
from pathlib import Path
from typing import NamedTuple

from esm2kit.core.errors import InputError
from esm2kit.core.fetch import FetchError, fetch
from esm2kit.core.files import atomic_path
from esm2kit.core.paths import find_packaged_file
from esm2kit.sequences.headers import parse_header
from esm2kit.sequences.structures import read_structure
from esm2kit.tasks.files import parse_attributes, read_records
from esm2kit.tasks.sources import Source

logger = logging.getLogger(__name__)
ADDRESS = "https://files.rcsb.org/download"
TASK = "data/sample/tasks/secondary_structure_pdb"
ENTRIES = 8
FEWEST, MOST = 60, 250  # residues of a chain
MAX_BYTES = 1 << 26
STALL_SECONDS = 30.0


class Entries(NamedTuple):
    """Downloaded entries.

    Args:
        fasta: their chains.
        folder: their files.
        missing: why entries could not be downloaded, one line each.
    """

    fasta: Path
    folder: Path
    missing: list[str]


def choose_chains() -> dict[str, str]:
    """Choose the chains: the first of the sample task's test set that have between FEWEST and MOST residues.

    Returns:
        Entry and chain, such as 1kr4_A -> sequence of the chain.
    """
    split, sequences = (find_packaged_file(f"{TASK}/{name}.fasta") for name in ("sampled", "sequences"))
    sets = {
        row_id: attributes["SET"]
        for row_id, attributes in (parse_attributes(header, Source(split)) for header, _ in read_records(Source(split)))
    }
    bodies = {parse_header(header).id: "".join(body.split()) for header, body in read_records(Source(sequences))}
    chosen = [name for name, chosen_set in sets.items() if chosen_set == "test" and FEWEST <= len(bodies[name]) <= MOST]
    return {name.replace("-", "_"): bodies[name] for name in chosen[:ENTRIES]}


def download_entries(folder: Path) -> Entries:
    """Download the entries, unless they are there, and write the sequences of their chains.

    Args:
        folder: for the files.

    Returns:
        The entries.

    Raises:
        InputError: no entry could be downloaded.
    """
    chains, missing = choose_chains(), []
    for name in list(chains):
        entry = name.partition("_")[0]
        path = folder / f"{entry}.cif.gz"
        if path.is_file():
            continue
        address = f"{ADDRESS}/{entry.upper()}.cif.gz"
        try:
            fetch(address, path, STALL_SECONDS, MAX_BYTES, check=_check_structure, detects_truncation=True)
        except FetchError as error:
            missing.append(f"{address} {error}")
            logger.info("%s", missing[-1])
            del chains[name]
    if not chains:
        raise InputError(
            f"none of {len(missing)} entries of the Protein Data Bank could be downloaded: {missing[0]}. Pass a folder "
            "of PDB or mmCIF files as structures.",
            code="verify.no-entries",
            found=len(missing),
        )
    fasta = folder / "chains.fasta"
    with atomic_path(fasta) as part:
        part.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in chains.items()), encoding="utf-8")
    return Entries(fasta, folder, missing)


def _check_structure(path: Path) -> None:
    """Check that a downloaded file is a structure."""
    try:
        read_structure(path)
    except InputError as error:
        raise FetchError(f"sent no structure ({str(error).split('. ')[0]})") from None
