"""The proteins of a contacts run: single chains, and complexes whose chains are joined by a linker."""

import logging
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.sequences.fasta import read_fasta
from esm2kit.sequences.letters import LetterCounts
from esm2kit.sequences.structures import Chain, Structure, is_structure_name, read_structure

logger = logging.getLogger(__name__)
SEPARATOR = ":"
LINKER_LETTER = "G"


class Protein(NamedTuple):
    """A protein or a complex.

    Args:
        id: its id.
        chains: the residues of each chain.
        source: the structure that it was read from, with its chains in the same order; None for a FASTA record.
    """

    id: str
    chains: tuple[str, ...]
    source: Structure | None = None

    @property
    def num_residues(self) -> int:
        """Number of residues of all chains."""
        return sum(map(len, self.chains))

    @property
    def sequence(self) -> str:
        """The chains, separated by ':'."""
        return SEPARATOR.join(self.chains)

    def join(self, linker: int) -> str:
        """Return the sequence that the model reads."""
        return (LINKER_LETTER * linker).join(self.chains)

    def locate_residues(self, linker: int) -> np.ndarray:
        """(T,) place of each residue in the sequence that the model reads, without the linkers."""
        starts = accumulate((len(chain) + linker for chain in self.chains[:-1]), initial=0)
        return np.concatenate([np.arange(len(chain)) + start for chain, start in zip(self.chains, starts, strict=True)])

    @property
    def chain_T(self) -> np.ndarray:
        """(T,) index of each residue's chain."""
        return np.repeat(np.arange(len(self.chains)), [len(chain) for chain in self.chains])


def read_proteins(files: Sequence[Path], linker: int, max_residues: int) -> list[Protein]:
    """Read and check all proteins.

    Args:
        files: FASTA files and structures.
        linker: number of glycines between chains.
        max_residues: largest number of residues with linkers.

    Returns:
        The proteins in the order of the files.

    Raises:
        InputError: a file is not valid, different proteins have the same id, or a protein is too long.
    """
    proteins: list[Protein] = []
    letters, seen = LetterCounts(), {}
    for protein in _iterate(files):
        letters.add("".join(protein.chains))
        if seen.setdefault(protein.id, protein.chains) != protein.chains:
            raise InputError(
                f"{' and '.join(map(str, files))}: several records have the id '{protein.id}' but different "
                "sequences. Use a different id for each sequence.",
                code="contacts.ambiguous-id",
                id=protein.id,
            )
        proteins.append(protein)
    letters.report(files)
    long = [protein for protein in proteins if len(protein.join(linker)) > max_residues]
    if long:
        shown = ", ".join(f"{protein.id} ({len(protein.join(linker))})" for protein in long[:5])
        more = f" and {len(long) - 5} more" if long[5:] else ""
        linked = " with their linkers" if any(len(protein.chains) > 1 for protein in long) else ""
        raise InputError(
            f"{len(long)} of {format_count(len(proteins), 'protein')} exceed max_residues {max_residues}{linked}: "
            f"{shown}{more}. Remove or shorten them, or raise --max_residues.",
            code="contacts.too-long",
            found=len(long),
            allowed=max_residues,
        )
    if several := sum(len(protein.chains) > 1 for protein in proteins):
        logger.info(
            "%s: chains are joined by %s, which are not in the output",
            format_count(several, "complex", "complexes"),
            format_count(linker, "glycine"),
        )
    return proteins


def _iterate(files: Sequence[Path]) -> Iterator[Protein]:
    for path in files:
        if is_structure_name(path.name):
            structure = read_structure(path)
            yield Protein(structure.id, tuple(chain.sequence for chain in structure.chains), structure)
            continue
        for record in read_fasta(path, chains=True):
            chains = tuple(record.sequence.split(SEPARATOR))
            if not all(chains):
                raise InputError(
                    f"{path}: record '{record.id}' has an empty chain next to '{SEPARATOR}'. Write residues on both "
                    "sides.",
                    code="contacts.empty-chain",
                    path=path,
                    id=record.id,
                )
            yield Protein(record.id, chains)


def describe_chains(chains: Sequence[Chain]) -> str:
    """Name chains, such as "A, B"."""
    return ", ".join(chain.name or "without name" for chain in chains)
