"""Compare a sweep over all layers of a model with embedding one layer: seconds of the clock and of the CPU.

    python benchmarks/layer_sweep.py --data_dir flip --task gb1 --limit 60 --rounds 5
    python benchmarks/layer_sweep.py --data_dir flip --task gb1 --limit 200 --rounds 3 --probe fnn --preset schmirler

Random weights of a published size. Each round embeds the proteins of a task twice, in turn: the last layer, and all
layers in one pass, whose probes then choose a layer on validation. FNNs of all layers are trained in one pass, and for
comparison also one layer after the other. Prints the medians and the ratios of the rounds, and the cost that was
estimated before. Everything runs in one process; nothing is reused.
"""

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from esm2kit.benchmarking import layer_sweep
from esm2kit.benchmarking.layer_sweep import Candidate, choose_features
from esm2kit.benchmarking.model_features import embed_task, read_features
from esm2kit.benchmarking.probes.config import ProbeConfig, preset_config
from esm2kit.core.hardware import cpu_name
from esm2kit.core.processes import count_cores
from esm2kit.embedding.cost import estimate_cost
from esm2kit.models.config import SIZES, complete_model_name
from esm2kit.sequences.windows import Windowing
from esm2kit.tasks.data import load_task
from esm2kit.tasks.task_data import TaskData

SEEDS = (0, 1, 2, 3, 4)
ONE_BY_ONE = "probes, one layer after the other"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with FLIP's task folders.")
    parser.add_argument("--task", default="gb1", help="A task with one target per protein.")
    parser.add_argument("--size", default="8M")
    parser.add_argument("--limit", type=int, default=100, help="Proteins per set.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--probe", choices=["ridge", "logistic", "fnn"], help="Default: that of the preset.")
    parser.add_argument("--preset", default="esm2kit")
    parser.add_argument("--epochs", type=int, help="Default: those of the preset.")
    options = parser.parse_args()
    model = complete_model_name(options.size)
    data = load_task(options.task, None, options.data_dir).limit_proteins(options.limit)
    layers = list(range(SIZES[model].num_layers + 1))
    residues = int(data.num_residues.sum())
    print(
        f"{cpu_name()}, {count_cores()} cores, {datetime.date.today()}; {model} with random weights, {len(data.ids)} "
        f"proteins of {options.task}, {residues:,} residues"
    )
    cost = estimate_cost(SIZES[model], data.num_residues.tolist(), len(layers), ["mean"], "float32", "cpu",
                         Windowing(1022, 256, 0))  # fmt: skip
    print(f"estimated before: {cost}")
    probe = preset_config(options.preset, data.task, options.probe)
    probe = replace(probe, epochs=options.epochs or probe.epochs)
    rounds: dict[str, list[tuple[float, float]]] = {"one layer": [], "all layers": [], "probes": []}
    if probe.probe == "fnn":
        rounds[ONE_BY_ONE] = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            _, seconds = measure(embed, data, model, layers[-1:], Path(folder) / "one")
            rounds["one layer"].append(seconds)
            paths, seconds = measure(embed, data, model, layers, Path(folder) / "all")
            rounds["all layers"].append(seconds)
            rounds["probes"].append(measure(choose, data, paths, probe)[1])
            if ONE_BY_ONE in rounds:
                together, layer_sweep.BYTES_TOGETHER = layer_sweep.BYTES_TOGETHER, 0
                rounds[ONE_BY_ONE].append(measure(choose, data, paths, probe)[1])
                layer_sweep.BYTES_TOGETHER = together
        ratio = rounds["all layers"][-1][0] / rounds["one layer"][-1][0]
        print(f"round {number + 1}: all layers took {ratio:.2f} times as long as one", flush=True)
    report(rounds)


def embed(data: TaskData, model: str, layers: list[int], folder: Path) -> dict[tuple[int, str], Path]:
    """Embed all proteins with random weights."""
    return embed_task(data, model, layers, ["mean"], folder, "cpu", untrained_seed=0)


def choose(data: TaskData, paths: dict[tuple[int, str], Path], probe: ProbeConfig) -> int:
    """Choose a layer on validation."""
    candidates = [
        Candidate(layer, pooling, read_features(path, data, False, loads=False), probe)
        for (layer, pooling), path in paths.items()
    ]
    return choose_features(candidates, data, SEEDS).index


def measure(run: Callable[..., Any], *arguments: Any) -> tuple[Any, tuple[float, float]]:
    """Return the result, and the seconds of the clock and of the CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = run(*arguments)
    return result, (time.perf_counter() - clock, time.process_time() - cpu)


def report(rounds: dict[str, list[tuple[float, float]]]) -> None:
    """Print medians, and the medians of the ratios of the rounds."""
    for name, seconds in rounds.items():
        clock, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(f"{name}: {clock:.2f} s of the clock, {cpu:.2f} s of the CPU")
    for name, parts in (("all layers", ["all layers"]), ("all layers and probes", ["all layers", "probes"])):
        ratios = [
            statistics.median(
                sum(rounds[part][number][column] for part in parts) / rounds["one layer"][number][column]
                for number in range(len(rounds["one layer"]))
            )
            for column in (0, 1)
        ]
        print(f"{name} / one layer: {ratios[0]:.2f} by the clock, {ratios[1]:.2f} by the CPU")


if __name__ == "__main__":
    main()
