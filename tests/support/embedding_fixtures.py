"""A small model, random proteins, and comparisons of embeddings files."""

import dataclasses
from pathlib import Path

import h5py
import numpy as np

from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.sequences.alphabet import STANDARD_RESIDUES

CONFIG = ESM2Config(2, 32, 4)


def write_model(path: Path) -> Path:
    """Write a small esm2kit checkpoint."""
    state = {f"model.{name}": tensor for name, tensor in ESM2.initialised(CONFIG, seed=0).state_dict().items()}
    write_checkpoint(path, state, {"model": dataclasses.asdict(CONFIG)})
    return path


def random_proteins(num_residues: list[int], seed: int = 0) -> dict[str, str]:
    generator = np.random.default_rng(seed)
    letters = np.array(list(STANDARD_RESIDUES))
    return {f"p{index}": "".join(generator.choice(letters, count)) for index, count in enumerate(num_residues)}


def write_fasta(path: Path, proteins: dict[str, str] | list[tuple[str, str]]) -> Path:
    pairs = proteins.items() if isinstance(proteins, dict) else proteins
    path.write_text("".join(f">{name} description\n{sequence}\n" for name, sequence in pairs), encoding="utf-8")
    return path


def values_of(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {key: file[key][()] for key in file}


def every_output(fasta: Path, out_dir: Path, model: Path) -> EmbedConfig:
    """All outputs of two layers, with proteins of more than 120 residues in windows."""
    return EmbedConfig(
        fasta,
        out_dir,
        model=str(model),
        repr_layers=[0, -1],
        per_residue=True,
        bos=True,
        logits=True,
        long_proteins="window",
        max_residues=120,
        window_overlap=20,
        batch_tokens=125,
        device="cpu",
    )


def assert_same_files(found: tuple[Path, ...], expected: tuple[Path, ...], atol: float = 0.0) -> None:
    """Check that keys, ids and values are equal."""
    for first, second in zip(found, expected, strict=True):
        assert EmbeddingReader(first).ids == EmbeddingReader(second).ids
        left, right = values_of(first), values_of(second)
        assert left.keys() == right.keys()
        for key, value in left.items():
            if value.dtype.kind == "O":  # the ids of the packed layout
                assert value.tolist() == right[key].tolist()
                continue
            np.testing.assert_allclose(value, right[key], atol=atol, rtol=0)
