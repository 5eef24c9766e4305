"""The unigram baseline: how well residue frequencies alone predict a validation set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.sequences.alphabet import RESIDUE_LETTERS, TOKENS, VOCAB_SIZE, encode
from esm2kit.sequences.clusters import ClusterIndex
from esm2kit.sequences.store import SequenceStore


def unigram_perplexity(folder: Path, max_rows: int = 100_000) -> float:
    """Validation perplexity of knowing only how frequent each residue is: the floor a model has to get below.

    Perplexity is taken over every residue of the validation set.

    Args:
        folder: what `esm2kit preprocess` made.
        max_rows: count on this many representatives at most, evenly spaced.
    """
    if not folder.is_dir():
        found = f"is a file: give the folder that `esm2kit preprocess {folder}` makes of it"
        raise InputError(f"{folder} " + (found if folder.is_file() else "is not there: `esm2kit preprocess` makes it"))
    ClusterIndex.open(folder)  # says so where there is no finished dataset at all
    if not (folder / "valid.arrow").is_file():
        raise InputError(f"{folder} has no validation set: preprocess anew, with --val_size or --valid_fasta")
    valid = SequenceStore.open(folder / "valid.arrow")
    observed = _residue_counts(valid, range(len(valid)))
    return float(np.exp(-(observed * unigram_log_shares(folder, max_rows)).sum() / observed.sum()))


def unigram_log_shares(folder: Path, max_rows: int = 100_000) -> np.ndarray:
    """(V,) log of each residue's share among all, counted on cluster representatives of the training set.

    One count is added to each residue, so that none is impossible; tokens that are no residue have no meaning here.

    Args:
        folder: what `esm2kit preprocess` made.
        max_rows: count on this many representatives at most, evenly spaced.
    """
    index, train = ClusterIndex.open(folder), SequenceStore.open(folder / "train.arrow")
    counts_V = _residue_counts(train, index.representative_rows[:: -(-index.num_clusters // max_rows)]) + 1
    return np.log(counts_V / counts_V[list(map(TOKENS.index, RESIDUE_LETTERS))].sum())


def _residue_counts(store: SequenceStore, rows: Sequence[int]) -> np.ndarray:
    counts_V = np.zeros(VOCAB_SIZE)
    for row in rows:
        counts_V += np.bincount(encode(store.residues(int(row))), minlength=VOCAB_SIZE)
    return counts_V
