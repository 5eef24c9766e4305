"""Compare masked marginals of a protein with a fair-esm loop over positions, and measure the fast likelihood estimate.

    python benchmarks/score.py --fasta variants.fasta --residues 263 --size 8M
    python benchmarks/score.py --fasta variants.fasta --residues 263 --size 650M --positions 12 --rounds 3

Both have the same random weights and the same threads, in one process. A round runs both, one after the other, and the
first one changes from round to round. fair-esm runs the loop of examples/variant-prediction/predict.py: one position is
hidden, the model runs, and the log-probabilities of that position are kept. esm2kit runs the passes of the strategy
masked-marginals in packed batches, on single-threaded workers. The lines show seconds and CPU seconds; the latter are
less sensitive to other programs on the machine, with --threads 1. With --positions, both score that many positions,
evenly over the protein. The log-odds are compared. The estimate of `--sequences --fast` is compared with the exact
values on --proteins proteins of --estimate_fasta.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))

import numpy as np
import torch

from esm2kit.models.config import SIZES, complete_model_name
from esm2kit.models.encoder import TOKENS_PER_BATCH, Encoder
from esm2kit.models.esm2 import ESM2
from esm2kit.scoring.masked_passes import Pass, compute_batches, split_passes
from esm2kit.scoring.strategies import ProteinScorer, likelihood_passes
from esm2kit.scoring.variants import list_substitutions
from esm2kit.sequences.fasta import read_fasta


def main() -> None:
    """Run the benchmark and print one line per round and a summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fasta", type=Path, required=True, help="the first protein of at least --residues is used")
    parser.add_argument("--residues", type=int, default=263, help="the protein is cut to this many")
    parser.add_argument("--size", default="8M")
    parser.add_argument("--positions", type=int, help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ["OMP_NUM_THREADS"]))
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--batch_tokens", type=int, default=TOKENS_PER_BATCH["cpu"])
    parser.add_argument("--no_peer", action="store_true")
    parser.add_argument("--estimate_fasta", type=Path)
    parser.add_argument("--proteins", type=int, default=20)
    parser.add_argument("--model", help="weights for the estimate; default: the random ones")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = ESM2.initialised(SIZES[complete_model_name(options.size)], 0).eval()
    sequence = next(record.sequence for record in read_fasta(options.fasta) if len(record.sequence) >= options.residues)
    if options.rounds:
        compare_speed(options, model, sequence[: options.residues])
    if options.estimate_fasta:
        measure_estimate(options, model)


def compare_speed(options: argparse.Namespace, model: ESM2, sequence: str) -> None:
    """Time both in turns."""
    count = options.positions or len(sequence)
    positions = np.linspace(0, len(sequence) - 1, count).round().astype(int).tolist()
    encoder = Encoder(model, options.precision)
    variants = list_substitutions(0, sequence, positions)
    passes = next(ProteinScorer(sequence, variants, "masked-marginals", 1024).steps())
    contestants: dict[str, Callable[[], np.ndarray]] = {"esm2kit": lambda: run_ours(options, encoder, [passes])}
    if not options.no_peer:
        contestants["fair_esm"] = make_fair_esm(model, sequence, positions)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contestants}
    found = {}
    for number in range(options.rounds + 1):
        order = list(contestants) if number % 2 else list(contestants)[::-1]
        for name in order:
            torch.set_num_threads(options.threads)
            start, cpu_start = time.perf_counter(), time.process_time()
            found[name] = contestants[name]()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
        if number:
            line = {name: [round(times[-1], 3) for times in (seconds[name], cpu_seconds[name])] for name in contestants}
            print(json.dumps({"round": number} | line), flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    summary = {"size": options.size, "residues": len(sequence), "positions": count, "threads": options.threads}
    summary |= {"precision": options.precision, "seconds": {name: round(value, 3) for name, value in medians.items()}}
    summary["cpu_seconds"] = {name: round(statistics.median(times), 3) for name, times in cpu_seconds.items()}
    if "fair_esm" in found:
        ratios = [peer / own for peer, own in zip(seconds["fair_esm"], seconds["esm2kit"], strict=True)]
        wild = encode_positions(sequence, positions)
        odds = [table_NV - np.take_along_axis(table_NV, wild, 1) for table_NV in found.values()]
        summary |= {
            "times_faster": round(medians["fair_esm"] / medians["esm2kit"], 2),
            "times_less_cpu": round(summary["cpu_seconds"]["fair_esm"] / summary["cpu_seconds"]["esm2kit"], 2),
            "times_faster_per_round": [round(ratio, 2) for ratio in ratios],
            "largest_difference_of_log_odds": float(abs(odds[0][:, 4:24] - odds[1][:, 4:24]).max()),
        }
    print(json.dumps(summary))


def encode_positions(sequence: str, positions: list[int]) -> np.ndarray:
    """Return the token ids of the wild type at positions, (N, 1)."""
    from esm2kit.sequences.alphabet import encode

    return encode(sequence)[positions].astype(np.int64)[:, None]


def run_ours(options: argparse.Namespace, encoder: Encoder, steps: list[list[Pass]]) -> np.ndarray:
    """Compute the passes and return all values; tables have 33 columns."""
    batches = split_passes(steps, options.batch_tokens)
    values = np.concatenate(list(compute_batches(encoder, batches, options.threads)))
    return values.reshape(-1, 33) if steps[0][0].columns is None else values


def make_fair_esm(model: ESM2, sequence: str, positions: list[int]) -> Callable[[], np.ndarray]:
    """Return the loop of fair-esm's predict.py with the same weights."""
    import esm

    config = model.config
    peer = esm.ESM2(config.num_layers, config.embed_dim, config.attention_heads, "ESM-1b", config.token_dropout)
    peer.load_state_dict(model.state_dict(), strict=False)
    peer.eval()
    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    _, _, tokens_1T = alphabet.get_batch_converter()([("protein", sequence)])

    def run() -> np.ndarray:
        rows = []
        for position in positions:
            masked_1T = tokens_1T.clone()
            masked_1T[0, position + 1] = alphabet.mask_idx
            with torch.no_grad():
                log_prob_1TV = torch.log_softmax(peer(masked_1T)["logits"], dim=-1)
            rows.append(log_prob_1TV[0, position + 1])
        return torch.stack(rows).numpy()

    return run


def measure_estimate(options: argparse.Namespace, model: ESM2) -> None:
    """Measure the error and the time of the estimate with several numbers of passes."""
    if options.model:
        from esm2kit.models.load import load_model

        model = load_model(options.model)[0]
    encoder = Encoder(model, options.precision)
    sequences = [record.sequence for record in read_fasta(options.estimate_fasta) if 50 <= len(record.sequence) <= 500]
    sequences = sequences[: options.proteins]
    exact, exact_passes, exact_seconds = measure_likelihoods(options, encoder, sequences, None)
    for num_passes in (4, 8, 16, 32):
        means, count, seconds = measure_likelihoods(options, encoder, sequences, num_passes)
        error = means - exact
        summary = {"passes": num_passes, "proteins": len(sequences), "mean_error": round(float(error.mean()), 4)}
        summary |= {
            "mean_absolute_error": round(float(abs(error).mean()), 4),
            "largest": float(abs(error).max().round(4)),
        }
        summary |= {
            "spread_of_exact": round(float(exact.std()), 4),
            "times_fewer_passes": round(exact_passes / count, 1),
        }
        summary["times_less_cpu"] = round(exact_seconds / seconds, 1)
        summary |= {"correlation": round(float(np.corrcoef(means, exact)[0, 1]), 4)}
        print(json.dumps(summary))


def measure_likelihoods(
    options: argparse.Namespace, encoder: Encoder, sequences: list[str], num_passes: int | None
) -> tuple[np.ndarray, int, float]:
    """Return the mean log-likelihood of each protein, the number of passes, and the CPU seconds."""
    start = time.process_time()
    steps = [likelihood_passes(sequence, 1024, num_passes) for sequence in sequences]
    values = run_ours(options, encoder, steps)
    sizes = [sum(each.num_values for each in step) for step in steps]
    means = [part.mean() for part in np.split(values, np.cumsum(sizes)[:-1])]
    return np.array(means), sum(map(len, steps)), time.process_time() - start


if __name__ == "__main__":
    main()
