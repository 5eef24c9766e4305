"""Compare the memory estimates of training and inference with the measured growth of a process.

    python benchmarks/memory.py --sizes 8M 35M --tokens 2048

Each row runs in a process of its own with one thread. Measured is the peak of the resident memory of the second of two
updates (or of one batch) minus the resident memory before the model was built. Large blocks are allocated by mmap, so
that freed memory is returned and the peak is what is in use.
"""

import argparse
import os
import subprocess
import sys

import torch
import torch.nn.functional as F

from esm2kit.core.hardware import read_memory_use
from esm2kit.models.config import SHORT_NAMES, SIZES, ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.models.memory import InferenceSettings, TrainingSettings, estimate_inference, estimate_training

USES = ("embed", "train", "train, recomputed")
SEQUENCE_TOKENS = 256
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8M", "35M", "150M"], choices=list(SHORT_NAMES))
    parser.add_argument("--tokens", type=int, default=2048, help="Tokens per batch, a multiple of 256.")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "USE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure(*options.one, options.tokens))
        return
    print(f"torch {torch.__version__}, {options.tokens:,} tokens, float32, GB (1e9 bytes)\n")
    print("| | estimate | measured | ratio |\n| --- | --- | --- | --- |")
    for size in options.sizes:
        for use in USES:
            command = [sys.executable, __file__, "--tokens", str(options.tokens), "--one", size, use]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
            found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            measured, expected = int(found.split()[-1]), estimate(size, use, options.tokens)
            row = f"{expected / 1e9:.2f} | {measured / 1e9:.2f} | {expected / measured:.2f}"
            print(f"| {size}, {use} | {row} |", flush=True)


def estimate(size: str, use: str, tokens: int) -> float:
    shape = SIZES[SHORT_NAMES[size]]
    if use == "embed":
        return estimate_inference(shape, InferenceSettings(tokens=tokens)).total
    settings = TrainingSettings(tokens=tokens, activation_checkpointing=use.endswith("recomputed"))
    return estimate_training(shape, settings).total


def measure(size: str, use: str, tokens: int) -> int:
    """Return the growth of this process in bytes, after a small model has loaded the libraries."""
    torch.set_num_threads(1)
    run(ESM2Config(1, 64, 4), use, SEQUENCE_TOKENS)
    before = read_memory_use(CPU)
    run(SIZES[SHORT_NAMES[size]], use, tokens)
    return read_memory_use(CPU, peak=True) - before


def run(shape: ESM2Config, use: str, tokens: int) -> None:
    """Embed one batch, or make two updates."""
    model = ESM2.initialised(shape, 0)
    tokens_N, num_tokens = torch.randint(4, 24, (tokens,)), [SEQUENCE_TOKENS] * (tokens // SEQUENCE_TOKENS)
    if use == "embed":
        Encoder(model.eval()).encode(tokens_N, num_tokens, [model.config.num_layers])
        return
    model.contact_head.requires_grad_(False)
    model.activation_checkpointing = use.endswith("recomputed")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rows_M = torch.arange(0, tokens, 7)
    for _ in range(2):
        logits_MV = model.masked_logits(tokens_N, Packed(num_tokens), rows_M)
        F.cross_entropy(logits_MV, tokens_N[rows_M]).backward()
        del logits_MV
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
