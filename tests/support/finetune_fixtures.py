"""A tiny ESM-2 model, and tasks of all four kinds whose labels follow from the sequence, for the fine-tuning tests."""

from pathlib import Path

import numpy as np

from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2

SHAPE = ESM2Config(2, 32, 4)
SETS = ("train",) * 4 + ("validation", "test")


def write_tiny_model(path: Path, seed: int = 0, shape: ESM2Config = SHAPE) -> Path:
    esm2 = ESM2.initialised(shape, seed)
    tensors = {f"model.{name}": tensor for name, tensor in esm2.state_dict().items()}
    write_checkpoint(path, tensors, {"model": shape, "step": 0})
    return path


def write_tasks(folder: Path, proteins: int = 96, shuffled: bool = False) -> Path:
    """Write the tasks protein_class, protein_value, residue_class (with masks) and residue_value.

    The share of leucine determines the label of a protein, the leucines among three neighbours that of a residue.
    """
    generator = np.random.default_rng(3)
    protein_class, protein_value, residue_class, residue_value = [], [], [], []
    for number in range(proteins):
        residues = int(generator.integers(8, 60))
        share = generator.uniform(0.05, 0.6)
        pool = np.array(list("LAGVSERTIDPKQNFYMHWC"))
        weights = np.full(20, (1 - share) / 19)
        weights[0] = share
        letters = generator.choice(pool, residues, p=weights)
        head = f">p{number} SET={'test' if SETS[number % 6] == 'test' else 'train'}"
        head += f" VALIDATION={SETS[number % 6] == 'validation'} TARGET="
        leucine = (letters == "L").astype(float)
        near = np.convolve(leucine, np.ones(3), "same")
        if shuffled:
            share, near = generator.uniform(0.05, 0.6), generator.integers(0, 3, residues).astype(float)
        sequence, count = "".join(letters), leucine.mean() if not shuffled else share
        mask = "".join("0" if number % 5 == 0 and place > 2 else "1" for place in range(residues))
        protein_class.append(f"{head}{'rich' if count > 0.3 else 'poor'}\n{sequence}\n")
        protein_value.append(f"{head}{count * 10:.4f}\n{sequence}\n")
        labels = "".join("ABC"[min(int(value), 2)] for value in near)
        residue_class.append(f"{head}{labels} MASK={mask}\n{sequence}\n")
        residue_value.append(f"{head}{';'.join(str(value) for value in near)}\n{sequence}\n")
    for name, records in (
        ("protein_class", protein_class),
        ("protein_value", protein_value),
        ("residue_class", residue_class),
        ("residue_value", residue_value),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "own.fasta").write_text("".join(records))
    return folder
