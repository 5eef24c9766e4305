"""Compare the training speed of esm2kit, transformers' EsmForMaskedLM and fair-esm's ESM2 in one process.

    python benchmarks/pretrain.py --fasta uniref50_train_filt.fasta [--sizes 8M 35M] [--rounds 5] [--threads 2]
    python benchmarks/pretrain.py --fasta ... --sizes 650M --device cuda --precision bf16 --sequences 256

All models start from the same weights and process the same masked sequences of at most 1,022 residues. A step is
forward pass, backward pass and fused AdamW. The peer tools run twice: in their usual way (one padded batch in the order
of the sequences), and with sorted, padded micro-batches of 1,024 tokens. The script checks that losses agree before it
measures time. Tokens exclude padding, and GFLOP/s count useful operations only. The ceiling is the rate of a matrix
product in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import esm
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from esm2kit.core.hardware import cpu_name, matmul_rate
from esm2kit.core.rng import stream_key
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.models.formats.hf_config import build_hf_config
from esm2kit.models.formats.huggingface import to_hf
from esm2kit.pretraining.masking import mask_tokens
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, PAD_IDX, encode
from esm2kit.sequences.fasta import read_fasta

NAMES = {name.split("_")[2]: name for name in SIZES}
Sample = tuple[np.ndarray, np.ndarray]  # masked tokens, and targets (-100 for tokens that are not scored)


def samples(fasta: Path, count: int) -> list[Sample]:
    """Read every k-th record of the file and mask it as in training."""
    records = list(islice(read_fasta(fasta), 20_000))
    made = []
    for index, record in enumerate(records[:: max(1, len(records) // count)][:count]):
        tokens = np.concatenate(([BOS_IDX], encode(record.sequence[:1022]), [EOS_IDX])).astype(np.uint8)
        inputs, selected = mask_tokens(tokens, stream_key(0, 0, index, 1))
        made.append((inputs.astype(np.int64), np.where(selected, tokens.astype(np.int64), -100)))
    return made


def padded(batch: list[Sample], device: str) -> tuple[Tensor, Tensor]:
    widest = max(len(inputs) for inputs, _ in batch)
    tokens, targets = (torch.full((len(batch), widest), value) for value in (PAD_IDX, -100))
    for row, (inputs, labels) in enumerate(batch):
        tokens[row, : len(inputs)], targets[row, : len(inputs)] = torch.tensor(inputs), torch.tensor(labels)
    return tokens.to(device), targets.to(device)


def by_tokens(batch: list[Sample], budget: int) -> list[list[Sample]]:
    """Sort by length and split into micro-batches of at most `budget` tokens, without padding."""
    cut: list[list[Sample]] = []
    num_tokens = 0
    for sample in sorted(batch, key=lambda sample: -len(sample[0])):
        if not cut or num_tokens + len(sample[0]) > budget:
            cut.append([])
            num_tokens = 0
        cut[-1].append(sample)
        num_tokens += len(sample[0])
    return cut


class Contender:
    """A model with its optimizer; `step` trains on a batch and returns the mean loss of the masked tokens."""

    def __init__(
        self, name: str, model: nn.Module, logits: Callable[[Tensor], Tensor] | None, budget: int | None
    ) -> None:
        self.name, self.model, self.logits, self.budget = name, model, logits, budget
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(self, batch: list[Sample], device: str, amp: bool) -> float:
        masked = sum(int((targets >= 0).sum()) for _, targets in batch)
        total = 0.0
        for micro in by_tokens(batch, self.budget) if self.budget else [batch]:
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                loss = self._loss_sum(micro, device) / masked
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _loss_sum(self, micro: list[Sample], device: str) -> Tensor:
        if self.logits is not None:
            tokens_BT, targets_BT = padded(micro, device)
            logits_BTV = self.logits(tokens_BT)
            return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")
        tokens_N = torch.tensor(np.concatenate([inputs for inputs, _ in micro]), device=device)
        targets_N = torch.tensor(np.concatenate([targets for _, targets in micro]), device=device)
        rows_M = (targets_N >= 0).nonzero()[:, 0]
        logits_MV = self.model.masked_logits(tokens_N, Packed([len(inputs) for inputs, _ in micro], device), rows_M)
        return F.cross_entropy(logits_MV.float(), targets_N[rows_M], reduction="sum")


def contenders(config: ESM2Config, device: str, budget: int, peers: bool) -> list[Contender]:
    ours = ESM2.initialised(config, 0)
    ours.contact_head.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    made = [Contender("esm2kit", ours.to(device).train(), None, budget)]
    if not peers:
        return made
    for label, peer_budget in (("", None), (", sorted 1,024-token batches", 1024)):
        hf = transformers.EsmForMaskedLM(transformers.EsmConfig(**build_hf_config(config)))
        hf.load_state_dict(to_hf(state, config), strict=False)
        hf.to(device).train()
        call = lambda tokens, model=hf: model(tokens, attention_mask=(tokens != PAD_IDX).long()).logits  # noqa: E731
        made.append(Contender(f"transformers{label}", hf, call, peer_budget))
        fair = esm.ESM2(config.num_layers, config.embed_dim, config.attention_heads)
        fair.load_state_dict(state)
        fair.to(device).train()
        made.append(
            Contender(f"fair-esm{label}", fair, lambda tokens, model=fair: model(tokens)["logits"], peer_budget)
        )
    return made


def measure(size: str, arguments: argparse.Namespace) -> None:
    config = SIZES[NAMES[size]]
    batch = samples(arguments.fasta, arguments.sequences)
    counts = [len(inputs) for inputs, _ in batch]
    masked = sum(int((targets >= 0).sum()) for _, targets in batch)
    tokens, amp = sum(counts), arguments.precision == "bf16"
    flops = 3 * config.forward_flops(counts, masked)
    runners = contenders(config, arguments.device, arguments.micro_tokens, not arguments.no_peers)
    if arguments.compile:
        for layer in runners[0].model.layers:
            layer.compile(dynamic=True)
    dtype = torch.bfloat16 if amp else torch.float32
    losses = {runner.name: runner.step(batch, arguments.device, amp) for runner in runners}
    reference = losses["esm2kit"]
    for name, loss in losses.items():
        assert abs(loss - reference) < (2e-2 if amp else 1e-4) * reference, f"{name}: loss {loss}, esm2kit {reference}"
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    ceilings = []
    for _ in range(arguments.rounds):
        ceilings.append(matmul_rate(arguments.device, dtype, 8192 if arguments.device == "cuda" else 1024))
        for runner in runners:
            began = time.perf_counter()
            runner.step(batch, arguments.device, amp)
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            seconds[runner.name].append(time.perf_counter() - began)
    ceiling = statistics.median(ceilings)
    padded_tokens = len(counts) * max(counts)
    print(
        f"\n{size}: {len(batch)} sequences, {tokens:,} tokens ({padded_tokens:,} padded), equal losses {reference:.5f}"
    )
    print(f"matrix-product ceiling {ceiling / 1e9:,.0f} GFLOP/s")
    print(f"{'':<44}{'tokens/s':>10}{'min':>9}{'max':>9}{'GFLOP/s':>9}{'of ceiling':>11}{'esm2kit/it':>11}")
    mine = statistics.median(seconds["esm2kit"])
    for name, times in seconds.items():
        median = statistics.median(times)
        rates = f"{tokens / median:>10,.0f}{tokens / max(times):>9,.0f}{tokens / min(times):>9,.0f}"
        print(f"{name:<44}{rates}{flops / median / 1e9:>9,.0f}{flops / median / ceiling:>11.0%}{median / mine:>11.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fasta", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=["8M", "35M"], choices=NAMES)
    parser.add_argument("--sequences", type=int, default=12, help="Sequences per step.")
    parser.add_argument("--micro_tokens", type=int, default=1024, help="Tokens per micro-batch of esm2kit.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32", choices=["32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="Compile the layers of esm2kit.")
    parser.add_argument("--no_peers", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_name()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {device}, {arguments.threads} threads")
    print(f"medians of {arguments.rounds} interleaved rounds, {arguments.precision}, {time.strftime('%Y-%m-%d')}")
    for size in arguments.sizes:
        measure(size, arguments)


if __name__ == "__main__":
    main()
