"""A FASTA of proteins and a table of measurements as a laboratory has them, with a value that follows the sequence."""

import random
from pathlib import Path
from typing import NamedTuple

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
WEIGHTS = (8, 1, 5, 6, 4, 7, 2, 6, 6, 10, 2, 4, 5, 4, 5, 7, 5, 7, 1, 3)
ORGANISMS = ("Escherichia coli", "Thermus thermophilus", "Homo sapiens")


class Measurements(NamedTuple):
    """Paths of the files, and the planted values of all proteins."""

    fasta: Path
    labels: Path
    new_fasta: Path
    values: dict[str, float]


def write_measurements(folder: Path, proteins: int = 120, new: int = 30, seed: int = 0) -> Measurements:
    """Write my.fasta, measurements.csv (Protein,Tm (C),Organism) and new.fasta; Tm follows the share of E, K and R."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    records, values = [], {}
    for number in range(proteins + new):
        charge = generator.uniform(0.5, 3)
        weights = [weight * (charge if letter in "EKR" else 1) for letter, weight in zip(LETTERS, WEIGHTS, strict=True)]
        sequence = "M" + "".join(generator.choices(LETTERS, weights, k=generator.randint(60, 160)))
        share = sum(letter in "EKR" for letter in sequence) / len(sequence)
        values[f"P{number + 1:03}"] = round(30 + 80 * share + generator.gauss(0, 1), 1)
        records.append(f">P{number + 1:03} protein {number + 1}\n{sequence}\n")
    (folder / "my.fasta").write_text("".join(records[:proteins]), encoding="utf-8")
    (folder / "new.fasta").write_text("".join(records[proteins:]), encoding="utf-8")
    rows = [f"{name},{value},{generator.choice(ORGANISMS)}" for name, value in list(values.items())[:proteins]]
    generator.shuffle(rows)
    (folder / "measurements.csv").write_text("\n".join(["Protein,Tm (C),Organism", *rows]) + "\n", encoding="utf-8")
    return Measurements(folder / "my.fasta", folder / "measurements.csv", folder / "new.fasta", values)
