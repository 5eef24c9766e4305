"""Inputs of public bug reports that failed: many classes, small, large and shifted values, empty reports."""

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from esm2kit.tasks.metrics import build_class_scorer, sample_counts

SCALES = [(1e-9, 0.0), (1e9, 0.0), (1.0, 1e8), (1e300, 0.0), (1e-300, 0.0), (1e-9, 1e-3)]


def compute_old_class_metrics(truth, predicted, counts_N, classes):
    """The metrics of one replicate from its confusion matrix, as they were computed before."""
    matrix = np.zeros((classes, classes))
    np.add.at(matrix, (truth, predicted), counts_N)
    true, called, hit, total = matrix.sum(1), matrix.sum(0), np.diagonal(matrix), matrix.sum()
    spread = np.sqrt((total**2 - (true**2).sum()) * (total**2 - (called**2).sum()))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "accuracy": hit.sum() / total,
            "balanced_accuracy": np.mean((hit / true)[true > 0]),
            "macro_f1": np.mean((2 * hit / (true + called))[true + called > 0]),
            "mcc": (hit.sum() * total - (true * called).sum()) / spread if spread > 0 else 0.0,
        }


@given(seed=st.integers(0, 10_000), classes=st.integers(2, 90), size=st.integers(2, 60), proteins=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
@pytest.mark.filterwarnings("ignore:The number of unique classes is greater than 50%")
def test_margins_give_the_metrics_of_confusion_matrices(seed, classes, size, proteins):
    """TAPE remote homology: DeepSF#1, Ankh#50. Small cases keep their values to the last bits of a sum."""
    generator = np.random.default_rng(seed)
    truth, predicted = generator.integers(0, classes, (2, size))
    protein = generator.integers(0, proteins, size)
    counts = np.vstack([np.ones((1, proteins), int), sample_counts(proteins, 20, seed)])
    found = build_class_scorer(truth, predicted, protein, proteins, classes)(counts)
    for replicate, count in enumerate(counts):
        if not count[protein].any():
            continue
        expected = compute_old_class_metrics(truth, predicted, count[protein], classes)
        for name, value in expected.items():
            assert found[name][replicate] == pytest.approx(value, rel=1e-14, abs=1e-15), name
    assert found["macro_f1"][0] == pytest.approx(sk.f1_score(truth, predicted, average="macro", zero_division=0))
    assert found["mcc"][0] == pytest.approx(sk.matthews_corrcoef(truth, predicted), abs=1e-12)


def test_1195_folds_over_718_proteins_take_little_memory_and_seconds():
    """TAPE's remote homology task (DeepSF#1, Ankh#50); the confusion matrices of all proteins would take 8 GB."""
    code = (
        "import resource, numpy as np\n"
        "from esm2kit.tasks.metrics import build_class_scorer, sample_counts, score_seeds\n"
        "truth, other = np.random.default_rng(0).integers(0, 1195, (2, 718))\n"
        "predicted = np.where(np.arange(718) % 4 == 0, truth, other)\n"
        "found = score_seeds([build_class_scorer(truth, predicted, np.arange(718), 718, 1195)], sample_counts(718))\n"
        "print(found['accuracy'].interval.value, (truth == predicted).mean(),\n"
        "      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    accuracy, share, kilobytes = map(float, done.stdout.split())
    assert accuracy == share
    assert kilobytes < 400_000
    assert time.monotonic() - started < 60
