"""Fine-tune and probe on twenty small data sets, to choose the defaults for small data and to confirm them.

    python -m benchmarks.small_tasks --model run/checkpoints/last.safetensors --data_dir shared_data --settings default

Ten data sets are for choosing the defaults (`--part choose`), ten others for confirming them (`--part confirm`). Nine
of the twenty are planted: sequences with labels that follow from them by a rule. The others are samples of measured
data: FLIP's tasks, two deep mutational scans and the tasks in data/sample. `--data_dir` has the folders flip,
flip_subsets, dms, tem1 and uniprot_mini. The sets have 50 to 500 proteins of at most `--residues` residues; 60% are
train, 15% validation and 25% test.

Each data set is fine-tuned with each of the `--settings`, one seed, and probed with the frozen encoder (ridge for
values, logistic regression for classes of proteins, a CNN for classes of residues). The table shows the skill on test:
the share of the error of the constant prediction (the mean of train, or its majority class) that is removed, so that 0
is as good as the constant and 1 is perfect. "wins", "loses" and "ties" follow from the 95% interval of the paired
difference in RMSE or accuracy. Finished runs are kept in `<out_dir>/results.jsonl` and not repeated.

The script fails if a model that is worse on test than the constant has no warning.
"""

import argparse
import csv
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.scores import build_scorers
from esm2kit.core.errors import InputError
from esm2kit.finetuning.config import FinetuneConfig
from esm2kit.finetuning.finetune import finetune
from esm2kit.sequences.fasta import read_fasta
from esm2kit.tasks.data import load_task
from esm2kit.tasks.metrics import compute_paired_difference, sample_counts, score_seeds
from esm2kit.tasks.task_data import TaskData

# The settings that were tried; "default" are the defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "before": {"head_lr": 1e-4, "standardize": False, "epochs": 10},
    "head_lr": {"head_lr": 1e-3, "standardize": False, "epochs": 10},
    "standardize": {"head_lr": 1e-4, "standardize": True, "epochs": 10},
    "both": {"head_lr": 1e-3, "standardize": True, "epochs": 10},
    "frozen": {"mode": "frozen"},
}
HYDROPATHY = {
    "A": 1.8, "R": -4.5, "N": -3.5, "D": -3.5, "C": 2.5, "Q": -3.5, "E": -3.5, "G": -0.4, "H": -3.2, "I": 4.5,
    "L": 3.8, "K": -3.9, "M": 1.9, "F": 2.8, "P": -1.6, "S": -0.8, "T": -0.7, "W": -0.9, "Y": -1.3, "V": 4.2,
}  # fmt: skip
Example = tuple[str, str]  # sequence, target as text
Maker = Callable[["Sources", np.random.Generator], list[Example]]


class Sources:
    """The folders that the data sets are sampled from."""

    def __init__(self, data_dir: Path, sample_tasks: Path, residues: int) -> None:
        self.data_dir, self.sample_tasks, self.residues = data_dir, sample_tasks, residues

    def proteins(self, generator: np.random.Generator, count: int) -> list[str]:
        """Sample natural sequences, cropped."""
        path = self.data_dir / "uniprot_mini" / "uniref50_train_filt.fasta"
        found = sorted({record.sequence[: self.residues] for record in read_fasta(path)})
        found = [sequence for sequence in found if set(sequence) <= set(HYDROPATHY)]
        return [found[place] for place in generator.choice(len(found), count, replace=False)]

    def fasta(self, generator: np.random.Generator, path: str, count: int, start: int = 0) -> list[Example]:
        """Sample labelled proteins from a file with TARGET= in its headers, cropped to residues from `start`."""
        records = list(read_fasta(self.data_dir / path))
        found = [
            (record.sequence[start : start + self.residues], record.description.partition("TARGET=")[2].split()[0])
            for record in records
        ]
        return _sample(generator, found, count)

    def task(self, generator: np.random.Generator, task: str, count: int, folder: Path | None = None) -> TaskData:
        """Load a task and sample proteins."""
        data = load_task(task, None, folder or self.data_dir / "flip")
        return data.subset(np.sort(generator.choice(len(data.ids), count, replace=False)))


def _sample(generator: np.random.Generator, examples: Iterable[Example], count: int) -> list[Example]:
    unique = sorted(dict(examples).items())
    return [unique[place] for place in generator.choice(len(unique), min(count, len(unique)), replace=False)]


def plant(score: Callable[[str], float], count: int, noise: float = 0.3, classes: int = 0) -> Maker:
    """Make a task whose target is a score of the sequence, with noise, or its quantile as a class."""

    def make(sources: Sources, generator: np.random.Generator) -> list[Example]:
        sequences = sources.proteins(generator, count)
        values = np.array([score(sequence) for sequence in sequences])
        values = (values - values.mean()) / max(values.std(), 1e-9) + noise * generator.normal(size=count)
        if classes:
            edges = np.quantile(values, np.linspace(0, 1, classes + 1)[1:-1])
            return [(s, f"class{np.searchsorted(edges, v)}") for s, v in zip(sequences, values, strict=True)]
        return [(s, f"{50 + 8 * v:.4f}") for s, v in zip(sequences, values, strict=True)]

    return make


def flip_values(path: str, count: int, start: int = 0) -> Maker:
    """Make a task of values or classes of proteins from a FASTA file."""
    return lambda sources, generator: sources.fasta(generator, path, count, start)


def residues(task: str, count: int, sample: bool = False) -> Maker:
    """Make a task of residues, cropped, from a FLIP task or a sample task."""

    def make(sources: Sources, generator: np.random.Generator) -> list[Example]:
        data = sources.task(generator, task, count, sources.sample_tasks if sample else None)
        examples = []
        for place, sequence in enumerate(data.sequences):
            classes = data.targets[data.offsets[place] : data.offsets[place + 1]]
            labels = "".join(data.task.labels[label] for label in classes)
            examples.append((sequence[: sources.residues], labels[: sources.residues]))
        return examples

    return make


def helix_share(count: int) -> Maker:
    """Make a task of values of proteins: the share of helix in FLIP's secondary structures."""

    def make(sources: Sources, generator: np.random.Generator) -> list[Example]:
        examples = residues("secondary_structure", count)(sources, generator)
        return [(sequence, f"{labels.count('H') / len(labels):.4f}") for sequence, labels in examples]

    return make


def sample_task(task: str, count: int) -> Maker:
    """Make a task of proteins from a task in data/sample."""

    def make(sources: Sources, generator: np.random.Generator) -> list[Example]:
        data = sources.task(generator, task, count, sources.sample_tasks)
        names = data.task.labels
        targets = [names[target] if names else f"{target}" for target in data.targets]
        return [
            (sequence[: sources.residues], target) for sequence, target in zip(data.sequences, targets, strict=True)
        ]

    return make


def scan(count: int, start: int) -> Maker:
    """Make a task from a deep mutational scan in ProteinGym's format, cropped around the mutated region."""

    def make(sources: Sources, generator: np.random.Generator) -> list[Example]:
        with open(next((sources.data_dir / "dms").glob("*.csv")), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        scores = np.log10([float(row["DMS_score"]) for row in rows])
        found = (row["mutated_sequence"][start : start + sources.residues] for row in rows)
        return _sample(generator, zip(found, (f"{score:.4f}" for score in scores), strict=True), count)

    return make


def share(letters: str) -> Callable[[str], float]:
    """Score a sequence by its share of some letters."""
    return lambda sequence: sum(letter in letters for letter in sequence) / len(sequence)


def hydropathy(sequence: str) -> float:
    """Score a sequence by its mean hydropathy (Kyte and Doolittle 1982)."""
    return float(np.mean([HYDROPATHY[letter] for letter in sequence]))


def pairs(first: str, second: str, apart: int) -> Callable[[str], float]:
    """Score a sequence by the share of positions with one letter and another `apart` positions later."""
    return lambda s: sum(a in first and b in second for a, b in zip(s, s[apart:], strict=False)) / len(s)


CHOOSE: dict[str, Maker] = {
    "planted_leucine": plant(share("L"), 90),
    "planted_hydropathy": plant(hydropathy, 150),
    "planted_charge_class": plant(share("DEKR"), 120, classes=2),
    "planted_pairs": plant(pairs("AVILMF", "AVILMF", 4), 300),
    "gb1_sample": flip_values("flip/gb1/sampled.fasta", 200),
    "meltome_sample": flip_values("flip_subsets/meltome_cv_test.fasta", 100),
    "helix_content_pdb": sample_task("helix_content_pdb", 120),
    "domain_of_life": sample_task("domain_of_life", 150),
    "secondary_structure_sample": residues("secondary_structure_648", 50),
    "conservation_sample": residues("conservation", 60),
}
CONFIRM: dict[str, Maker] = {
    "planted_glycine": plant(share("GP"), 70),
    "planted_noise": plant(lambda sequence: 0.0, 100, noise=1.0),
    "planted_aromatic_class": plant(share("FWY"), 150, classes=3),
    "planted_amphipathic": plant(pairs("DEKRNQST", "AVILMF", 3), 400),
    "tem1": flip_values("tem1/variants.fasta", 250, 60),
    "B2L11": scan(170, 110),
    "scl_sample": flip_values("flip_subsets/scl_rand.fasta", 134),
    "helix_share": helix_share(500),
    "secondary_structure_pdb": residues("secondary_structure_pdb", 80, sample=True),
    "planted_domain": plant(pairs("C", "CHG", 3), 200, classes=2),
}


def write_task(folder: Path, name: str, make: Maker, sources: Sources, number: int) -> None:
    """Write a data set as a custom task with a seeded split."""
    generator = np.random.default_rng(number)
    examples = make(sources, generator)
    order = generator.permutation(len(examples))
    rank = np.empty(len(order))
    rank[order] = np.arange(len(order)) / len(order)
    lines = []
    for place, (sequence, target) in enumerate(examples):
        subset = "test" if rank[place] >= 0.75 else "train"
        lines.append(
            f">{name}{place} TARGET={target} SET={subset} VALIDATION={0.6 <= rank[place] < 0.75}\n{sequence}\n"
        )
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "small.fasta").write_text("".join(lines))


def read_row(path: Path, name: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read targets, proteins and predictions of a row, or of the first row, of predictions.npz."""
    with np.load(path) as stored:
        names = [key for key in stored.files if key.startswith("predicted/")]
        key = names[0] if name is None else f"predicted/{name}"
        return stored["truth"], stored["protein"], stored[key]


def compare(data: TaskData, ours: Path, theirs: Path) -> dict[str, Any]:
    """Compare a fine-tuned model with the probe and with the constant prediction on test."""
    truth, protein, tuned = read_row(ours)
    _, _, probe = read_row(theirs)
    constant = "mean" if data.task.target == "value" else "majority"
    _, _, flat = read_row(theirs, constant)
    counts = sample_counts(int(protein.max()) + 1, 1000)
    metric = "rmse" if data.task.target == "value" else "accuracy"
    scores = [
        score_seeds(build_scorers(data.task.target, len(data.task.labels), 0, truth, rows, protein), counts)[metric]
        for rows in (tuned, probe, flat)
    ]
    best, probed, guessed = (score.interval.value for score in scores)

    def skill(value: float) -> float:
        return 1 - value**2 / guessed**2 if metric == "rmse" else (value - guessed) / (1 - guessed)

    difference = compute_paired_difference(metric, scores[0], scores[1])
    outcome = "wins" if difference.low > 0 else "loses" if difference.high < 0 else "ties"
    spread = float(tuned[0].std() / truth.std()) if metric == "rmse" else float(len(np.unique(tuned[0])))
    return {"skill": skill(best), "probe": skill(probed), "outcome": outcome, "spread": spread, "metric": metric}


def run(name: str, tasks: Path, setting: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune one data set with one setting, and compare it with the probe."""
    folder = arguments.out_dir / name
    data = load_task(name, None, tasks)
    constant = "mean" if data.task.target == "value" else "majority"
    report = benchmark(
        BenchmarkConfig(
            task=name, data_dir=tasks, model=arguments.model, untrained=False, baselines=[constant], seeds=[0],
            out_dir=folder / "probe", device="cpu",
        )
    )  # fmt: skip
    started = time.process_time()
    config = FinetuneConfig(
        task=name, data_dir=tasks, model=arguments.model, out_dir=folder / setting, benchmark=False, accelerator="cpu",
        **SETTINGS[setting],
    )  # fmt: skip
    result = finetune(config)
    found = compare(data, folder / setting / "predictions.npz", folder / "probe" / "predictions.npz")
    found |= {"task": name, "setting": setting, "proteins": len(data.ids), "seconds": time.process_time() - started}
    found["warned"] = bool(result.get("warnings"))
    found["probe_warned"] = bool(getattr(report, "warnings", ()))
    return found


def average(values: list[float], generator: np.random.Generator) -> str:
    """Format a mean with its 95% bootstrap interval over data sets."""
    means = [np.mean(generator.choice(values, len(values))) for _ in range(2000)]
    return f"{np.mean(values):.2f} [{np.quantile(means, 0.025):.2f}, {np.quantile(means, 0.975):.2f}]"


def summarise(results: list[dict[str, Any]], settings: list[str]) -> None:
    """Print the table of data sets, and the shares of wins, losses and ties of each setting."""
    generator = np.random.default_rng(0)
    by_key = {(found["task"], found["setting"]): found for found in results}
    tasks = list(dict.fromkeys(found["task"] for found in results))
    print(f"{'skill on test':<24} {'proteins':>8} {'probe':>7} " + " ".join(f"{name:>15}" for name in settings))
    for task in tasks:
        rows = [by_key.get((task, setting)) for setting in settings]
        first = next(row for row in rows if row)
        cells = [f"{row['skill']:.2f} ({row['spread']:.2f})" if row else "" for row in rows]
        print(f"{task:<24} {first['proteins']:>8} {first['probe']:>7.2f} " + " ".join(f"{cell:>15}" for cell in cells))
    for setting in settings:
        rows = [found for found in results if found["setting"] == setting]
        if not rows:
            continue
        shares = [f"{word} {average([row['outcome'] == word for row in rows], generator)}" for word in
                  ("wins", "loses", "ties")]  # fmt: skip
        worse = sum(row["skill"] <= 0 for row in rows)
        seconds = np.mean([row["seconds"] for row in rows])
        print(
            f"{setting}: mean skill {average([row['skill'] for row in rows], generator)}, against the frozen probe: "
            f"{'; '.join(shares)}; {worse} of {len(rows)} not better than the constant; {seconds:.0f} s of CPU per run"
        )


def main() -> None:
    """Run the data sets that have not been run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Model as in esm2kit finetune.")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--sample_tasks", type=Path, default=Path("data/sample/tasks"))
    parser.add_argument("--out_dir", type=Path, default=Path("small_tasks"))
    parser.add_argument("--part", choices=("choose", "confirm", "all"), default="all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default"])
    parser.add_argument("--residues", type=int, default=80)
    arguments = parser.parse_args()
    logging.getLogger("esm2kit").setLevel(logging.ERROR)
    makers = {"choose": CHOOSE, "confirm": CONFIRM, "all": CHOOSE | CONFIRM}[arguments.part]
    sources = Sources(arguments.data_dir, arguments.sample_tasks, arguments.residues)
    tasks, log = arguments.out_dir / "tasks", arguments.out_dir / "results.jsonl"
    for name, make in makers.items():
        write_task(tasks, name, make, sources, list(CHOOSE | CONFIRM).index(name))
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    done = {(found["task"], found["setting"]) for found in results}
    for name in makers:
        for setting in arguments.settings:
            if (name, setting) in done:
                continue
            try:
                found = run(name, tasks, setting, arguments)
            except InputError as error:
                raise SystemExit(f"{name}, {setting}: {error}") from None
            results.append(found)
            arguments.out_dir.mkdir(parents=True, exist_ok=True)
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{name}, {setting}: skill {found['skill']:.2f}, probe {found['probe']:.2f}", flush=True)
    chosen = [found for found in results if found["task"] in makers and found["setting"] in arguments.settings]
    summarise(chosen, arguments.settings)
    silent = [
        f"{found['task']} ({found['setting']})" for found in chosen if found["skill"] <= 0 and not found["warned"]
    ]
    silent += [f"{found['task']} (probe)" for found in chosen if found["probe"] <= 0 and not found["probe_warned"]]
    if silent:
        raise SystemExit(f"not better than the constant, without a warning: {', '.join(silent)}")
    print(f"{len(chosen)} runs: each model and probe that is not better than the constant has a warning")


if __name__ == "__main__":
    main()
