"""Families of related proteins, and an alignment of two of them that is counted column by column."""

import random

from Bio.Align import PairwiseAligner, substitution_matrices

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
ALIGNER = PairwiseAligner(mode="local", substitution_matrix=substitution_matrices.load("BLOSUM62"))
ALIGNER.open_gap_score, ALIGNER.extend_gap_score = -11, -1


def draw_sequence(generator: random.Random, residues: int) -> str:
    return "".join(generator.choices(LETTERS, k=residues))


def mutate(generator: random.Random, sequence: str, share_kept: float) -> str:
    return "".join(c if generator.random() < share_kept else generator.choice(LETTERS) for c in sequence)


def draw_relatives(generator: random.Random, number: int, lengths: tuple[int, ...] = (25, 60, 100)) -> list[str]:
    """A founder, and mutated copies, fragments and copies with an insertion or a deletion of it."""
    founder = draw_sequence(generator, generator.choice(lengths))
    members = [founder]
    for _ in range(number - 1):
        copy = mutate(generator, founder, generator.choice([0.97, 0.85, 0.7, 0.55, 0.45]))
        place = generator.randrange(1, len(copy) - 1)
        kind = generator.choice(["copy", "fragment", "insertion", "deletion"])
        if kind == "fragment":
            copy = copy[place // 2 : place // 2 + max(8, 2 * len(copy) // 3)]
        elif kind == "insertion":
            copy = copy[:place] + draw_sequence(generator, generator.randint(1, 15)) + copy[place:]
        elif kind == "deletion":
            copy = copy[:place] + copy[place + generator.randint(1, 5) :]
        members.append(copy)
    return members


def measure_identity(first: str, second: str) -> tuple[int, int, int]:
    """Count the equal columns, the columns and the covered residues of the shorter one, from the text of an alignment.

    The shorter sequence, or the first in the alphabet, is aligned with the other one.
    """
    first, second = sorted((first, second), key=lambda sequence: (len(sequence), sequence))
    alignments = ALIGNER.align(first, second)
    if not len(alignments):
        return 0, 0, 0
    rows = alignments[0][0], alignments[0][1]
    equal = sum(one == other for one, other in zip(*rows, strict=True))
    covered = [len(row.replace("-", "")) for row in rows]
    return equal, len(rows[0]), covered[0] if len(first) < len(second) else max(covered)
