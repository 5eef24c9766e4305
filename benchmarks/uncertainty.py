"""Measure whether prediction intervals and temperatures keep their promises, in simulation and on FLIP.

    python benchmarks/uncertainty.py --flip flip

Simulated: 200 samples of a task whose values or classes follow three of 30 features with noise. A ridge or an FNN
probe (early stopping) is trained on 60 proteins and selected on validation. Intervals come from the same validation
proteins (the default), from as many proteins that selected nothing, and from half of the validation proteins while the
other half selects; and from the errors on train and the spread of five seeds, which promise nothing. Calibration:
probabilities that are right at another temperature, and how often the 95% interval of the expected calibration error
contains that of many proteins. On FLIP: coverage,
width and expected calibration error of one-hot probes on test.
"""

import argparse
import datetime
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from esm2kit.benchmarking.baselines.fit import encode_one_hot, encode_one_hot_padded
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, Fitted, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe
from esm2kit.benchmarking.scores import number_proteins
from esm2kit.benchmarking.uncertainty import describe_test_uncertainty
from esm2kit.core.hardware import cpu_name
from esm2kit.tasks.calibration import (
    Events,
    choose_temperature,
    compute_calibration_error,
    compute_log_probabilities,
    compute_losses,
    list_events,
    resample_calibration_error,
)
from esm2kit.tasks.conformal import ConformalScores, choose_scores, compute_binomial_interval, merge_seeds
from esm2kit.tasks.data import load_task
from esm2kit.tasks.metrics import sample_counts
from esm2kit.tasks.task import Split, Task
from esm2kit.tasks.task_data import TaskData

NUM_TRAIN, NUM_TEST, WIDTH, COVERAGE = 60, 100, 30, 0.9
SEEDS = (0, 1, 2, 3, 4)


def sample_task(target: str, sizes: dict[str, int], seed: int) -> tuple[Features, TaskData]:
    """Sample a task with one protein per row; sets in the order of `sizes`."""
    generator = np.random.default_rng(seed)
    count = sum(sizes.values())
    x_ND = generator.normal(size=(count, WIDTH)).astype(np.float32)
    if target == "value":
        y_N, labels = x_ND[:, :3] @ [1.0, -1.0, 0.5] + generator.normal(size=count) * (0.5 + np.abs(x_ND[:, 0])), ()
    else:
        logits_NK = x_ND[:, :3].astype(float)
        y_N, labels = (logits_NK + generator.gumbel(size=(count, 3))).argmax(1), ("a", "b", "c")
    sets = np.repeat(list(sizes), list(sizes.values()))
    task = Task("simulated", "protein", target, "spearman" if target == "value" else "accuracy", {"s": Split()}, "s",
                labels=labels)  # fmt: skip
    ids = [f"p{number}" for number in range(count)]
    data = TaskData(task, "s", ids, ["A"] * count, sets, y_N, np.ones(count, bool), {})
    return Features(x_ND, data.offsets), data


def predict_parts(features: Features, data: TaskData, probe: ProbeConfig) -> dict[str, tuple[np.ndarray, Fitted]]:
    """Fit a probe and predict test with it, and train and the set `fresh` as if they were test."""
    found = {}
    for name in ("test", "train", "fresh"):
        proteins = {set_name: data.rows(set_name) for set_name in ("train", "validation")} | {"test": data.rows(name)}
        targets = ProbeTargets(data.targets, data.scored, data.offsets, proteins, data.task, data.ids)
        found[name] = data.targets[data.rows(name)], fit_probe(features, targets, probe, SEEDS)
    return found


def simulate_intervals(name: str, num_validation: int, draws: int, epochs: int) -> dict[str, list[float]]:
    """Return the share of covered test values of each kind of interval, one per draw."""
    covered, probe = defaultdict(list), ProbeConfig(name, epochs=epochs, patience=None if name == "ridge" else 10)
    for seed in range(draws):
        sizes = {"train": NUM_TRAIN, "validation": num_validation, "fresh": num_validation, "test": NUM_TEST}
        features, data = sample_task("value", sizes, seed)
        parts = predict_parts(features, data, probe)
        truth_M, fitted = parts["test"]
        validation_N = data.targets[data.rows("validation")]

        def add(kind: str, scores: ConformalScores, test: Fitted, truth_M: np.ndarray = truth_M) -> None:
            mean_M, spread_M = merge_seeds(test.test_SM)
            covered[kind].append(float(np.mean(np.abs(truth_M - mean_M) <= scores.half_widths(COVERAGE, spread_M))))

        add("validation", choose_scores(validation_N, fitted.validation_SM, np.arange(num_validation)), fitted)
        fresh_N, fresh = parts["fresh"]
        add("fresh", choose_scores(fresh_N, fresh.test_SM, np.arange(num_validation)), fitted)
        train_N, train = parts["train"]
        add("train", ConformalScores.from_errors(np.abs(train_N - merge_seeds(train.test_SM)[0])), fitted)
        if name != "ridge":
            mean_M, spread_M = merge_seeds(fitted.test_SM)
            covered["spread"].append(float(np.mean(np.abs(truth_M - mean_M) <= 1.645 * spread_M)))
        half = data.rows("validation")[: num_validation // 2]
        sets = data.sets.copy()
        sets[half] = "fresh"
        sets[data.rows("fresh")] = "unused"
        halved = predict_parts(features, TaskData(**{**vars_of(data), "sets": sets}), probe)
        half_N, calibration = halved["fresh"]
        add("half", choose_scores(half_N, calibration.test_SM, np.arange(len(half))), halved["test"][1])
    return covered


def vars_of(data: TaskData) -> dict:
    """Return the fields of a task."""
    return {name: getattr(data, name) for name in data.__dataclass_fields__}


def simulate_temperatures(num_validation: int, draws: int) -> dict[str, list[float]]:
    """Return, per draw: whether a temperature helps on validation, and its gain in NLL on test, if used and always."""
    found = defaultdict(list)
    for seed in range(draws):
        sizes = {"train": NUM_TRAIN, "validation": num_validation, "test": 1000}
        features, data = sample_task("class", sizes, seed)
        fitted = fit_probe(features, ProbeTargets.from_task(data), ProbeConfig("fnn", epochs=60, patience=None), (0,))
        truth_N, truth_M = (data.targets[data.rows(name)] for name in ("validation", "test"))
        fit = choose_temperature(fitted.validation_logits_MC, truth_N, np.arange(num_validation))
        gain = 0.0
        if fit.value is not None:
            losses = [compute_losses(fitted.test_logits_MC, truth_M, value).mean() for value in (1.0, fit.value)]
            gain = float(losses[0] - losses[1])
        found["used"].append(fit.helps)
        found["gain if used"].append(gain if fit.helps else 0.0)
        found["gain always"].append(gain)
    return found


def sample_events(generator: np.random.Generator, kind: str, count: int, temperature: float) -> Events:
    """Sample events of proteins whose probabilities are right at a temperature.

    Args:
        generator: Of random numbers.
        kind: "classes" (four), "labels" (three binary ones), or "residues": 20 targets of three classes per protein,
            whose temperature varies between proteins.
        count: Number of proteins.
        temperature: Temperature at which the probabilities are right.

    Returns:
        The events at temperature 1.
    """
    per_protein, width = (20, 3) if kind == "residues" else (1, 3 if kind == "labels" else 4)
    protein_M = np.repeat(np.arange(count), per_protein)
    logits_MC = generator.normal(size=(len(protein_M), width)) * 2
    if kind == "labels":
        truth = (generator.random(logits_MC.shape) < 1 / (1 + np.exp(-logits_MC / temperature))).astype(int)
    else:
        own_M1 = np.full((len(protein_M), 1), temperature)
        if kind == "residues":
            own_M1 = (np.repeat(np.exp(generator.normal(0, 0.4, count)), per_protein) * temperature)[:, None]
        right_MC = np.exp(compute_log_probabilities(logits_MC / own_M1))
        truth = np.minimum((generator.random(len(protein_M))[:, None] > right_MC.cumsum(1)).sum(1), width - 1)
    return list_events(np.exp(compute_log_probabilities(logits_MC, kind == "labels")), truth, protein_M)


def measure_calibration(draws: int) -> None:
    """Print how often the interval of the expected calibration error contains the error of many proteins."""
    cases = [
        ("classes", count, temperature, False) for count in (60, 200, 1000) for temperature in (1.0, 1.3, 1.8, 3.0)
    ]
    cases += [("labels", 60, 1.8, False), ("labels", 200, 1.3, False), ("residues", 60, 1.0, False)]
    cases += [("residues", 60, 1.8, False), ("residues", 200, 1.3, False)]
    cases += [("classes", 60, 1.3, True), ("classes", 200, 1.8, True), ("labels", 60, 1.3, True)]
    print("| targets | proteins | temperature | bins | true error | mean error | covered | mean width |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind, count, temperature, equal_mass in cases:
        many = sample_events(np.random.default_rng(0), kind, 10_000 if kind == "residues" else 200_000, temperature)
        truth, intervals = compute_calibration_error(many, equal_mass=equal_mass), []
        for draw in range(draws):
            events = sample_events(np.random.default_rng(5000 + draw), kind, count, temperature)
            intervals.append(resample_calibration_error(events, sample_counts(count, 200, draw), equal_mass).interval)
        value_D, low_D, high_D = np.array(intervals).T
        covered = np.mean((low_D <= truth) & (truth <= high_D))
        bins = "equal mass" if equal_mass else "equal width"
        print(f"| {kind} | {count} | {temperature} | {bins} | {truth:.3f} | {value_D.mean():.3f} | {covered:.1%} | "
              f"{np.mean(high_D - low_D):.3f} |", flush=True)  # fmt: skip


def measure_flip(flip: Path, limit: int | None) -> None:
    """Print the coverage or the calibration error of one-hot probes on the test sets of FLIP."""
    cases = [("gb1", split, probe) for split in ("sampled", "low_vs_high", "two_vs_rest", "three_vs_rest")
             for probe in ("ridge", "fnn")]  # fmt: skip
    cases += [("secondary_structure", "sampled", "cnn"), ("conservation", "sampled", "cnn")]
    for task, split, probe in cases:
        data = load_task(task, split, flip)
        if limit is not None:
            data = data.limit_proteins(limit)
        if data.task.level == "protein":
            one_hot = encode_one_hot_padded(data).toarray()
            features = Features(one_hot[:, one_hot.std(0) > 0].astype(np.float32), data.offsets)
        else:
            features = encode_one_hot(data)
        fitted = fit_probe(features, ProbeTargets.from_task(data), ProbeConfig(probe, epochs=30), SEEDS)
        counts_RP = sample_counts(int(number_proteins(data).max()) + 1, 500)
        found = describe_test_uncertainty(fitted, data, counts_RP, COVERAGE)
        by = " (width by the spread of seeds)" if found.get("by_spread") else ""
        print(f"{task} {split} {probe}: {found['sentence']}{by}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flip", type=Path, help="Folder with FLIP's task folders. Default: only simulations.")
    parser.add_argument("--limit", type=int, default=2000, help="Maximum number of proteins per set of FLIP.")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--parts", nargs="*", default=["ridge", "fnn", "temperature", "calibration", "flip"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{cpu_name()}, 1 thread, torch {torch.__version__}, {datetime.date.today()}", flush=True)
    for name in ("ridge", "fnn"):
        for num_validation in (10, 20, 40, 100) if name in arguments.parts else ():
            covered = simulate_intervals(name, num_validation, arguments.draws, epochs=60)
            promised = min(1.0, np.ceil((num_validation + 1) * COVERAGE - 1e-9) / (num_validation + 1))
            shown = [f"{kind} {np.mean(shares):.3f} ± {np.std(shares) / len(shares) ** 0.5:.3f}"
                     for kind, shares in covered.items()]  # fmt: skip
            print(
                f"{name}, {num_validation} validation proteins, promised {promised:.3f}: {', '.join(shown)}", flush=True
            )
    for num_validation in (30, 100, 300) if "temperature" in arguments.parts else ():
        found = simulate_temperatures(num_validation, arguments.draws)
        used = compute_binomial_interval(int(sum(found["used"])), arguments.draws)
        gains = [f"{name} {np.mean(found[name]):+.4f}" for name in ("gain if used", "gain always")]
        print(f"temperature, {num_validation} validation proteins: used in {used.value:.2f} [{used.low:.2f}, "
              f"{used.high:.2f}], test NLL {', '.join(gains)}", flush=True)  # fmt: skip
    if "calibration" in arguments.parts:
        measure_calibration(arguments.draws)
    if arguments.flip is not None and "flip" in arguments.parts:
        measure_flip(arguments.flip, arguments.limit)


if __name__ == "__main__":
    main()
