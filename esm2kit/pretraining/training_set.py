"""A preprocessed dataset: its sequences, its clusters, its fingerprint and its unigram baseline."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.paths import expand_path
from esm2kit.sequences.alphabet import RESIDUE_LETTERS, TOKENS, VOCAB_SIZE, encode
from esm2kit.sequences.clusters import ClusterIndex
from esm2kit.sequences.dataset import check_dataset
from esm2kit.sequences.store import SequenceStore

MAX_ROWS = 100_000  # residues are counted on at most this many cluster representatives, evenly spaced


class Unigram(NamedTuple):
    """The unigram baseline, which predicts each residue by its frequency.

    Args:
        log_shares_V: (V,) log share of each residue, counted on cluster representatives of the training set with one
            pseudocount per residue. The entries of other tokens have no meaning.
        perplexity: Perplexity of the baseline on the validation set. A model that learns must be below it.
    """

    log_shares_V: np.ndarray
    perplexity: float


@dataclass(frozen=True)
class TrainingSet:
    """A dataset from `esm2kit preprocess`; its files are memory-mapped, so it opens fast at any size.

    Args:
        folder: Folder of the dataset.
        train: The training sequences.
        clusters: Their clusters.
        manifest: Provenance and counts from `manifest.json`.
    """

    folder: Path
    train: SequenceStore
    clusters: ClusterIndex
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, every_byte: bool = False) -> "TrainingSet":
        """Open a dataset.

        Args:
            folder: A finished output folder of `esm2kit preprocess`.
            every_byte: Compare also large files completely with their checksums, see `check_dataset`.

        Returns:
            The opened dataset.

        Raises:
            InputError: The folder is missing, unfinished or damaged.
        """
        folder = expand_path(folder)
        manifest = check_dataset(folder, every_byte)
        return cls(folder, SequenceStore.open(folder / "train.arrow"), ClusterIndex.open(folder), manifest)

    @cached_property
    def valid(self) -> SequenceStore:
        """The validation sequences.

        Raises:
            InputError: The dataset has no validation set.
        """
        if not (self.folder / "valid.arrow").is_file():
            raise InputError(
                f"{self.folder} has no validation set. Run preprocess again with --val_size or --valid_fasta.",
                code="dataset.no-validation",
                path=self.folder,
            )
        return SequenceStore.open(self.folder / "valid.arrow")

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over everything that determines the samples: the hashes of the input files and the split.

        Two datasets from the same input files and settings have the same fingerprint.
        """
        config, inputs = self.manifest["config"], self.manifest["inputs"]
        split = [config[name] for name in ("seed", "val_size", "test_size")]
        hashes = {role: [file["sha256"] for file in files] for role, files in sorted(inputs.items())}
        return hashlib.sha256(json.dumps([hashes, split]).encode()).hexdigest()

    @cached_property
    def unigram(self) -> Unigram:
        """The unigram baseline of residue frequencies."""
        valid = self.valid
        rows = self.clusters.representative_rows[:: -(-self.clusters.num_clusters // MAX_ROWS)]
        counts_V = _residue_counts(self.train, rows) + 1
        log_shares_V = np.log(counts_V / counts_V[list(map(TOKENS.index, RESIDUE_LETTERS))].sum())
        observed_V = _residue_counts(valid, range(len(valid)))
        return Unigram(log_shares_V, float(np.exp(-(observed_V * log_shares_V).sum() / observed_V.sum())))


def _residue_counts(store: SequenceStore, rows: Iterable[int]) -> np.ndarray:
    counts_V = np.zeros(VOCAB_SIZE)
    for row in rows:
        counts_V += np.bincount(encode(store.residues(int(row))), minlength=VOCAB_SIZE)
    return counts_V
