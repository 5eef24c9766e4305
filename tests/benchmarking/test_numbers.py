"""Scores of many classes, of small, large and shifted values, and the digits that are printed."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from support.errors import refused
from support.reports import report as small_report
from support.reports import row, score

from esm2kit.benchmarking.baselines.fit import encode_one_hot, fit_baseline
from esm2kit.benchmarking.compare import compare
from esm2kit.benchmarking.config import CompareConfig
from esm2kit.benchmarking.page import format_metric_cell
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, Fitted, ProbeTargets, compute_column_moments
from esm2kit.benchmarking.probes.fit import fit_probe
from esm2kit.benchmarking.report import Metric, Report, format_comparison, format_value
from esm2kit.benchmarking.scores import ScoredModel, format_score, score_fitted
from esm2kit.core.files import to_json
from esm2kit.core.numbers import format_decimals
from esm2kit.tasks.metrics import Interval, Score, build_class_scorer, build_value_scorer, sample_counts, score_seeds
from esm2kit.tasks.scaling import TargetScale
from esm2kit.tasks.task import Split, Task
from esm2kit.tasks.task_data import TaskData

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


def test_1195_folds_over_718_proteins_take_little_memory():
    """TAPE's remote homology task (DeepSF#1, Ankh#50); the confusion matrices of all proteins would take 8 GB."""
    code = (
        "import numpy as np\n"
        "from esm2kit.tasks.metrics import build_class_scorer, sample_counts, score_seeds\n"
        "truth, other = np.random.default_rng(0).integers(0, 1195, (2, 718))\n"
        "predicted = np.where(np.arange(718) % 4 == 0, truth, other)\n"
        "found = score_seeds([build_class_scorer(truth, predicted, np.arange(718), 718, 1195)], sample_counts(718))\n"
        "peak = open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]\n"
        "print(found['accuracy'].interval.value, (truth == predicted).mean(), peak)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    accuracy, share, kilobytes = map(float, done.stdout.split())
    assert accuracy == share
    assert kilobytes < 250_000


def make_class_task(classes, test=200):
    labels = tuple(f"a.{number}" for number in range(classes))
    task = Task("folds", "protein", "class", "accuracy", {"s": Split()}, "s", labels=labels)
    sets = np.array(["train", "validation"] * 5 + ["test"] * test)
    targets = np.arange(len(sets)) % classes
    ids = [f"p{number}" for number in range(len(sets))]
    sequences = ["ACDEFGHIKL"[number % 5 :] for number in range(len(sets))]
    return TaskData(task, "s", ids, sequences, sets, targets, np.ones(len(sets), bool), {})


def build_row(data, predicted):
    fitted = Fitted(predicted[None], np.empty((1, 0)))
    scores = score_fitted(fitted, data, sample_counts(len(predicted), 50))
    return ScoredModel("m", "probe", "", {}, fitted, scores).to_row(data, [0])


def test_many_classes_list_their_most_frequent_confusions_instead_of_a_matrix():
    """agemagician/Ankh#50: a matrix of 1,195 classes has 1.4 million cells."""
    data = make_class_task(400)
    truth = data.targets[data.target_rows("test")]
    predicted = truth.copy()
    predicted[:30], predicted[30] = 7, 8
    truth[:30], truth[30] = 9, 9
    data.targets[data.target_rows("test")] = truth
    row = build_row(data, predicted)
    assert row.confusion == []
    assert row.confused == [
        {"true": "a.9", "predicted": "a.7", "count": 30},
        {"true": "a.9", "predicted": "a.8", "count": 1},
    ]
    assert row.per_class["a.7"]["precision"] == pytest.approx(np.mean(truth[predicted == 7] == 7))
    assert len(json.dumps(to_json(row))) < 60_000


def test_few_classes_keep_their_confusion_matrix():
    data = make_class_task(50)
    truth = data.targets[data.target_rows("test")]
    row = build_row(data, (truth + 1) % 50)
    assert np.array_equal(row.confusion, sk.confusion_matrix(truth, (truth + 1) % 50))
    assert row.confused == []


def make_variants(scale=1.0, shift=0.0, num=120):
    """Variants at three sites, with a value that is a sum over the sites and some noise."""
    generator = np.random.default_rng(3)
    wild, effect = list("MKVLAAGGHHWWYYTTSSPP"), generator.normal(size=(3, 6))
    sequences, values = [], []
    for _ in range(num):
        chosen, mutant = generator.integers(0, 6, 3), wild.copy()
        for site, letter in enumerate(chosen):
            mutant[5 + 4 * site] = "ACDEFG"[letter]
        sequences.append("".join(mutant))
        values.append(effect[np.arange(3), chosen].sum() + 0.3 * generator.normal())
    task = Task("v", "protein", "value", "spearman", {"s": Split()}, "s", variants=True)
    sets = np.array(["train"] * (num // 2) + ["validation"] * (num // 4) + ["test"] * (num // 4))
    ids = [f"v{number}" for number in range(num)]
    values = np.round(np.array(values), 3) * scale + shift
    return TaskData(task, "s", ids, sequences, sets, values, np.ones(num, bool), {})


def fit_row(name, data):
    if name not in ("ridge", "fnn", "light_attention"):
        return fit_baseline(name, data, (0,)).fitted
    features, config = encode_one_hot(data), ProbeConfig(name, epochs=8, hidden=8)
    if name != "light_attention":
        vectors = np.stack([np.asarray(features.values_ND[a:b], dtype=np.float32).ravel()
                            for a, b in pairwise(features.offsets)])  # fmt: skip
        features = Features(vectors, np.arange(len(vectors) + 1))
    return fit_probe(features, ProbeTargets.from_task(data), config, (0,))


def compute_relative_scores(data, fitted, scale, metrics=("spearman", "r2", "pearson", "ndcg", "rmse")):
    """All scores with their intervals; the RMSE relative to the scale."""
    scores = score_fitted(fitted, data, sample_counts(30, 100))
    return {name: np.array(scores[name].interval) / (scale if name == "rmse" else 1.0) for name in metrics}


@pytest.mark.parametrize(("scale", "shift"), SCALES)
@pytest.mark.parametrize("name", ["ridge", "fnn", "light_attention", "mean", "composition", "onehot_ridge",
                                  "onehot_cnn", "levenshtein_nearest", "blosum62_nearest"])  # fmt: skip
def test_scores_do_not_depend_on_the_unit_and_the_offset_of_values(name, scale, shift):
    """Constants in mol/l, counts of 1e9, an offset of 1e8: the same scores within 1e-4, as float32 steps differ."""
    expected = compute_relative_scores(plain := make_variants(), fit_row(name, plain), 1.0)
    data = make_variants(scale, shift)
    found = compute_relative_scores(data, fit_row(name, data), scale)
    for metric, numbers in expected.items():
        np.testing.assert_allclose(found[metric], numbers, rtol=1e-4, atol=1e-4, err_msg=metric)
    assert np.isfinite(found["rmse"]).all()


@given(seed=st.integers(0, 10_000), size=st.integers(4, 60), scaled=st.sampled_from(SCALES))
@settings(max_examples=60, deadline=None)
def test_metrics_do_not_depend_on_the_unit_and_the_offset(seed, size, scaled):
    scale, shift = scaled
    generator = np.random.default_rng(seed)
    truth, predicted = np.round(generator.normal(size=(2, size)), 3)
    counts, proteins = sample_counts(size, 40, seed), np.arange(size)
    expected = score_seeds([build_value_scorer(truth, predicted, proteins)], counts)
    found = score_seeds([build_value_scorer(truth * scale + shift, predicted * scale + shift, proteins)], counts)
    for metric, score_found in found.items():
        numbers = np.array(score_found.interval) / (scale if metric == "rmse" else 1.0)
        np.testing.assert_allclose(numbers, expected[metric].interval, rtol=1e-5, atol=1e-6, err_msg=metric)


def test_small_values_agree_with_scipy_and_scikit_learn():
    truth, predicted = np.random.default_rng(0).normal(size=(2, 50)) * 1e-9
    found = score_seeds([build_value_scorer(truth, predicted, np.arange(50))], sample_counts(50, 200))
    assert found["rmse"].interval.value == pytest.approx(sk.root_mean_squared_error(truth, predicted), rel=1e-12)
    assert found["spearman"].interval.value == pytest.approx(stats.spearmanr(truth, predicted).statistic)
    assert found["rmse"].interval.low < found["rmse"].interval.value < found["rmse"].interval.high


def test_exact_predictions_have_no_error_and_no_interval_at_any_offset():
    truth = np.arange(30.0) + 1e8
    predicted = TargetScale.from_values(truth).restore(TargetScale.from_values(truth).standardise(truth))
    found = score_seeds([build_value_scorer(truth, predicted, np.arange(30))], sample_counts(30, 100))["rmse"]
    assert found.interval.value == 0
    assert np.isnan(found.interval.low)


def test_the_logged_error_of_ridge_is_that_of_its_predictions(caplog):
    """An offset of 1e8 gave a validation RMSE of 1.265 for about 0.34, from a difference of sums of squares."""
    data = make_variants(1.0, 1e8)
    with caplog.at_level("DEBUG", logger="esm2kit"):
        fitted = fit_row("ridge", data)
    validation = data.targets[data.target_rows("validation")]
    rmse = sk.root_mean_squared_error(validation, fitted.validation_SM[0])
    assert f"validation RMSE {format_decimals(rmse)}" in caplog.text


def test_equal_training_values_are_predicted_exactly():
    data = make_variants()
    data.targets[data.target_rows("train")] = 0.1
    for name in ("ridge", "fnn", "onehot_cnn", "mean"):
        assert (fit_row(name, data).test_SM == 0.1).all(), name


def test_raw_values_that_float32_cannot_hold_are_refused():
    """Presets of published protocols train on raw values; those of ordinary size still do."""
    raw = ProbeConfig("fnn", epochs=2, hidden=8, scale_targets=False)
    for scale, shift in ((1.0, 1e8), (1e30, 0.0), (1e-30, 0.0)):
        data = make_variants(scale, shift)
        features = Features(np.ones((120, 3), np.float32), np.arange(121))
        with refused("task.float32"):
            fit_probe(features, ProbeTargets.from_task(data), raw, (0,))
    plain = make_variants(10.0, 50.0)
    assert np.isfinite(fit_probe(features, ProbeTargets.from_task(plain), raw, (0,)).test_SM).all()


def test_columns_are_constant_relative_to_their_size():
    column = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    block = torch.cat([column, column * 1e-10, torch.full((100, 1), 0.1)], dim=1)
    _, scale_D = compute_column_moments([block])
    assert float(scale_D[1] / scale_D[0]) == pytest.approx(1e-10, rel=1e-4)
    assert float(scale_D[2]) == 1


@pytest.mark.parametrize(
    ("metric", "value", "low", "high", "shown"),
    [
        ("spearman", 0.53414, 0.5, 0.56, ("0.534", "[0.500, 0.560]")),
        ("rmse", 0.34215, 0.3, 0.4, ("0.342", "[0.300, 0.400]")),
        ("rmse", 1.2344e-9, 9.8e-10, 1.5e-9, ("1.234e-09", "[9.800e-10, 1.500e-09]")),
        ("rmse", 0.0012345, 0.0011, 0.0014, ("0.001234", "[0.001100, 0.001400]")),
        ("rmse", 12345.678, 12000.0, 13000.5, ("12346", "[12000, 13000]")),
        ("rmse", 1e300, 9e299, 2e300, ("1.000e+300", "[9.000e+299, 2.000e+300]")),
        ("r2", -2.5e12, -3e12, -1e12, ("-2.500e+12", "[-3.000e+12, -1.000e+12]")),
    ],
)
def test_a_score_has_the_same_digits_on_the_console_and_on_the_page(metric, value, low, high, shown):
    cell = format_metric_cell(metric, Metric(value, low, high, [value], 0.0))
    assert (cell["text"], cell["small"]) == shown
    seeds = format_metric_cell(metric, Metric(value, low, high, [value, value], 0.0))
    assert seeds["small"].splitlines()[0] == shown[1], "± has its own line, so that seven metrics fit on a page"
    assert seeds["small"].splitlines()[1].startswith("±")
    line = format_score(metric, Score(Interval(value, low, high), (value,), np.array([low, high]), 5))
    assert line == f"{metric} {shown[0]} {shown[1]}"
    assert format_value(metric, value) == shown[0]


def test_small_differences_keep_their_digits():
    assert format_comparison("B", "A", "rmse", Interval(2e-10, 1e-10, 3e-10)).startswith(
        "B beats A by 2.000e-10 [1.000e-10, 3.000e-10] in RMSE"
    )
    found = format_comparison("B", "A", "accuracy", Interval(0.0004, 0.0002, 0.0006))
    assert found == "B beats A by 0.00040 [0.00020, 0.00060] in accuracy"


@pytest.mark.parametrize(
    ("value", "shown"), [(2.87571, "2.8757"), (1.2345678e-9, "1.2346e-09"), (0.0, "0.0000"), (3e7, "3.0000e+07")]
)
def test_losses_keep_their_digits(value, shown):
    assert format_decimals(value) == shown


@pytest.mark.parametrize("part", ["rows", "metric", "files"])
def test_a_report_that_lacks_a_part_is_refused(tmp_path, part):
    """An empty list of rows gave an IndexError in `compare`."""
    whole = small_report("accuracy", [row("probe", "m", {"accuracy": score(0.5)})])
    whole = replace(whole, files={"predictions": "predictions.npz"})
    whole.write(tmp_path / "whole")
    assert Report.read(tmp_path / "whole").first.name == "m"
    lacking = {
        "rows": {"rows": []},
        "metric": {"rows": [row("probe", "m", {"mcc": score(0.5)})]},
        "files": {"files": {}},
    }
    replace(whole, **lacking[part]).write(tmp_path / "lacking")
    with refused("report.incomplete", path=tmp_path / "lacking" / "report.json"):
        compare(CompareConfig(reports=[tmp_path / "lacking", tmp_path / "whole"], out_dir=tmp_path / "out"))
