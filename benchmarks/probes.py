"""Compare probes with biotrainer for the same embeddings, head and epochs: time, peak memory and test scores.

    python -m venv peers && peers/bin/pip install biotrainer==1.4.0
    python benchmarks/probes.py --peer peers/bin/python --data_dir flip --task gb1 --width 320

Both tools start as a new process and read the task's file and the HDF5 file that `embed` wrote, with the keys that
biotrainer requires. They train the head of biotrainer's FLIP settings for all epochs and score the test set with
biotrainer's 30 bootstrap replicates. Runs alternate. esm2kit runs twice: with one seed like biotrainer, and with five
seeds in one process, for which biotrainer would run five times. The embeddings come from random weights of the given
width, because this script measures the probes and not the model. Prints one line per run (wall and CPU seconds, peak
memory, test score) and a JSON summary with both ratios. It also prints the mean metric of each tool with the standard
deviation over seeds, and whether a two-sided Mann-Whitney test at 5% finds a difference. `--repeats` is the number of
seeds of biotrainer, at least three for the test; esm2kit has five times as many.

biotrainer validates before an epoch and saves the weights after it, one epoch after the selected ones. A comparison of
metrics therefore requires several dozen steps: with `--limit`, choose a smaller `--batch_size`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

PEER = "biotrainer 1.4.0"
RESAMPLES = 30  # bootstrap replicates of the test set, as in biotrainer
WIDTHS = {320: (1, 320, 20), 480: (1, 480, 20), 640: (1, 640, 20), 1280: (1, 1280, 20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", type=Path, help="Python of an environment with biotrainer 1.4.0. Default: run only esm2kit."
    )
    parser.add_argument("--task", default="gb1", help="Task: secondary_structure or gb1.")
    parser.add_argument("--data_dir", type=Path, help="Folder with FLIP's task folders; required.")
    parser.add_argument("--width", type=int, default=320, choices=sorted(WIDTHS))
    parser.add_argument("--limit", type=int, help="Maximum number of proteins per set.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, help="Proteins per step. Default: biotrainer's value for the task.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work_dir", type=Path, help="Folder to reuse embeddings in a later run. Default: a temporary folder."
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        {"ours": ours, "theirs": theirs}[arguments.child.partition(":")[0]](
            json.loads(arguments.child.partition(":")[2])
        )
        return
    if arguments.data_dir is None:
        parser.error("--data_dir: name the folder that holds FLIP's task folders")
    with TemporaryDirectory() as temporary:
        compare(arguments, arguments.work_dir or Path(temporary))


def compare(arguments: argparse.Namespace, work_dir: Path) -> None:
    settings = prepare(arguments, work_dir)
    contenders = {
        "ours, 1 seed": ("ours", sys.executable, [0]),
        "ours, 5 seeds": ("ours", sys.executable, [0, 1, 2, 3, 4]),
    }
    if arguments.peer:
        contenders[PEER] = ("theirs", str(arguments.peer), [0])
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for repeat in range(arguments.repeats):
        for name, (side, python, seeds) in contenders.items():
            child = f"{side}:{json.dumps(settings | {'seeds': [seed + 10 * repeat for seed in seeds]})}"
            start = time.perf_counter()
            done = subprocess.run(
                [python, __file__, "--child", child], capture_output=True, text=True, check=False, encoding="utf-8"
            )
            seconds = time.perf_counter() - start
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]) | {"seconds": seconds})
            print(f"{name}: {json.dumps(runs[name][-1])}", flush=True)
    summary = {
        name: {
            **{key: statistics.median(run[key] for run in results) for key in ("seconds", "cpu_seconds", "peak_mb")},
            "scores": [score for run in results for score in run["scores"]],
        }
        for name, results in runs.items()
    }
    described = {key: settings[key] for key in ("task", "epochs", "batch_size", "threads", "metric", "sizes")}
    described |= {"width": arguments.width, "limit": arguments.limit}
    if arguments.peer:
        theirs_s = summary[PEER]["seconds"]
        described["one run against one seed"] = round(theirs_s / summary["ours, 1 seed"]["seconds"], 2)
        described["five runs against five seeds"] = round(5 * theirs_s / summary["ours, 5 seeds"]["seconds"], 2)
        found = agreement(summary["ours, 5 seeds"]["scores"], summary[PEER]["scores"])
        described["metrics"] = found
    print(json.dumps(described | {"runs": summary}, indent=2))
    if arguments.peer:
        scores = (
            f"{name} {side['mean']:.4f} ± {side['spread']:.4f} ({side['seeds']} seeds)"
            for name, side in (("ours", found["ours"]), (PEER, found["theirs"]))
        )
        verdict = "equal within the spread of seeds" if found["p"] >= 0.05 else "NOT EQUAL"
        print(f"{settings['metric']}: {', '.join(scores)}; difference {found['difference']:+.4f}, ", end="")
        print(f"p {found['p']:.2g}: {verdict}" if arguments.repeats >= 3 else "too few seeds to compare")


def agreement(ours: list[float], theirs: list[float]) -> dict:
    """Compare the metric of two tools over seeds: means, standard deviations, difference and p value."""
    from scipy.stats import mannwhitneyu

    sides = {
        name: {
            "mean": statistics.fmean(scores),
            "spread": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "seeds": len(scores),
        }
        for name, scores in (("ours", ours), ("theirs", theirs))
    }
    difference = sides["ours"]["mean"] - sides["theirs"]["mean"]
    return sides | {"difference": difference, "p": float(mannwhitneyu(ours, theirs).pvalue)}


def prepare(arguments: argparse.Namespace, work_dir: Path) -> dict:
    """Write the FASTA and the embeddings that both tools read."""
    from esm2kit.core.files import to_json
    from esm2kit.embedding.config import EmbedConfig
    from esm2kit.embedding.embed import embed
    from esm2kit.models.checkpoint import write_checkpoint
    from esm2kit.models.config import ESM2Config
    from esm2kit.models.esm2 import ESM2
    from esm2kit.tasks.data import load_task

    data = load_task(arguments.task, None, arguments.data_dir)
    if arguments.limit:
        data = data.limit_proteins(arguments.limit)
    per_residue = data.task.level == "residue"
    work_dir.mkdir(parents=True, exist_ok=True)
    fasta, labelled = work_dir / "proteins.fasta", work_dir / "task.fasta"
    names = {"train": "train", "validation": "val", "test": "test"}
    seen: set[str] = set()
    with open(fasta, "w", encoding="utf-8") as plain, open(labelled, "w", encoding="utf-8") as file:
        for row, (name, sequence) in enumerate(zip(data.ids, data.sequences, strict=True)):
            # biotrainer finds embeddings by sequence, so a sequence may occur in one set only
            if sequence in seen:
                continue
            seen.add(sequence)
            targets, scored = (
                values[data.offsets[row] : data.offsets[row + 1]] for values in (data.targets, data.scored)
            )
            target = "".join(data.task.labels[t] for t in targets) if per_residue else repr(float(targets[0]))
            mask = " MASK=" + "".join("01"[int(flag)] for flag in scored) if per_residue else ""
            plain.write(f">{name}\n{sequence}\n")
            file.write(f">{name} TARGET={target} SET={names[data.sets[row]]}{mask}\n{sequence}\n")
    config = ESM2Config(*WIDTHS[arguments.width])
    model = work_dir / f"random_{arguments.width}.safetensors"
    if not model.is_file():
        state = {f"model.{name}": tensor for name, tensor in ESM2.initialised(config, 0).state_dict().items()}
        write_checkpoint(model, state, {"model": to_json(config), "step": 0})
    made = embed(
        EmbedConfig(
            fasta, work_dir, name=f"width_{arguments.width}", model=str(model), per_protein=not per_residue,
            per_residue=per_residue, key="hash", long_proteins="window",
        )
    )  # fmt: skip
    return {
        "task": data.task.name, "metric": data.task.metric, "fasta": str(labelled), "per_residue": per_residue,
        "embeddings": str(made.hiddens or made.embeddings), "epochs": arguments.epochs, "threads": arguments.threads,
        "batch_size": arguments.batch_size or (128 if per_residue else 256),
        "sizes": data.sizes, "out": str(work_dir / "biotrainer"),
    }  # fmt: skip


def used() -> dict[str, float]:
    """Measure this process; the peak memory excludes its parent's, which ru_maxrss would include."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    status = Path("/proc/self/status")
    peak = status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0] if status.is_file() else usage.ru_maxrss
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mb": int(peak) / 1024}


def ours(settings: dict) -> None:
    import torch

    from esm2kit.benchmarking.model_features import read_features
    from esm2kit.benchmarking.probes.config import preset_config
    from esm2kit.benchmarking.probes.features import ProbeTargets
    from esm2kit.benchmarking.probes.fit import fit_probe
    from esm2kit.benchmarking.scores import number_proteins, score_fitted
    from esm2kit.tasks.data import load_task
    from esm2kit.tasks.flip import TASKS
    from esm2kit.tasks.metrics import sample_counts

    torch.set_num_threads(settings["threads"])
    data = load_task(settings["fasta"], None, Path("."))
    source = read_features(Path(settings["embeddings"]), data, settings["per_residue"])
    config = preset_config("biotrainer-flip", TASKS[settings["task"]])
    config = replace(config, epochs=settings["epochs"], batch_size=settings["batch_size"], patience=None)
    fitted = fit_probe(source.features, ProbeTargets.from_task(data), config, tuple(settings["seeds"]))
    counts_RP = sample_counts(int(number_proteins(data).max()) + 1, RESAMPLES)
    scores = score_fitted(fitted, data, counts_RP)[settings["metric"]]
    low, high = scores.interval.low, scores.interval.high
    print(json.dumps({"scores": scores.seeds, "interval": [low, high]} | used()))


def theirs(settings: dict) -> None:
    import torch
    from biotrainer.utilities.executer import parse_config_file_and_execute_run

    torch.set_num_threads(settings["threads"])
    residue = settings["per_residue"]
    metric = {"accuracy": "accuracy", "spearman": "spearmans-corr-coeff"}[settings["metric"]]
    result = parse_config_file_and_execute_run(
        {
            "protocol": "residue_to_class" if residue else "sequence_to_value",
            "input_file": settings["fasta"],
            "embeddings_file": settings["embeddings"],
            "output_dir": settings["out"],
            "model_choice": "CNN" if residue else "FNN",
            "dropout_rate": 0.0 if residue else 0.25,
            "optimizer_choice": "adam",
            "loss_choice": "cross_entropy_loss" if residue else "mean_squared_error",
            "learning_rate": 1e-3,
            "batch_size": settings["batch_size"],
            "num_epochs": settings["epochs"],
            "patience": settings["epochs"],
            "bootstrapping_iterations": RESAMPLES,
            "device": "cpu",
            "seed": settings["seeds"][0] + 1,
            "sanity_check": False,
        }
    )
    tests = result["test_results"]
    found = next(iter(tests.values()))["metrics"][metric]
    print(json.dumps({"scores": [found]} | used()))


if __name__ == "__main__":
    main()
