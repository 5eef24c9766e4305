"""Overlapping windows of proteins that are too long for one forward pass."""

from typing import NamedTuple


class Windowing(NamedTuple):
    """How a protein over `max_residues` is cut: windows of that size, each `overlap` residues into its neighbour.

    The windows before the last are evenly spaced; the last one ends with the protein, so its overlap may be larger. A
    residue in several windows gets the mean of its vectors, so does BOS.
    """

    max_residues: int
    overlap: int
    batch_tokens: int

    def split(self, num_residues: int) -> list[tuple[int, int]]:
        """(start, stop) in residues."""
        if num_residues <= self.max_residues:
            return [(0, num_residues)]
        starts = list(range(0, num_residues - self.max_residues, self.max_residues - self.overlap))
        return [(start, start + self.max_residues) for start in [*starts, num_residues - self.max_residues]]
