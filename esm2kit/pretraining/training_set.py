"""A preprocessed folder, opened once: its sequences, its clusters, and what identifies and describes them."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.sequences.alphabet import RESIDUE_LETTERS, TOKENS, VOCAB_SIZE, encode
from esm2kit.sequences.clusters import ClusterIndex
from esm2kit.sequences.dataset import check_dataset
from esm2kit.sequences.store import SequenceStore

MAX_ROWS = 100_000  # of cluster representatives that residues are counted on, evenly spaced


class Unigram(NamedTuple):
    """The baseline of residue frequencies alone.

    log_shares_V: log of each residue's share among all, counted on cluster representatives of the training set. One
    count is added to each residue, so that none is impossible; other tokens' entries have no meaning.
    perplexity: of every residue of the validation set, predicted by its frequency: the floor a model must get below.
    """

    log_shares_V: np.ndarray
    perplexity: float


@dataclass(frozen=True)
class TrainingSet:
    """What `esm2kit preprocess` made; the files are memory-mapped, so opening costs the same at any size.

    Args:
        folder: where it is.
        train: the training sequences.
        clusters: their clusters.
        manifest: how they were made.
    """

    folder: Path
    train: SequenceStore
    clusters: ClusterIndex
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "TrainingSet":
        """Open a folder.

        Args:
            folder: a finished output of `esm2kit preprocess`.
        Raises:
            InputError: the folder is missing, unfinished or damaged.
        """
        folder = Path(folder)
        if folder.is_file():
            raise InputError(
                f"{folder} is a file: give the folder that `esm2kit preprocess {folder}` makes of it",
                code="dataset.file",
                path=folder,
            )
        if not folder.is_dir():
            raise InputError(
                f"{folder} is not there: `esm2kit preprocess` makes it", code="dataset.missing", path=folder
            )
        manifest = check_dataset(folder, every_byte=False)
        return cls(folder, SequenceStore.open(folder / "train.arrow"), ClusterIndex.open(folder), manifest)

    @cached_property
    def valid(self) -> SequenceStore:
        """The validation sequences.

        Raises:
            InputError: the folder has none.
        """
        if not (self.folder / "valid.arrow").is_file():
            raise InputError(
                f"{self.folder} has no validation set: preprocess again, with --val_size or --valid_fasta",
                code="dataset.no-validation",
                path=self.folder,
            )
        return SequenceStore.open(self.folder / "valid.arrow")

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over what decides the samples: the input files' hashes and the split.

        Two folders made from the same input by the same settings have the same one, whenever and wherever made.
        """
        config, inputs = self.manifest["config"], self.manifest["inputs"]
        split = [config[name] for name in ("seed", "val_size", "test_size")]
        hashes = {role: [file["sha256"] for file in files] for role, files in sorted(inputs.items())}
        return hashlib.sha256(json.dumps([hashes, split]).encode()).hexdigest()

    @cached_property
    def unigram(self) -> Unigram:
        """The baseline of residue frequencies alone."""
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
