"""Scores of multi-label tasks and of several values per protein agree with scikit-learn and scipy on each replicate."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from esm2kit.tasks.column_metrics import build_column_scorer, group_by_column
from esm2kit.tasks.label_metrics import (
    LABEL_METRICS,
    build_label_scorer,
    choose_threshold,
    compute_per_label,
)
from esm2kit.tasks.metrics import build_class_scorer, sample_counts, score_seeds


def score_by_scikit_learn(truth_NL, probability_NL, threshold):
    called_NL = (probability_NL > threshold).astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels without positives
        auroc_L = [
            sk.roc_auc_score(truth_N, score_N)
            for truth_N, score_N in zip(truth_NL.T, probability_NL.T, strict=True)
            if 0 < truth_N.sum() < len(truth_N)
        ]
        mcc_L = [sk.matthews_corrcoef(*pair) for pair in zip(truth_NL.T, called_NL.T, strict=True)]
        return {
            "macro_f1": sk.f1_score(truth_NL, called_NL, average="macro", zero_division=0),
            "micro_f1": sk.f1_score(truth_NL, called_NL, average="micro", zero_division=0),
            "samples_f1": sk.f1_score(truth_NL, called_NL, average="samples", zero_division=0),
            "map": sk.average_precision_score(truth_NL, probability_NL, average="macro"),
            "auroc": np.mean(auroc_L) if auroc_L else np.nan,
            "mcc": np.mean(mcc_L),
            "subset_accuracy": sk.accuracy_score(truth_NL, called_NL),
        }


@given(
    seed=st.integers(0, 10_000),
    labels=st.integers(2, 6),
    size=st.integers(3, 60),
    ties=st.booleans(),
    share=st.sampled_from([0.02, 0.3, 0.9]),
)
@settings(max_examples=60, deadline=None)
def test_label_metrics_agree_with_scikit_learn_on_every_replicate(seed, labels, size, ties, share):
    """Random labels include proteins without labels, and labels without positive or without negative proteins."""
    generator = np.random.default_rng(seed)
    truth_NL = (generator.random((size, labels)) < share).astype(int)
    probability_NL = generator.random((size, labels))
    probability_NL = probability_NL.round(1) if ties else probability_NL
    protein_N = generator.integers(0, 8, size)
    counts_RP = np.vstack([np.ones((1, 8), int), sample_counts(8, 3, seed)])
    found = build_label_scorer(truth_NL, probability_NL, protein_N, 0.35)(counts_RP)
    assert set(found) == set(LABEL_METRICS)
    for replicate, counts_P in enumerate(counts_RP):
        rows = np.repeat(np.arange(size), counts_P[protein_N])
        if len(rows) < 2:
            continue  # scikit-learn has no score of nothing
        expected = score_by_scikit_learn(truth_NL[rows], probability_NL[rows], 0.35)
        for name, value in expected.items():
            assert found[name][replicate] == pytest.approx(value, abs=1e-9, nan_ok=True), name


def test_a_label_set_is_scored_as_the_bits_of_an_integer_class():
    """FLIP's task bind has its three labels as bits; both forms have equal macro-F1, MCC and accuracy."""
    generator = np.random.default_rng(1)
    truth_NL, called_NL = generator.integers(0, 2, (2, 200, 3))
    powers, protein_N = 1 << np.arange(3), np.arange(200) // 2
    counts_RP = sample_counts(100, 20, 0)
    ours = build_label_scorer(truth_NL, called_NL.astype(float), protein_N)(counts_RP)
    bits = build_class_scorer(truth_NL @ powers, called_NL @ powers, protein_N, 100, 8, 3)(counts_RP)
    for name, other in (("macro_f1", "macro_f1"), ("mcc", "mcc"), ("subset_accuracy", "accuracy")):
        np.testing.assert_allclose(ours[name], bits[other], atol=1e-12)


def test_the_table_of_labels_agrees_with_scikit_learn():
    generator = np.random.default_rng(2)
    truth_NL, probability_NL = (generator.random((50, 4)) < 0.3).astype(int), generator.random((50, 4))
    truth_NL[:, 3] = 0
    table = compute_per_label(truth_NL, probability_NL, ("a", "b", "c", "d"), 0.6)
    for place, label in enumerate("abc"):
        truth_N, called_N = truth_NL[:, place], probability_NL[:, place] > 0.6
        precision, recall, f1, _ = sk.precision_recall_fscore_support(truth_N, called_N, average="binary")
        expected = {"precision": precision, "recall": recall, "f1": f1, "support": truth_N.sum()}
        expected |= {"mcc": sk.matthews_corrcoef(truth_N, called_N)}
        expected |= {"map": sk.average_precision_score(truth_N, probability_NL[:, place])}
        assert table[label] == pytest.approx(expected | {"auroc": sk.roc_auc_score(truth_N, probability_NL[:, place])})
    assert table["d"]["auroc"] is None
    assert table["d"]["map"] == table["d"]["support"] == 0


def test_the_threshold_is_that_of_the_best_macro_f1_and_one_half_unless_another_is_better():
    truth_NL = np.array([[1, 0], [1, 1], [0, 1], [0, 0]])
    assert choose_threshold(truth_NL, truth_NL * 0.9 + 0.05) == 0.5  # all candidates from 0.05 to 0.95 are perfect
    assert choose_threshold(truth_NL, truth_NL * 0.19 + 0.1) == 0.25  # perfect from 0.10 to 0.25
    assert choose_threshold(truth_NL, truth_NL * 0.2 + 0.71) == 0.75
    assert choose_threshold(np.zeros((3, 2), int), np.full((3, 2), 0.7)) == 0.5


def test_a_perfect_multilabel_score_has_the_interval_of_the_rule_of_three():
    truth_NL = np.random.default_rng(0).integers(0, 2, (30, 3))
    scores = score_seeds([build_label_scorer(truth_NL, truth_NL * 1.0, np.arange(30))], sample_counts(30, 100, 0))
    assert scores["subset_accuracy"].interval.low == pytest.approx(0.05 ** (1 / 30))
    assert np.isnan(scores["macro_f1"].interval.low)


@given(seed=st.integers(0, 10_000), columns=st.integers(2, 4), size=st.integers(12, 50))
@settings(max_examples=30, deadline=None)
def test_scores_of_several_values_are_those_of_each_and_their_mean(seed, columns, size):
    """Missing cells are left out; the mean over targets is scikit-learn's uniform average of separate columns."""
    generator = np.random.default_rng(seed)
    truth_NC = generator.normal(size=(size, columns)) * 10.0 ** generator.integers(-3, 4, columns)
    predicted_NC = truth_NC + generator.normal(size=(size, columns)) * np.abs(truth_NC).mean(0)
    truth_NC[generator.random((size, columns)) < 0.3] = np.nan
    truth_NC[:2] = [[1.0] * columns, [2.0] * columns]
    names, spreads = [f"t{place} (C)" for place in range(columns)], np.nanstd(truth_NC, axis=0)
    found = build_column_scorer(truth_NC, predicted_NC, np.arange(size), names, spreads)(np.ones((1, size), int))
    own = group_by_column(found, names)
    expected = {name: [] for name in ("spearman", "pearson", "r2", "rmse")}
    for place, name in enumerate(names):
        known = ~np.isnan(truth_NC[:, place])
        truth_N, predicted_N = truth_NC[known, place], predicted_NC[known, place]
        values = {
            "spearman": stats.spearmanr(truth_N, predicted_N).statistic,
            "pearson": stats.pearsonr(truth_N, predicted_N).statistic,
            "r2": sk.r2_score(truth_N, predicted_N),
            "rmse": sk.root_mean_squared_error(truth_N, predicted_N),
        }
        for metric, value in values.items():
            assert own[name][metric][0] == pytest.approx(value, rel=1e-8, abs=1e-9), (name, metric)
            expected[metric].append(value / (spreads[place] if metric == "rmse" else 1.0))
    for metric, values in expected.items():
        assert found[metric][0] == pytest.approx(np.mean(values), rel=1e-8, abs=1e-9), metric
