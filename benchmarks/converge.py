"""Pretrain the 8M model from scratch on a small data set for several seeds, and compare with the unigram baseline.

    python benchmarks/converge.py --fasta_dir uniprot_mini --out_dir converge [--seeds 1 2 3]

`fasta_dir` contains the files of NVIDIA's esm2nv stage: uniref50_train_filt.fasta, ur90_ur50_sampler.fasta, mapping.tsv
and uniref50_valid.fasta. Each seed has different initial weights, cluster members, crops and masks. Validation is the
same for all seeds and masks every scored residue. With windows of 256 tokens and a few million tokens, the model is far
from a trained ESM-2. The test shows that training works and how much seeds differ. Interrupted runs resume.
"""

import argparse
import csv
import logging
import statistics
import time
from pathlib import Path

import torch

from esm2kit.core.hardware import cpu_name
from esm2kit.preprocessing.preprocess import PreprocessConfig, preprocess
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain

GATE = 0.97  # required perplexity as a share of the unigram perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta_dir", type=Path, required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--max_steps", type=int, default=500)
    parser.add_argument("--global_batch_size", type=int, default=32)
    parser.add_argument("--max_tokens", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--precision", default="bf16-mixed", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    source = arguments.fasta_dir
    dataset = PreprocessConfig(
        train_fasta=source / "uniref50_train_filt.fasta",
        sampler_fasta=source / "ur90_ur50_sampler.fasta",
        mapping=source / "mapping.tsv",
        valid_fasta=source / "uniref50_valid.fasta",
        out_dir=arguments.out_dir / "dataset",
        leakage_identity=0,
    )
    preprocess(dataset)
    results = {seed: run(arguments, dataset.out_dir, seed) for seed in arguments.seeds}
    reached = [result["val_perplexity"] for result in results.values()]
    unigram = next(iter(results.values()))["unigram_perplexity"]
    print(f"\n{cpu_name()}, {arguments.threads} threads, {arguments.precision}, {time.strftime('%Y-%m-%d')}")
    print(f"unigram perplexity {unigram:.3f}; required: below {GATE} of it, {GATE * unigram:.3f}\n")
    print("| seed | lowest validation perplexity | at update | updates | tokens | minutes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for seed, result in results.items():
        validated = (row for row in read_rows(result["metrics"]) if row["val_perplexity"])
        best = min(validated, key=lambda row: float(row["val_perplexity"]))
        print(
            f"| {seed} | {float(best['val_perplexity']):.3f} | {best['step']} | {result['step']} "
            f"| {result['tokens'] / 1e6:.1f} M | {result['minutes']:.0f} |"
        )
    spread = statistics.stdev(reached) if len(reached) > 1 else 0.0
    outcome = "passed" if max(reached) < GATE * unigram else "FAILED"
    print(f"\nmean {statistics.fmean(reached):.3f}, spread {spread:.3f}: {outcome}")


def read_rows(metrics: str) -> list[dict[str, str]]:
    with open(metrics, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(arguments: argparse.Namespace, data: Path, seed: int) -> dict:
    """Train one seed; a finished run is only read."""
    result = pretrain(
        PretrainConfig(
            data=data,
            out_dir=arguments.out_dir / f"seed={seed}",
            model="esm2_t6_8M_UR50D",
            seed=seed,
            max_steps=arguments.max_steps,
            micro_batch_size=arguments.global_batch_size,
            max_tokens=arguments.max_tokens,
            lr=arguments.lr,
            warmup_steps=arguments.max_steps // 10,
            val_check_interval=max(1, arguments.max_steps // 5),
            precision=arguments.precision,
        )
    )
    # tokens are logged for every tenth update; use their mean for all
    rows = read_rows(result["metrics"])
    # the clock restarts when a run resumes: add the last reading before each restart
    clock = [float(row["seconds"]) for row in rows]
    seconds = sum(now for now, later in zip(clock, [*clock[1:], 0.0], strict=True) if later < now)
    tokens = statistics.fmean(float(row["tokens"]) for row in rows if row["tokens"])
    return result | {"tokens": tokens * result["step"], "minutes": seconds / 60}


if __name__ == "__main__":
    main()
