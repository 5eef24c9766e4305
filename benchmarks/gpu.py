"""Check one GPU in under ten minutes: numerical parity, then embedding and training speed compared with transformers.

    python benchmarks/gpu.py --fasta proteins.fasta --out gpu.md

All contestants have the same random weights and read the same proteins of the FASTA, truncated to 1,022 residues. Each
one is warmed up until two consecutive runs agree within 5%. Then all run alternately, and the tables report the median,
fastest and slowest of seven runs. Padding is not counted. transformers runs EsmModel or EsmForMaskedLM with SDPA in the
same precision, on batches sorted by length with the same token budget (half of it in training, where its padded batches
require more memory), and computes means on the device.
Sections: parity, embed, program (FASTA to HDF5), train (one update), pretrain (whole program).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import esm2kit
from esm2kit.core.hardware import matmul_rate
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import SIZES
from esm2kit.models.esm2 import ESM2, Packed, tokenize
from esm2kit.models.formats.hf_config import build_hf_config
from esm2kit.models.formats.huggingface import to_hf
from esm2kit.sequences.alphabet import MASK_IDX, PAD_IDX
from esm2kit.sequences.fasta import read_fasta

NAMES = {"8M": "esm2_t6_8M_UR50D", "35M": "esm2_t12_35M_UR50D", "650M": "esm2_t33_650M_UR50D"}
SECTIONS = ("parity", "embed", "program", "train", "pretrain")
MAX_RESIDUES, ROUNDS = 1022, 7
EMBED_TOKENS = 32_768
TRAIN_TOKENS = {"8M": 65_536, "35M": 65_536, "650M": 16_384}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, required=True, help="Proteins to sample from.")
    parser.add_argument("--sizes", nargs="+", default=["8M", "650M"], choices=list(NAMES))
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument(
        "--residues", type=int, default=1_000_000, help="Residues to embed per run with 8M; a quarter of it with 650M."
    )
    parser.add_argument("--program_proteins", type=int, default=8_000, help="Proteins to embed from FASTA to HDF5.")
    parser.add_argument("--device", default="cuda", help="Device; cpu tests the script itself.")
    parser.add_argument("--out", type=Path, help="Output file for the tables in Markdown.")
    options = parser.parse_args()
    proteins = [record.sequence[:MAX_RESIDUES] for record in read_fasta(options.fasta)]
    np.random.default_rng(0).shuffle(proteins)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    ceiling = matmul_rate(options.device, torch.bfloat16 if options.device == "cuda" else torch.float32)
    lines = [
        f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{time.strftime('%Y-%m-%d')}: `python {' '.join(sys.argv)}`",
        f"matrix product ceiling {ceiling / 1e12:,.0f} TFLOP/s",
        "",
    ]
    for section in options.sections:
        began = time.perf_counter()
        try:
            lines += [f"### {section}", "", *globals()[f"section_{section}"](options, proteins, ceiling), ""]
        except Exception as error:  # continue with the other sections
            lines += [f"{section} failed: {type(error).__name__}: {error}", ""]
        torch.cuda.empty_cache()
        lines.append(f"({section}: {time.perf_counter() - began:.0f} s)\n")
        print("\n".join(lines), flush=True)
        if options.out:
            options.out.write_text("\n".join(lines), encoding="utf-8")


def take_turns(
    contestants: dict[str, Callable[[], object]], device: str, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Measure the seconds of every contestant's runs, alternately, after a warm-up."""

    def once(run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for run in contestants.values():
        before, now, tries = 0.0, once(run), 1
        while abs(now - before) > 0.05 * now and tries < 6:
            before, now, tries = now, once(run), tries + 1
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            seconds[name].append(once(run))
    return seconds


def table(
    seconds: dict[str, list[float]], work: float, unit: str, flops: float = 0.0, ceiling: float = 0.0
) -> list[str]:
    first = statistics.median(next(iter(seconds.values())))
    rows = [f"| | {unit} | slowest | fastest | of ceiling | esm2kit / it |", "| --- | --- | --- | --- | --- | --- |"]
    for name, times in seconds.items():
        median = statistics.median(times)
        share = f"{flops / median / ceiling:.0%}"
        rates = " | ".join(f"{work / each:,.0f}" for each in (median, max(times), min(times)))
        rows.append(f"| {name} | {rates} | {share} | {median / first:.2f} |")
    return rows


def batches_of(sequences: Sequence[str], budget: int, padded: bool) -> list[list[str]]:
    """Split sequences, longest first, into batches of a token budget; `padded` batches count their padding."""
    batches: list[list[str]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        batch = batches[-1] if batches else []
        num_tokens = (
            (len(batch) + 1) * (len(batch[0]) + 2) if batch and padded else sum(len(s) + 2 for s in (*batch, sequence))
        )
        if not batch or num_tokens > budget:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def packed_tokens(sequences: Sequence[str]) -> tuple[Tensor, list[int]]:
    rows = [tokens_T[tokens_T != PAD_IDX] for tokens_T in (tokenize([sequence])[0] for sequence in sequences)]
    return torch.cat(rows), [len(row) for row in rows]


def up_to(proteins: Sequence[str], residues: int) -> list[str]:
    ends = np.cumsum([len(sequence) for sequence in proteins])
    return list(proteins[: max(1, int(np.searchsorted(ends, residues)))])


def hf_model(model: ESM2, kind: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    config = transformers.EsmConfig(**build_hf_config(model.config), attn_implementation="sdpa")
    masked_lm = transformers.EsmForMaskedLM(config)
    masked_lm.load_state_dict(to_hf(model.state_dict(), model.config), strict=False)
    return (masked_lm.esm if kind == "encoder" else masked_lm).to(device, dtype)


def section_parity(options: argparse.Namespace, proteins: list[str], ceiling: float) -> list[str]:
    """Compare float32 and bfloat16 on the device with float64 on the CPU, for a protein alone and in a batch."""
    model = ESM2.initialised(SIZES[NAMES["8M"]], 0).eval()
    some = proteins[:24]
    tokens_N, counts = packed_tokens(some)
    with torch.inference_mode():
        exact_ND = ESM2.initialised(model.config, 0).double().eval().encode(tokens_N, Packed(counts))
    rows = [
        "| precision | largest difference from float64, of the largest number | alone or in a batch |",
        "| --- | --- | --- |",
    ]
    for precision in ("float32", "bfloat16"):
        encoder = esm2kit.Encoder(ESM2.initialised(model.config, 0).eval(), precision, options.device)
        last = model.config.num_layers
        together_ND = encoder.encode(tokens_N, counts, [last])[last].cpu().double()
        error = ((together_ND - exact_ND).abs().max() / exact_ND.abs().max()).item()
        apart_ND = torch.cat([encoder.encode(part, [len(part)], [last])[last].cpu() for part in tokens_N.split(counts)])
        alone = ((apart_ND.double() - together_ND).abs().max() / exact_ND.abs().max()).item()
        rows.append(f"| {precision} | {error:.1e} | {alone:.1e} |")
    return rows


def section_embed(options: argparse.Namespace, proteins: list[str], ceiling: float) -> list[str]:
    """Measure the time from sequences in memory to per-protein means in memory."""
    from esm2kit.embedding.batch import Output, Windowing, embed_batch

    lines = []
    for size in options.sizes:
        config = SIZES[NAMES[size]]
        some = up_to(proteins, options.residues // (1 if size == "8M" else 4))
        model = ESM2.initialised(config, 0).eval()
        half = torch.bfloat16 if options.device == "cuda" else torch.float32
        peer = hf_model(model, "encoder", options.device, half).eval()
        encoder = esm2kit.Encoder(model, "bfloat16" if options.device == "cuda" else "float32", options.device)
        outputs = [Output("embeddings", config.num_layers, "mean", config.embed_dim)]
        segments = Windowing(MAX_RESIDUES, 256, EMBED_TOKENS)
        packs = batches_of(some, EMBED_TOKENS, padded=False)
        blocks = batches_of(some, EMBED_TOKENS, padded=True)

        def ours(encoder=encoder, outputs=outputs, segments=segments, packs=packs) -> list:
            # two threads as in `esm2kit embed`: one copies while the kernels of the other run
            with ThreadPoolExecutor(2) as pool:
                done = pool.map(lambda pack: embed_batch(encoder, pack, outputs, segments, "float32")[0], packs)
                return [row for rows in done for row in rows]

        @torch.inference_mode()
        def theirs(peer=peer, blocks=blocks) -> list:
            means = []
            for block in blocks:
                tokens_BT = tokenize(block).to(options.device)
                hidden_BTD = peer(tokens_BT, attention_mask=(tokens_BT != PAD_IDX).long()).last_hidden_state
                counts_B = torch.tensor([len(sequence) for sequence in block], device=options.device)
                inside_BT = torch.arange(tokens_BT.shape[1], device=options.device) <= counts_B[:, None]
                inside_BT[:, 0] = False
                means.append(((hidden_BTD * inside_BT[..., None]).sum(1).float() / counts_B[:, None]).cpu())
            return [row.numpy() for mean_BD in means for row in mean_BD]

        difference = max(np.abs(a - b).max() for a, b in zip(ours(), theirs(), strict=True))
        residues = sum(map(len, some))
        flops = config.forward_flops([len(sequence) + 2 for sequence in some], 0)
        seconds = take_turns({"esm2kit": ours, "transformers": theirs}, options.device)
        for layer in encoder.model.layers:
            layer.compile(dynamic=True)
        seconds |= take_turns({"esm2kit, layers compiled": ours}, options.device)
        lines += [
            f"{size}: {len(some):,} proteins, {residues:,} residues; means differ by {difference:.1e} at most",
            "",
        ]
        lines += [*table(seconds, residues, "residues/s", flops, ceiling), ""]
        del model, peer, encoder, ours, theirs
        torch.cuda.empty_cache()
    return lines


def section_program(options: argparse.Namespace, proteins: list[str], ceiling: float) -> list[str]:
    """Measure `esm2kit.embed` from FASTA to HDF5, including loading, for means and for float16 residue vectors."""
    rows = ["| | proteins | residues | seconds | residues/s |", "| --- | --- | --- | --- | --- |"]
    for size in options.sizes:
        some = proteins[: options.program_proteins // (1 if size == "8M" else 4)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "proteins.fasta").write_text(
                "".join(f">p{i}\n{s}\n" for i, s in enumerate(some)), encoding="utf-8"
            )
            model = ESM2.initialised(SIZES[NAMES[size]], 0)
            tensors = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
            write_checkpoint(folder / "model.safetensors", tensors, {"model": model.config, "step": 0})
            del model
            residues = sum(map(len, some))
            for label, more in (
                ("means", {}),
                ("means and residues, float16", {"per_residue": True, "dtype": "float16"}),
            ):
                if more and size != "8M":
                    continue
                began = time.perf_counter()
                precision = "bfloat16" if options.device == "cuda" else "float32"
                esm2kit.embed(
                    esm2kit.EmbedConfig(
                        folder / "proteins.fasta", folder / f"out{len(rows)}", model=str(folder / "model.safetensors"),
                        precision=precision, device=options.device, layout="packed", **more,
                    )
                )  # fmt: skip
                seconds = time.perf_counter() - began
                rows.append(
                    f"| {size}, {label} | {len(some):,} | {residues:,} | {seconds:.1f} | {residues / seconds:,.0f} |"
                )
    return rows


def section_train(options: argparse.Namespace, proteins: list[str], ceiling: float) -> list[str]:
    """Measure forward pass, backward pass and AdamW on one micro-batch with bfloat16 autocast and 15% masking."""
    return [line for size in options.sizes for line in train_size(size, options.device, proteins, ceiling)]


def train_size(size: str, device: str, proteins: list[str], ceiling: float) -> list[str]:
    config, budget = SIZES[NAMES[size]], TRAIN_TOKENS[size]
    some = up_to(proteins, budget)
    tokens_N, counts = packed_tokens(some)
    tokens_N = tokens_N.to(device)
    generator = torch.Generator(device).manual_seed(0)
    rows_M = (torch.rand(len(tokens_N), generator=generator, device=device) < 0.15).nonzero()[:, 0]
    inputs_N, targets_M = tokens_N.index_fill(0, rows_M, MASK_IDX), tokens_N[rows_M]

    def our_step(compiled: bool) -> Callable[[], None]:
        model = ESM2.initialised(config, 0).to(device).train()
        model.contact_head.requires_grad_(False)
        if compiled:
            for layer in model.layers:
                layer.compile(dynamic=True)

        def loss() -> Iterator[Tensor]:
            logits_MV = model.masked_logits(inputs_N, Packed(counts, device, bucketed=True), rows_M)
            yield F.cross_entropy(logits_MV.float(), targets_M)

        return stepper(model, loss, device)

    def their_step() -> Callable[[], None]:
        peer = hf_model(ESM2.initialised(config, 0), "masked_lm", device, torch.float32).train()
        blocks = [tokenize(block).to(device) for block in batches_of(some, budget // 2, padded=True)]

        def losses() -> Iterator[Tensor]:
            for tokens_BT in blocks:
                real_BT = tokens_BT != PAD_IDX
                chosen_BT = (torch.rand(tokens_BT.shape, device=device) < 0.15) & real_BT
                logits_BTV = peer(tokens_BT.masked_fill(chosen_BT, MASK_IDX), attention_mask=real_BT.long()).logits
                yield F.cross_entropy(logits_BTV[chosen_BT].float(), tokens_BT[chosen_BT])

        return stepper(peer, losses, device)

    lines = [f"{size}: {len(counts)} sequences, {len(tokens_N):,} tokens a micro-batch", ""]
    seconds = take_turns({"esm2kit": our_step(False), "esm2kit, layers compiled": our_step(True)}, device)
    torch.cuda.empty_cache()
    try:
        seconds |= take_turns({"transformers": their_step()}, device)
    except torch.cuda.OutOfMemoryError:
        lines[:0] = [f"transformers at {size}: out of memory", ""]
    flops = 3 * config.forward_flops(counts, len(rows_M))
    return [*lines, *table(seconds, len(tokens_N), "tokens/s", flops, ceiling), ""]


def stepper(model: torch.nn.Module, losses: Callable[[], Iterator[Tensor]], device: str) -> Callable[[], None]:
    """Run one update: accumulate the gradients of the losses, then apply AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            for loss in losses():
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def section_pretrain(options: argparse.Namespace, proteins: list[str], ceiling: float) -> list[str]:
    """Measure `esm2kit pretrain` of 8M: median tokens/s after the first quarter, per number of data workers."""
    from esm2kit.training.metrics_log import read_metrics

    rows = ["| 8M, 512 sequences an update | tokens/s |", "| --- | --- |"]
    precision = "bf16-mixed" if options.device == "cuda" else "32-true"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.fasta").write_text("".join(f">p{i}\n{s}\n" for i, s in enumerate(proteins)), encoding="utf-8")
        esm2kit.preprocess(
            esm2kit.PreprocessConfig(
                folder / "train.fasta", out_dir=folder / "data", val_size=0.01, leakage_identity=0.0
            )
        )
        for workers, compiled in ((0, False), (8, False), (8, True)):
            out_dir = folder / f"run{workers}{compiled}"
            esm2kit.pretrain(
                esm2kit.PretrainConfig(
                    folder / "data", out_dir=out_dir, max_steps=40, global_batch_size=512, micro_batch_size=256,
                    num_workers=workers, precision=precision, accelerator=options.device, compile=compiled,
                    val_check_interval=40, log_every_n_steps=5,
                )
            )  # fmt: skip
            rates = [float(row["tokens_per_s"]) for row in read_metrics(out_dir / "metrics.csv") if row["tokens_per_s"]]
            label = f"num_workers {workers}{', compiled' if compiled else ''}"
            rows.append(f"| {label} | {statistics.median(rates[len(rates) // 4 :]):,.0f} |")
            print(rows[-1], flush=True)  # a later run may fail
    return rows


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
