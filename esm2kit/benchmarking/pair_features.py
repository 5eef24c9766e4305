"""Features of pairs of proteins, and scores of test pairs by the number of their proteins that train has."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from esm2kit.benchmarking.config import ATTENTION
from esm2kit.benchmarking.probes.features import Features, Fitted
from esm2kit.benchmarking.probes.heads import reads_residues
from esm2kit.benchmarking.report import Metric
from esm2kit.benchmarking.scores import sample_test_counts, score_fitted
from esm2kit.core.errors import InputError
from esm2kit.tasks.pairs import SHARED, count_shared
from esm2kit.tasks.task import PairFeatures
from esm2kit.tasks.task_data import TaskData

FEWEST_PAIRS = 5  # of a class of test pairs that has scores of its own


def combine_vectors(first_ND: Tensor, second_ND: Tensor, how: PairFeatures) -> Tensor:
    """Combine the vectors of two proteins.

    Args:
        first_ND: (N, D) vectors of the first proteins.
        second_ND: (N, D) vectors of the second proteins.
        how: symmetric is the sum, the absolute difference and the product, bit for bit the same for (A, B) and (B, A);
            concat is one vector after the other.

    Returns:
        (N, 3 D) or (N, 2 D).
    """
    if how == "concat":
        return torch.cat([first_ND, second_ND], dim=1)
    return torch.cat([first_ND + second_ND, (first_ND - second_ND).abs(), first_ND * second_ND], dim=1)


def list_proteins(data: TaskData) -> TaskData:
    """Return the different proteins of a task of pairs as a task without labels, which can be embedded."""
    names = [*data.pairs.first_ids, *data.pairs.second_ids]
    name_of = dict(zip([*data.sequences, *data.pairs.second], names, strict=True))
    count = len(name_of)
    # two proteins may have one sequence, and then one name stands for both
    return replace(
        data,
        ids=list(name_of.values()),
        sequences=list(name_of),
        sets=np.full(count, "train"),
        targets=np.zeros(count, dtype=np.int64),
        scored=np.ones(count, dtype=bool),
        pairs=None,
    )


def combine_features(features: Features, data: TaskData) -> Features:
    """Combine the vectors of proteins, in the order of `list_proteins`, to those of the pairs."""
    row_of = {sequence: row for row, sequence in enumerate(list_proteins(data).sequences)}
    first, second = (
        np.array([row_of[sequence] for sequence in chosen]) for chosen in (data.sequences, data.pairs.second)
    )
    vectors_ND = features.take(np.arange(len(row_of)))
    values_PX = combine_vectors(vectors_ND[first], vectors_ND[second], data.pairs.features)
    return Features(values_PX.numpy(), np.arange(len(first) + 1), features.name)


def check_pair_options(probe: str, poolings: Sequence[str], allow_missing: bool) -> None:
    """Check that a benchmark of pairs has no option that needs single proteins.

    Args:
        probe: Name of the probe.
        poolings: How the vectors of a protein are pooled.
        allow_missing: Whether proteins may be left out.

    Raises:
        InputError: It has one.
    """
    wrong = "allow_missing" if allow_missing else ""
    if ATTENTION in poolings:
        wrong = "pooling attention, which reads vectors of residues"
    elif reads_residues(probe):
        wrong = f"probe {probe}, which reads vectors of residues"
    if wrong:
        raise InputError(
            f"pairs of proteins do not work with {wrong}. Use one vector per protein, and all proteins.",
            code="pairs.option",
            found=wrong,
        )


def score_by_shared(fitted: Fitted, data: TaskData, resamples: int) -> dict[str, dict[str, Metric]]:
    """Score test pairs by the number of their proteins that train has.

    Args:
        fitted: Predictions of the test pairs.
        data: The task of pairs.
        resamples: Number of bootstrap replicates.

    Returns:
        "0", "1" and "2" -> metric -> score; without classes of fewer than FEWEST_PAIRS pairs.
    """
    shared, is_test = count_shared(data.pairs, data.sets), data.sets == "test"
    found = {}
    for number in SHARED:
        chosen = is_test & (shared == number)
        if chosen.sum() < FEWEST_PAIRS:
            continue
        part = data.subset(np.flatnonzero(~is_test | chosen))
        logits_MC = fitted.test_logits_MC
        own = fitted._replace(
            test_SM=fitted.test_SM[:, chosen[is_test]],
            test_logits_MC=None if logits_MC is None else logits_MC[chosen[is_test]],
        )
        scores = score_fitted(own, part, sample_test_counts(part, resamples))
        found[str(number)] = {name: Metric.from_score(score) for name, score in scores.items()}
    return found
