"""Check the intervals of cross-validation by simulation, and compare folds in one pass with separate fits.

    python -m benchmarks.folds coverage
    python -m benchmarks.folds intervals
    python -m benchmarks.folds speed

`coverage` draws data sets with a known truth: values or classes that are a linear function of random vectors, with
noise, of single proteins or of groups of similar ones. The truth is the score of the same procedure on 20,000 other
proteins, the mean over 300 training sets. It prints how many of 200 intervals contain the truth: those of the plain
bootstrap over out-of-fold predictions, and those that a report has. The same for the difference between two models, and
for that between two other models that are equally good, whose intervals should contain 0.

`intervals` draws the same data sets of values. It prints the share of 1,000 new proteins (of new groups) that is inside
the 90% intervals of `esm2kit predict`: those of the final probe, with a quantile of the out-of-fold errors. Next to it
are the intervals of CV+ (Barber et al. 2021, 10.1214/20-AOS1965), which has a proof, the share that a report finds by
leaving out folds, and how often its 95% interval contains the share of new proteins.

`speed` prints the time of all folds in one pass and of separate fits, alternating, as medians, and the largest
difference of their predictions.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from esm2kit.benchmarking.cross_validation import CrossValidation
from esm2kit.benchmarking.fold_scores import build_fold_scorers, score_folds
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe, fit_probe_folds
from esm2kit.benchmarking.scores import build_task_scorers
from esm2kit.benchmarking.uncertainty import compute_ends, estimate_uncertainty
from esm2kit.tasks.folds import assign_folds
from esm2kit.tasks.grouping import FoldPlan, hold_out
from esm2kit.tasks.metrics import compute_paired_difference, score_seeds
from esm2kit.tasks.task import Task
from esm2kit.tasks.task_data import TaskData

METRICS = {"value": ("spearman", "pearson", "rmse", "r2"), "class": ("accuracy", "macro_f1", "mcc")}
NUM_TEST = 20_000


class Scenario(NamedTuple):
    """A kind of data set.

    Args:
        groups: Number of groups.
        size: Proteins per group.
        width: Numbers per vector.
        signal: Correlation of the values with the linear function.
        target: "value" or "class".
        folds: Number of folds.
        repeats: Number of repeats.
    """

    groups: int
    size: int
    width: int
    signal: float
    target: str
    folds: int
    repeats: int = 1


SCENARIOS = (
    Scenario(80, 1, 20, 0.7, "value", 5),
    Scenario(80, 1, 20, 0.7, "value", 5, 3),
    Scenario(80, 1, 100, 0.5, "value", 5),
    Scenario(30, 4, 20, 0.7, "value", 5),
    Scenario(15, 8, 20, 0.7, "value", 5),
    Scenario(80, 1, 20, 0.7, "class", 5),
    Scenario(80, 1, 20, 0.7, "class", 10),
    Scenario(200, 1, 20, 0.7, "value", 10),
)


def draw(generator: np.random.Generator, scenario: Scenario, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw vectors (N, D), targets (N,) and groups (N,); half of the variance is that of the group."""
    shared = 0.5 if scenario.size > 1 else 0.0
    group_N = np.repeat(np.arange(groups), scenario.size)

    def mix(width: int) -> np.ndarray:
        common = generator.normal(size=(groups, width))[group_N]
        return np.sqrt(shared) * common + np.sqrt(1 - shared) * generator.normal(size=(len(group_N), width))

    x_ND, noise_N = mix(scenario.width), mix(1)[:, 0]
    linear_N = x_ND.sum(axis=1) / np.sqrt(scenario.width)
    y_N = scenario.signal * linear_N + np.sqrt(1 - scenario.signal**2) * noise_N
    return x_ND.astype(np.float32), (y_N > 0).astype(np.int64) if scenario.target == "class" else y_N, group_N


def build_task(y_N: np.ndarray, target: str) -> TaskData:
    """Build a task without sequences that matter."""
    labels = ("a", "b") if target == "class" else ()
    task = Task("drawn", "protein", target, METRICS[target][0], {}, "", labels=labels)
    names = [f"p{number}" for number in range(len(y_N))]
    return TaskData(task, "", names, names, np.full(len(y_N), "test"), y_N, np.ones(len(y_N), bool), {})


def plan(group_N: np.ndarray, scenario: Scenario) -> FoldPlan:
    """Divide groups into folds."""
    fold_RN = np.stack([assign_folds(group_N, scenario.folds, repeat) for repeat in range(scenario.repeats)])
    return FoldPlan(group_N, fold_RN, tuple(map(str, range(scenario.folds))), "drawn groups")


def list_features(x_ND: np.ndarray) -> list[Features]:
    """Return the vectors of three models. The second knows only the first half of the numbers, the third the other."""
    offsets, half = np.arange(len(x_ND) + 1), x_ND.shape[1] // 2
    parts = (x_ND, x_ND[:, :half], x_ND[:, half : 2 * half])
    return [Features(np.ascontiguousarray(part), offsets) for part in parts]


def find_truth(scenario: Scenario, num_sets: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the expected scores of the first model and the differences to the second one, (metrics,) each."""
    test_x_ND, test_y_N, _ = draw(generator, scenario, NUM_TEST // scenario.size)
    found = []
    for _ in range(num_sets):
        x_ND, y_N, group_N = draw(generator, scenario, scenario.groups)
        data = build_task(y_N, scenario.target)
        sets = hold_out(data, plan(group_N, scenario), 0, 0).sets
        fit = np.flatnonzero(sets != "test")
        targets = build_task(np.concatenate([y_N[fit], test_y_N]), scenario.target)
        proteins = {name: np.flatnonzero(sets[fit] == name) for name in ("train", "validation")}
        proteins["test"] = np.arange(len(fit), len(targets.ids))
        inputs = ProbeTargets(targets.targets, targets.scored, targets.offsets, proteins, targets.task)
        rows = []
        for features in list_features(np.concatenate([x_ND[fit], test_x_ND]))[:2]:
            predicted_SM = fit_probe(features, inputs, choose_probe(scenario)).test_SM
            (scorer,) = build_task_scorers(targets.task, test_y_N, predicted_SM, np.zeros(NUM_TEST, dtype=np.int64))
            scores = scorer(np.ones((1, 1), dtype=np.int32))
            rows.append([scores[metric][0] for metric in METRICS[scenario.target]])
        found.append(rows)
    ours, theirs = np.nanmean(found, axis=0)
    sign = np.array([-1.0 if metric == "rmse" else 1.0 for metric in METRICS[scenario.target]])
    return ours, sign * (ours - theirs)


def choose_probe(scenario: Scenario) -> ProbeConfig:
    """Return ridge for values and logistic regression for classes."""
    return ProbeConfig("ridge" if scenario.target == "value" else "logistic")


def count_covered(
    scenario: Scenario, num_draws: int, num_truth: int = 300, resamples: int = 300, seed: int = 1
) -> dict[str, np.ndarray]:
    """Count the intervals that contain the truth.

    Args:
        scenario: Kind of data set.
        num_draws: Number of data sets.
        num_truth: Training sets from which the truth is computed.
        resamples: Bootstrap replicates.
        seed: Of the random numbers.

    Returns:
        plain, reported, difference and equal -> share of intervals that contain the truth, by metric; equal is the
        difference between two models that are equally good. Also truth, bias and width.
    """
    generator = np.random.default_rng(seed)
    names = METRICS[scenario.target]
    truth, true_difference = find_truth(scenario, num_truth, generator)
    covered: dict[str, list] = {"plain": [], "reported": [], "difference": [], "equal": []}
    values, widths = [], []
    for _ in range(num_draws):
        x_ND, y_N, group_N = draw(generator, scenario, scenario.groups)
        folds = CrossValidation.from_plan(build_task(y_N, scenario.target), plan(group_N, scenario))
        counts_RG, scored = folds.sample_counts(resamples), []
        for features in list_features(x_ND):
            predicted_SM = folds.fit_probe(features, choose_probe(scenario), (0,), "cpu").test_SM
            scorers = build_task_scorers(folds.data.task, y_N, predicted_SM, folds.arrays.group_M)
            scored.append(score_folds(scorers, y_N, predicted_SM, folds.arrays, counts_RG))
            if len(scored) == 1:
                plain = score_seeds(build_fold_scorers(scorers, y_N, predicted_SM, folds.arrays), counts_RG)
        ours, theirs, others = scored
        for kind, found in (("plain", plain), ("reported", ours)):
            ends = np.array([found[name].interval[1:] for name in names])
            covered[kind].append((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
        for kind, pair, expected in (("difference", (ours, theirs), true_difference), ("equal", (theirs, others), 0.0)):
            ends = np.array([compute_paired_difference(name, pair[0][name], pair[1][name])[1:] for name in names])
            covered[kind].append((ends[:, 0] <= expected) & (expected <= ends[:, 1]))
        values.append([ours[name].interval.value for name in names])
        widths.append([ours[name].interval.high - ours[name].interval.low for name in names])
    shares = {kind: np.mean(found, axis=0) for kind, found in covered.items()}
    return shares | {"truth": truth, "bias": np.nanmean(values, axis=0) - truth, "width": np.nanmean(widths, axis=0)}


def compute_cv_plus(residual_N: np.ndarray, predicted_NM: np.ndarray, coverage: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute the intervals of CV+.

    Args:
        residual_N: Absolute out-of-fold errors.
        predicted_NM: Predictions of M new proteins by the probe that was trained without the fold of protein n.
        coverage: Nominal coverage, 1 - alpha.

    Returns:
        The ends (M,). The promise is a coverage of at least 1 - 2 alpha - sqrt(2 / n).

    Source:
        Barber, Candès, Ramdas and Tibshirani 2021, 10.1214/20-AOS1965.
    """
    place = int(np.ceil(coverage * (len(residual_N) + 1) - 1e-9)) - 1
    lower_NM = np.sort(-(predicted_NM - residual_N[:, None]), axis=0)
    upper_NM = np.sort(predicted_NM + residual_N[:, None], axis=0)
    return -lower_NM[place], upper_NM[place]


def measure_intervals(
    scenario: Scenario, num_draws: int, coverage: float = 0.9, num_new: int = 1000, seed: int = 1
) -> dict[str, np.ndarray]:
    """Measure the coverage of the intervals of values after cross-validation.

    Args:
        scenario: Kind of data set.
        num_draws: Number of data sets.
        coverage: Nominal coverage.
        num_new: Number of new proteins.
        seed: Of the random numbers.

    Returns:
        One number per data set (num_draws,): predict, cv_plus and inside (the resubstituted errors of the final probe)
        are shares of new proteins; one is whether the interval of `predict` contains the first of them; reported
        is the share found in the report and is_inside whether its 95% interval
        contains `predict` and is_below whether all of it is larger; width and cv_plus_width.
    """
    generator, found = np.random.default_rng(seed), []
    for _ in range(num_draws):
        x_ND, y_N, group_N = draw(generator, scenario, scenario.groups)
        new_x_MD, new_y_M, _ = draw(generator, scenario, num_new // scenario.size)
        folds, count = CrossValidation.from_plan(build_task(y_N, "value"), plan(group_N, scenario)), len(y_N)
        features = Features(np.concatenate([x_ND, new_x_MD]), np.arange(count + len(new_y_M) + 1))
        own = Features(x_ND, np.arange(count + 1))
        fitted = folds.fit_probe(own, choose_probe(scenario), (0,), "cpu", is_saved=True)
        every = build_task(np.concatenate([y_N, new_y_M]), "value")
        others_NM = np.empty((count, len(new_y_M)))
        for task in folds.tasks:
            proteins = {name: task.rows(name) for name in ("train", "validation")}
            proteins["test"] = np.arange(count, len(every.ids))
            inputs = ProbeTargets(every.targets, every.scored, every.offsets, proteins, every.task)
            others_NM[task.rows("test")] = fit_probe(features, inputs, choose_probe(scenario)).test_SM
        final = fitted.parameters.outputs(features.take(np.arange(len(every.ids))), [1] * len(every.ids), every.task)
        predicted = final[0, :, 0].numpy()
        uncertainty = estimate_uncertainty(*folds.get_held_out(fitted))
        lower_MC, upper_MC = compute_ends(uncertainty, predicted[count:, None], None, coverage)
        residual_N = np.abs(y_N - fitted.test_SM[0])
        plus = compute_cv_plus(residual_N, others_NM, coverage)
        counts_RG = folds.sample_counts(300)
        reported = folds.describe_uncertainty(fitted, counts_RG, coverage)["found"]
        covered_M = (lower_MC[:, 0] <= new_y_M) & (new_y_M <= upper_MC[:, 0])
        covered = float(np.mean(covered_M))
        inside = np.quantile(np.abs(y_N - predicted[:count]), coverage)
        found.append({
            "predict": covered,
            "one": covered_M[0],
            "cv_plus": float(np.mean((plus[0] <= new_y_M) & (new_y_M <= plus[1]))),
            "inside": float(np.mean(np.abs(new_y_M - predicted[count:]) <= inside)),
            "reported": reported["value"],
            "is_inside": reported["low"] <= covered <= reported["high"],
            "is_below": covered < reported["low"],
            "width": float(np.mean(upper_MC - lower_MC)),
            "cv_plus_width": float(np.mean(plus[1] - plus[0])),
        })  # fmt: skip
    return {name: np.array([each[name] for each in found]) for name in found[0]}


def print_intervals(arguments: argparse.Namespace) -> None:
    """Print a table of the coverage of prediction intervals after cross-validation."""
    names = ("data sets", "predict", "width", "CV+", "width", "errors on train", "in the report", "interval holds")
    print(f"| {' | '.join([*names, 'coverage is lower'])} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for scenario in (each for each in SCENARIOS if each.target == "value" and each.repeats == 1):
        found = measure_intervals(scenario, arguments.draws)
        means = {name: np.mean(values) for name, values in found.items()}
        error = np.std(found["predict"]) / np.sqrt(arguments.draws)
        what = f"{scenario.groups} x {scenario.size}, {scenario.width} numbers, {scenario.folds} folds"
        cells = [f"{means['predict']:.1%} ± {error:.1%}", f"{means['width']:.2f}", f"{means['cv_plus']:.1%}"]
        cells += [f"{means['cv_plus_width']:.2f}", f"{means['inside']:.1%}", f"{means['reported']:.1%}"]
        cells += [f"{means['is_inside']:.1%}", f"{means['is_below']:.1%}"]
        print(f"| {what} | {' | '.join(cells)} |", flush=True)


def print_coverage(arguments: argparse.Namespace) -> None:
    """Print a table of the coverage of each kind of data set."""
    print("| data sets | metric | truth | bias | width | plain | reported | difference | equal models |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for scenario in SCENARIOS:
        found = count_covered(scenario, arguments.draws)
        what = f"{scenario.groups} x {scenario.size}, {scenario.width} numbers, {scenario.folds} folds"
        what += f" x {scenario.repeats}" if scenario.repeats > 1 else ""
        for place, metric in enumerate(METRICS[scenario.target]):
            cells = [f"{found[name][place]:.3f}" for name in ("truth", "bias", "width")]
            cells += [f"{found[name][place]:.1%}" for name in ("plain", "reported", "difference", "equal")]
            print(f"| {what} | {metric} | {' | '.join(cells)} |", flush=True)


def print_speed(arguments: argparse.Namespace) -> None:
    """Print the times of all folds in one pass and of separate fits."""
    cases = (
        ("ridge", Scenario(5000, 1, 640, 0.7, "value", 10)),
        ("ridge", Scenario(80, 1, 1280, 0.7, "value", 5)),
        ("fnn", Scenario(200, 1, 320, 0.7, "value", 5)),
        ("fnn", Scenario(1000, 1, 320, 0.7, "class", 10)),
    )
    for probe, scenario in cases:
        x_ND, y_N, group_N = draw(np.random.default_rng(0), scenario, scenario.groups)
        folds = CrossValidation.from_plan(build_task(y_N, scenario.target), plan(group_N, scenario))
        targets, config = [ProbeTargets.from_task(task) for task in folds.tasks], ProbeConfig(probe, epochs=30)
        (features, *_), seeds = list_features(x_ND), (0, 1, 2, 3, 4)

        def run_one_pass(inputs=(features, targets, config, seeds)) -> list[np.ndarray]:
            return [fitted.test_SM for fitted in fit_probe_folds(*inputs)]

        def run_separately(inputs=(features, targets, config, seeds)) -> list[np.ndarray]:
            features, targets, config, seeds = inputs
            return [fit_probe(features, each, config, seeds).test_SM for each in targets]

        times: dict[Callable, list[float]] = {run_one_pass: [], run_separately: []}
        found = {}
        for _ in range(arguments.repeats):
            for run, seconds in times.items():
                start = time.perf_counter()
                found[run] = run()
                seconds.append(time.perf_counter() - start)
        one, separate = (statistics.median(seconds) for seconds in times.values())
        differs = max(float(np.abs(a - b).max()) for a, b in zip(*found.values(), strict=True))
        what = f"{probe}, {len(y_N)} proteins, {scenario.width} numbers, {scenario.folds} folds"
        print(
            f"{what}: one pass {one:.2f} s, separate {separate:.2f} s, {separate / one:.1f}x, differ by {differs:.1e}"
        )


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("coverage", "intervals", "speed"))
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    commands = {"coverage": print_coverage, "intervals": print_intervals, "speed": print_speed}
    commands[arguments.what](arguments)


if __name__ == "__main__":
    main()
