"""Overlapping windows for proteins that are too long for one forward pass."""

from typing import NamedTuple


class Windowing(NamedTuple):
    """Settings for the windows of long proteins: `max_residues` per window, `overlap` shared with the next.

    The last window ends with the protein, so its overlap may be larger. The vector of a residue in several windows, and
    that of BOS, is the mean over the windows.
    """

    max_residues: int
    overlap: int
    batch_tokens: int

    def split(self, num_residues: int) -> list[tuple[int, int]]:
        """Return the (start, stop) of each window in residues; a protein of at most `max_residues` has one."""
        if num_residues <= self.max_residues:
            return [(0, num_residues)]
        starts = list(range(0, num_residues - self.max_residues, self.max_residues - self.overlap))
        return [(start, start + self.max_residues) for start in [*starts, num_residues - self.max_residues]]
