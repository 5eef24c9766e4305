r"""Measure one GPU in under ten minutes: esm2kit, transformers with SDPA, and fair-esm.

    python benchmarks/gpu.py --fasta proteins.fasta --out gpu.md [--update_docs docs/measured.md]

FlashAttention 2 in transformers, FlashAttention 4 through torch's switch, and the layers of Transformer Engine take
part where they are installed; otherwise a line says what is missing. All contestants of a comparison have the same
random weights (Transformer Engine has its own) and read the same proteins, truncated to 1,022 residues. Each one is
warmed up until two consecutive runs agree within 5%. Then all run alternately, and the result is the median of seven
rounds. Padding is not counted. Batches of transformers and fair-esm are sorted by length, have the same token budget
(half of it in training, where padded batches need more memory), and are averaged on the device.

Sections: parity; embed (sequences to means in memory); program (FASTA to HDF5); write (the files alone); train (one
update); pretrain (`esm2kit pretrain` with its defaults); checkpoints (how long a save stops the training); memory
(estimates against torch's peak). Each has a share of `--minutes`. What would exceed it is reported as not measured.
The exit code is 1 if anything failed. `--device cpu --shapes ...` tests the script itself.
"""

import argparse
import importlib.util
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import esm
import h5py
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import esm2kit
from esm2kit.core.hardware import cpu_name, is_out_of_memory, matmul_rate, read_memory_use
from esm2kit.embedding import run as embed_run
from esm2kit.embedding.batch import Output, Windowing, embed_batch
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.compiled import compile_layers
from esm2kit.models.config import SHORT_NAMES, SIZES, ESM2Config
from esm2kit.models.esm2 import ESM2, Packed, tokenize
from esm2kit.models.formats.hf_config import build_hf_config
from esm2kit.models.formats.huggingface import to_hf
from esm2kit.models.memory import (
    InferenceSettings,
    TrainingSettings,
    estimate_inference,
    estimate_training,
    format_gib,
    largest_budget,
)
from esm2kit.models.packing import activate_flash_attention_4
from esm2kit.sequences.alphabet import MASK_IDX, PAD_IDX
from esm2kit.sequences.fasta import read_fasta
from esm2kit.training import compilation
from esm2kit.training.metrics_log import read_metrics
from esm2kit.training.parallel import clip_grad_norm
from esm2kit.training.precision import precision_context

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures of benchmarks/gpu.py: begin -->", "<!-- figures of benchmarks/gpu.py: end -->"
MAX_RESIDUES, ROUNDS, MINUTES = 1022, 7, 9.0
MOST_PROTEINS = 100_000  # that are read
EMBED_TOKENS = 32_768
TRAIN_TOKENS = {"8M": (65_536, 1), "650M": (16_384, 2)}  # tokens per micro-batch, and micro-batches per update
WARM_UP_SHARE = 0.7  # of the time left, that preparing and warming up one contestant may take
MEMORY_SHARE = 0.8  # of a GPU, which the estimate of a training run may reach
FLASH_4_IS_ACTIVE = [True]  # in this process, where it is installed
HALF_PEAK = {"H100": 989e12, "H200": 989e12}  # FLOP/s in bf16 without sparsity, by NVIDIA's data sheets


class OverTimeError(BaseException):
    """A time limit has passed. Not an Exception, so that no library catches it."""


class TimedRun(NamedTuple):
    """A run that measured its own seconds."""

    seconds: float


class Row(NamedTuple):
    """A line of the table: the results of the rounds in `unit`, or none and a remark that says why."""

    section: str
    size: str
    name: str
    values: tuple[float, ...] = ()
    unit: str = ""
    share: float | None = None  # of the ceiling
    remark: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None


class Goal(NamedTuple):
    """What esm2kit should reach on one H100: the best of its rows, as a number or relative to transformers."""

    name: str
    section: str
    size: str
    least: float
    unit: str = "residues/s"
    relative: bool = False


GOALS = (
    Goal("embed 650M, whole program, relative to transformers", "program", "650M", 2.3, "x", True),
    Goal("embed 650M, whole program", "program", "650M", 270_000),
    Goal("embed 8M, whole program", "program", "8M", 1_500_000),
    Goal("train 650M (45% MFU)", "train", "650M", 110_000, "tokens/s"),
    Goal("train 8M, whole program", "pretrain", "8M", 1_400_000, "tokens/s"),
    Goal("train 3B", "train", "3B", 28_000, "tokens/s"),
)


@dataclass
class Lab:
    """Everything that the sections share, and what they found."""

    options: argparse.Namespace
    proteins: list[str]
    folder: Path
    shapes: dict[str, ESM2Config]
    ceiling: float = 1.0
    end: float = float("inf")  # of the section, in seconds of time.monotonic
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    profiles: dict[str, list[str]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)  # what the first run of each contestant returned
    has_flash_4: bool = False

    @property
    def device(self) -> str:
        return self.options.device

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    def each_size(self, sizes: Sequence[str]) -> Iterator[str]:
        """Yield sizes, each with an equal share of the time that is left then."""
        end = self.end
        for number, size in enumerate(sizes):
            now = time.monotonic()
            self.end = now + (end - now) / (len(sizes) - number)
            yield size

    @property
    def left(self) -> float:
        """Seconds that the section has left."""
        return self.end - time.monotonic()

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def skip(self, section: str, size: str, name: str, reason: str) -> None:
        self.rows.append(Row(section, size, name, remark=f"not measured: {reason}"))

    def fail(self, section: str, size: str, name: str, error: BaseException) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.rows.append(Row(section, size, name, remark=f"failed: {reason}"))
        self.failures.append(f"{section} {size} {name}: {reason}".replace("  ", " "))

    def build_model(self, size: str) -> ESM2:
        """Build a model with random weights on the device, the same at every call."""
        with torch.device(self.device):
            return ESM2.initialised(self.shapes[size], 0)

    def measure(
        self, section: str, size: str, builders: dict[str, Callable], work: float, unit: str, flops: float = 0.0
    ) -> None:
        """Warm up and time contestants; each builder returns a function to run."""
        self.values = {}
        runs: dict[str, Callable] = {}
        costs: dict[str, float] = {}  # seconds of the clock
        for name, build in builders.items():
            if self.left <= 0:
                self.skip(section, size, name, "the time of the section was used up")
                continue
            try:
                with limit_time(WARM_UP_SHARE * self.left):
                    run = build() if not self.has_flash_4 else use_attention(build(), "FlashAttention 4" in name)
                    costs[name] = self.warm_up(name, run)
                runs[name] = run
            except OverTimeError:
                self.skip(section, size, name, f"its warm-up took more than {WARM_UP_SHARE:.0%} of the time left")
            except Exception as error:
                if is_out_of_memory(error):
                    self.skip(section, size, name, "out of memory")
                else:
                    self.fail(section, size, name, error)
            run = None
            if self.is_cuda:
                torch.cuda.empty_cache()
        while len(runs) > 1 and sum(costs[name] for name in runs) > self.left:
            slowest = max(runs, key=costs.__getitem__)
            del runs[slowest]
            self.skip(section, size, slowest, f"a run of {costs[slowest]:.1f} s would exceed the time of the section")
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        try:
            for done in range(self.options.rounds):
                if done and sum(costs[name] for name in runs) > self.left:
                    break
                for name, run in runs.items():
                    _, took, costs[name] = self.time_once(run)
                    seconds[name].append(took)
        finally:  # also of rounds that the time limit of the section ends
            for name, times in ((name, times) for name, times in seconds.items() if times):
                share = flops / statistics.median(times) / self.ceiling if flops else None
                self.rows.append(Row(section, size, name, tuple(work / each for each in times), unit, share))

    def time_once(self, run: Callable) -> tuple[Any, float, float]:
        """Run; returns the result, the seconds that count, and the seconds of the clock."""
        self.synchronize()
        began = time.perf_counter()
        found = run()
        self.synchronize()
        clock = time.perf_counter() - began
        return found, found.seconds if isinstance(found, TimedRun) else clock, clock

    def warm_up(self, name: str, run: Callable) -> float:
        """Run until two consecutive runs agree within 5%, at most six times; returns the seconds of the last one.

        A run that takes a quarter of the time left is not repeated.
        """
        self.values[name], before, clock = self.time_once(run)
        for _ in range(5):
            if 4 * clock > self.left:
                break
            _, now, clock = self.time_once(run)
            if abs(now - before) <= 0.05 * now:
                break
            before = now
        return clock


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raise OverTimeError after some seconds; an outer limit continues afterwards."""

    def stop(*_: object) -> None:
        raise OverTimeError

    earlier = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    began = time.monotonic()
    try:
        yield
    finally:
        rest = max(outer - (time.monotonic() - began), 0.01) if outer else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
        signal.setitimer(signal.ITIMER_REAL, rest)


def use_attention(run: Callable, flash_4: bool) -> Callable:
    """Run with or without FlashAttention 4, which is active in the whole process."""
    from torch.nn import attention

    def switched() -> Any:
        if flash_4 and not FLASH_4_IS_ACTIVE[0]:
            attention.activate_flash_attention_impl("FA4")
        elif FLASH_4_IS_ACTIVE[0] and not flash_4:
            attention.restore_flash_attention_impl()
        FLASH_4_IS_ACTIVE[0] = flash_4
        return run()

    return switched


# What the sections work on


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


def write_fasta(path: Path, sequences: Sequence[str]) -> Path:
    path.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(sequences)), encoding="utf-8")
    return path


# Peers. Each builder returns a module from (B, T) token ids to hidden states (B, T, D) or logits (B, T, V).


def build_transformers(lab: Lab, size: str, logits: bool, dtype: torch.dtype, implementation: str) -> nn.Module:
    weights, shape = lab.build_model(size), lab.shapes[size]
    config = transformers.EsmConfig(**build_hf_config(shape), attn_implementation=implementation)
    with torch.device(lab.device):
        model = transformers.EsmForMaskedLM(config)
    model.load_state_dict(to_hf(weights.state_dict(), shape), strict=False)
    model.to(lab.device, dtype)
    part = model if logits else model.esm
    name = "logits" if logits else "last_hidden_state"
    return Call(part, lambda tokens_BT: getattr(part(tokens_BT, attention_mask=(tokens_BT != PAD_IDX).long()), name))


def build_fair_esm(lab: Lab, size: str, logits: bool, dtype: torch.dtype) -> nn.Module:
    shape = lab.shapes[size]
    with torch.device(lab.device):
        model = esm.ESM2(shape.num_layers, shape.embed_dim, shape.attention_heads)
    model.load_state_dict(lab.build_model(size).state_dict())
    model.to(lab.device, dtype)
    last = shape.num_layers
    if logits:
        return Call(model, lambda tokens_BT: model(tokens_BT)["logits"])
    return Call(model, lambda tokens_BT: model(tokens_BT, repr_layers=[last])["representations"][last])


class Call(nn.Module):
    """A module whose forward pass is a function of its parts."""

    def __init__(self, part: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.function = part, function

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.function(tokens_BT)


class TransformerEngineModel(nn.Module):
    """ESM-2 of Transformer Engine's layers on packed sequences, with weights of its own."""

    def __init__(self, shape: ESM2Config, dtype: torch.dtype) -> None:
        super().__init__()
        import transformer_engine.pytorch as engine

        width = shape.embed_dim
        self.embed_tokens = nn.Embedding(33, width, device="cuda", dtype=dtype)
        common = {"num_attention_heads": shape.attention_heads, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        common |= {"layer_type": "encoder", "self_attn_mask_type": "padding", "attn_input_format": "thd"}
        common |= {"activation": "gelu", "fuse_qkv_params": True, "params_dtype": dtype, "device": "cuda"}
        self.layers = nn.ModuleList(
            engine.TransformerLayer(width, 4 * width, layer_number=number + 1, layernorm_epsilon=1e-5, **common)
            for number in range(shape.num_layers)
        )
        self.norm = engine.LayerNorm(width, eps=1e-5, params_dtype=dtype, device="cuda")
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 33))
        self.head.to("cuda", dtype)
        self.rotary = engine.attention.RotaryPositionEmbedding(shape.head_dim)

    def forward(self, tokens_N: Tensor, packed: Packed) -> Tensor:
        """Compute hidden states (N, D)."""
        x_ND, ends = self.embed_tokens(tokens_N), packed.cu_seqlens
        with torch.autocast("cuda", enabled=False):
            angles = self.rotary(max_seq_len=packed.max_tokens).to("cuda")
        lengths = {"max_seqlen_q": packed.max_tokens, "max_seqlen_kv": packed.max_tokens}
        for layer in self.layers:
            x_ND = layer(x_ND, None, rotary_pos_emb=angles, cu_seqlens_q=ends, cu_seqlens_kv=ends, **lengths)
        return self.norm(x_ND)


def has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def find_padded_peers(lab: Lab, section: str, size: str) -> dict[str, Callable]:
    """Return builders of the peers that work on padded batches, and add a row for what is not installed."""
    peers = {"transformers": partial(build_transformers, implementation="sdpa"), "fair-esm": build_fair_esm}
    flash = "transformers, flash_attention_2"
    if lab.is_cuda and has_package("flash_attn"):
        peers[flash] = partial(build_transformers, implementation="flash_attention_2")
    else:
        lab.skip(section, size, flash, "flash-attn is not installed" if lab.is_cuda else "it needs a CUDA GPU")
    return peers


def is_ready(lab: Lab, section: str, size: str, name: str, package: str, installed: bool) -> bool:
    """Return whether a contestant that needs CUDA and a package can run, and add a row if not."""
    if not lab.is_cuda:
        lab.skip(section, size, name, "it needs a CUDA GPU")
    elif not installed:
        lab.skip(section, size, name, f"{package} is not installed or does not work here")
    return lab.is_cuda and installed


# Sections


def section_parity(lab: Lab) -> None:
    """Compare float32 and bfloat16 on the device with float64 on the CPU, for a protein alone and in a batch."""
    shape = lab.shapes["8M"]
    tokens_N, counts = packed_tokens(lab.proteins[:24])
    with torch.inference_mode():
        exact_ND = ESM2.initialised(shape, 0).double().eval().encode(tokens_N, Packed(counts))
    largest, last = exact_ND.abs().max(), shape.num_layers
    for precision in ("float32", "bfloat16"):
        encoder = esm2kit.Encoder(ESM2.initialised(shape, 0).eval(), precision, lab.device)
        together_ND = encoder.encode(tokens_N, counts, [last])[last].double()
        apart_ND = torch.cat([encoder.encode(part, [len(part)], [last])[last] for part in tokens_N.split(counts)])
        found = {"from float64 on the CPU": exact_ND, "alone and in a batch": apart_ND.double()}
        for name, other_ND in found.items():
            error = ((together_ND - other_ND).abs().max() / largest).item()
            lab.rows.append(Row("parity", "8M", f"{precision}, difference {name}", (error,), "of the largest value"))


def section_embed(lab: Lab) -> None:
    """Measure the time from sequences in memory to the mean vectors of proteins in memory."""
    for size in lab.each_size(lab.options.sizes):
        shape, num_residues = lab.shapes[size], lab.options.residues // (1 if size == "8M" else 6)
        some = up_to(lab.proteins, num_residues)
        half = torch.bfloat16 if lab.is_cuda else torch.float32
        packs, blocks = (batches_of(some, EMBED_TOKENS, padded=padded) for padded in (False, True))
        builders = {"esm2kit": partial(build_embedder, lab, size, packs)}
        if is_ready(lab, "embed", size, "esm2kit, compiled", "torch.compile", True):
            builders["esm2kit, compiled"] = partial(build_embedder, lab, size, packs, compiled=True)
        if is_ready(lab, "embed", size, "esm2kit, FlashAttention 4", "flash-attn-4", lab.has_flash_4):
            builders["esm2kit, FlashAttention 4"] = builders["esm2kit"]
        for name, build in find_padded_peers(lab, "embed", size).items():
            module = partial(build, lab, size, False, half)
            builders[name] = partial(build_padded_embedder, lab, module, blocks)
        name = "Transformer Engine"
        if is_ready(lab, "embed", size, name, "transformer-engine", has_package("transformer_engine")):
            builders[name] = partial(build_te_embedder, shape, half, packs)
        flops = shape.forward_flops([len(sequence) + 2 for sequence in some], 0)
        lab.measure("embed", size, builders, sum(map(len, some)), "residues/s", flops)
        ours = lab.values.pop("esm2kit", None)
        for name, theirs in lab.values.items():
            if ours is not None and name != "Transformer Engine":  # which has other weights
                error = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
                note_difference(lab, "embed", size, name, f"means differ from the first row by {error:.1e} at most")


def note_difference(lab: Lab, section: str, size: str, name: str, remark: str) -> None:
    """Add a remark to a measured row."""
    for index, row in enumerate(lab.rows):
        if row[:3] == (section, size, name) and row.values:
            lab.rows[index] = row._replace(remark=remark)


def build_embedder(lab: Lab, size: str, packs: list[list[str]], compiled: bool = False) -> Callable:
    shape = lab.shapes[size]
    encoder = esm2kit.Encoder(lab.build_model(size).eval(), "bfloat16" if lab.is_cuda else "float32", lab.device)
    if compiled and not compile_layers(encoder.model, lab.options.compile_backend):
        raise RuntimeError("torch.compile does not work here")
    outputs = [Output("embeddings", shape.num_layers, "mean", shape.embed_dim)]
    windowing = Windowing(MAX_RESIDUES, 256, EMBED_TOKENS)

    def run() -> list[np.ndarray]:
        # two threads: one copies while the kernels of the other run
        with ThreadPoolExecutor(2) as pool:
            done = pool.map(lambda pack: embed_batch(encoder, pack, outputs, windowing, "float32")[0], packs)
            return [row for rows in done for row in rows]

    return run


def build_padded_embedder(lab: Lab, build: Callable[[], nn.Module], blocks: list[list[str]]) -> Callable:
    return partial(embed_padded, lab, build().eval(), blocks)


def build_te_embedder(shape: ESM2Config, dtype: torch.dtype, packs: list[list[str]]) -> Callable:
    return partial(embed_by_te, TransformerEngineModel(shape, dtype).eval(), packs)


@torch.inference_mode()
def embed_padded(lab: Lab, model: nn.Module, blocks: list[list[str]]) -> list[np.ndarray]:
    means = []
    for block in blocks:
        tokens_BT = tokenize(block).to(lab.device)
        hidden_BTD = model(tokens_BT)
        counts_B = torch.tensor([len(sequence) for sequence in block], device=lab.device)
        inside_BT = torch.arange(tokens_BT.shape[1], device=lab.device) <= counts_B[:, None]
        inside_BT[:, 0] = False
        means.append(((hidden_BTD * inside_BT[..., None]).sum(1).float() / counts_B[:, None]).cpu())
    return [row.numpy() for mean_BD in means for row in mean_BD]


@torch.inference_mode()
def embed_by_te(model: TransformerEngineModel, packs: list[list[str]]) -> list[np.ndarray]:
    means = []
    for pack in packs:
        tokens_N, counts = packed_tokens(pack)
        packed = Packed(counts, "cuda")
        hidden_ND = model(tokens_N.cuda(), packed).float()
        sums_BD = torch.zeros(len(counts), hidden_ND.shape[1], device="cuda").index_add_(
            0, packed.sequence_N, hidden_ND
        )
        means.append((sums_BD / packed.num_tokens_B[:, None]).cpu().numpy())
    return [row for mean_BD in means for row in mean_BD]


def section_program(lab: Lab) -> None:
    """Measure FASTA to HDF5. The rate is without loading weights; `with loading` counts all of `esm2kit.embed`."""
    for size in lab.each_size(lab.options.sizes):
        some = lab.proteins[: lab.options.program_proteins // (1 if size == "8M" else 4)]
        fasta = write_fasta(lab.folder / f"{size}.fasta", some)
        path = lab.folder / f"{size}.safetensors"
        model = lab.build_model(size).cpu()
        tensors = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
        write_checkpoint(path, tensors, {"model": model.config, "step": 0})
        del model, tensors
        totals: dict[str, list[float]] = {}
        cases = {"esm2kit": {"compile": False}}
        if is_ready(lab, "program", size, "esm2kit, compiled", "torch.compile", True):
            cases["esm2kit, compiled"] = {"compile": True}
        if size == "8M":
            residues_too = {"per_residue": True, "dtype": "float16", "compile": False}
            cases["esm2kit, means and residues in float16"] = residues_too
        builders = {
            name: partial(build_program, lab, fasta, path, totals.setdefault(name, []), case)
            for name, case in cases.items()
        }
        half = torch.bfloat16 if lab.is_cuda else torch.float32
        build = partial(build_transformers, lab, size, False, half, "sdpa")
        builders["transformers"] = lambda build=build, fasta=fasta: partial(
            run_peer_program, lab, build().eval(), fasta
        )
        residues = sum(map(len, some))
        lab.measure("program", size, builders, residues, "residues/s")
        for name, seconds in totals.items():
            if seconds:
                remark = "from the first line of the function to its end"
                values = tuple(residues / each for each in seconds[-lab.options.rounds :])
                lab.rows.append(Row("program", size, f"{name}, with loading", values, "residues/s", remark=remark))


def build_program(lab: Lab, fasta: Path, model: Path, totals: list[float], case: dict[str, Any]) -> Callable:
    def run() -> TimedRun:
        worked: list[float] = []
        plain = embed_run.EmbeddingRun.work

        def work(*arguments: Any) -> None:
            began = time.perf_counter()
            plain(*arguments)
            worked.append(time.perf_counter() - began)

        embed_run.EmbeddingRun.work = work
        began = time.perf_counter()
        try:
            esm2kit.embed(
                esm2kit.EmbedConfig(
                    fasta, lab.folder / "embedded", model=str(model), device=lab.device, layout="packed", restart=True,
                    **case,
                )
            )  # fmt: skip
        finally:
            embed_run.EmbeddingRun.work = plain
        totals.append(time.perf_counter() - began)
        return TimedRun(sum(worked))

    return run


def run_peer_program(lab: Lab, model: nn.Module, fasta: Path) -> None:
    """Embed a FASTA by a peer whose weights are loaded, and write the means."""
    sequences = [record.sequence for record in read_fasta(fasta)]
    means = embed_padded(lab, model, batches_of(sequences, EMBED_TOKENS, padded=True))
    with h5py.File(lab.folder / "peer.h5", "w") as file:
        file["means"] = np.stack(means)


def section_write(lab: Lab) -> None:
    """Measure what the stages around the GPU can take, with constant values in place of the model's."""
    from benchmarks import embed_write

    some = lab.proteins[: lab.options.program_proteins]
    for size in lab.options.sizes:
        width, heads = lab.shapes[size].embed_dim, lab.shapes[size].attention_heads
        model = embed_write.write_model(lab.folder / f"write_{size}.safetensors", width, heads)
        for case, settings in embed_write.CASES.items():
            part = some[: max(1, len(some) // 10)] if settings.get("per_residue") else some
            fasta = write_fasta(lab.folder / "write.fasta", part)
            residues, seconds = sum(map(len, part)), []
            for _ in range(min(3, lab.options.rounds)):
                if seconds and seconds[-1] > lab.left:
                    break
                seconds.append(embed_write.measure(fasta, model, lab.folder / "written", settings)[0])
            rates = tuple(residues / each for each in seconds)
            remark = f"{len(part) / statistics.median(seconds):,.0f} proteins/s"
            lab.rows.append(Row("write", size, f"esm2kit, {case}", rates, "residues/s", remark=remark))


def section_train(lab: Lab) -> None:
    """Measure an update: forward and backward passes with 15% masking, clipping and AdamW."""
    for size in lab.each_size(lab.options.train_sizes):
        budget, number = TRAIN_TOKENS.get(size, (0, 1))
        recomputes = False
        if size not in TRAIN_TOKENS:
            budget, recomputes = choose_budget(lab, size)
            if not budget:
                lab.skip("train", size, "esm2kit", "by the estimate it does not fit in the memory of this device")
                continue
        budget = min(budget, lab.options.train_tokens)
        train_size(lab, size, [up_to(lab.proteins[index::number], budget) for index in range(number)], recomputes)
        if lab.is_cuda:
            torch.cuda.empty_cache()


def choose_budget(lab: Lab, size: str) -> tuple[int, bool]:
    """Choose the tokens per micro-batch, and whether layers are recomputed, by the estimate of the memory."""
    memory = torch.cuda.get_device_properties(0).total_memory if lab.is_cuda else 8 * 2**30
    for recomputes in (False, True):
        settings = TrainingSettings(
            tokens=0, precision="bf16-mixed", device=lab.device, activation_checkpointing=recomputes
        )
        budget = min(16_384, largest_budget(lab.shapes[size], settings, MEMORY_SHARE * memory))
        if budget >= 4096:
            return budget, recomputes
    return budget, recomputes


class Update:
    """A model with its optimizer; called, it makes an update of esm2kit's training loop."""

    def __init__(self, lab: Lab, size: str, micros: list[list[str]], recomputes: bool) -> None:
        self.lab, self.model = lab, lab.build_model(size).train()
        self.model.contact_head.requires_grad_(False)
        self.model.activation_checkpointing = recomputes
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        for layer in self.model.layers:
            layer.compile(dynamic=True, backend=lab.options.compile_backend)
        self.compiled = [layer._compiled_call_impl for layer in self.model.layers]
        self.micros = [mask_tokens(lab, micro) for micro in micros]
        self.num_masked = sum(len(rows_M) for *_, rows_M, _ in self.micros)

    def __call__(self, precision: str, compiled: bool) -> None:
        for layer, function in zip(self.model.layers, self.compiled, strict=True):
            layer._compiled_call_impl = function if compiled else None
        device = self.lab.device
        with (
            precision_context(self.model, precision),
            torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"),
        ):
            for inputs_N, counts, rows_M, targets_M in self.micros:
                logits_MV = self.model.masked_logits(inputs_N, Packed(counts, device, bucketed=True), rows_M)
                loss = F.cross_entropy(logits_MV.float(), targets_M, reduction="sum")
                (loss / self.num_masked).backward()
        clip_grad_norm(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def mask_tokens(lab: Lab, sequences: list[str]) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Pack sequences and hide 15% of the tokens: inputs, counts, hidden rows and their tokens."""
    tokens_N, counts = packed_tokens(sequences)
    generator = torch.Generator().manual_seed(0)
    rows_M = (torch.rand(len(tokens_N), generator=generator) < 0.15).nonzero()[:, 0]
    inputs_N = tokens_N.index_fill(0, rows_M, MASK_IDX)
    return inputs_N.to(lab.device), counts, rows_M.to(lab.device), tokens_N[rows_M].to(lab.device)


def train_size(lab: Lab, size: str, micros: list[list[str]], recomputes: bool) -> None:
    shape, some = lab.shapes[size], [sequence for micro in micros for sequence in micro]
    made: list[Update] = []  # one model for all variants, so that large ones fit

    def build_ours(precision: str, compiled: bool) -> Callable:
        if not made:
            made.append(Update(lab, size, micros, recomputes))
        return lambda: made[0](precision, compiled)

    builders = {
        f"esm2kit, {precision}{', compiled' if compiled else ''}": partial(build_ours, precision, compiled)
        for precision in ("bf16-mixed", "bf16-true")
        for compiled in (False, True)
    }
    name = "esm2kit, bf16-mixed, compiled, FlashAttention 4"
    if is_ready(lab, "train", size, name, "flash-attn-4", lab.has_flash_4):
        builders[name] = partial(build_ours, "bf16-mixed", True)
    if size in TRAIN_TOKENS:
        for peer, build in find_padded_peers(lab, "train", size).items():
            module = partial(build, lab, size, True, torch.float32)
            builders[peer] = lambda module=module: build_padded_update(lab, module().train(), micros)
        name = "Transformer Engine"
        if is_ready(lab, "train", size, name, "transformer-engine", has_package("transformer_engine")):
            builders[name] = lambda: build_te_update(lab, TransformerEngineModel(shape, torch.float32), micros)
    else:
        for peer in ("transformers", "fair-esm", "Transformer Engine"):
            lab.skip("train", size, peer, "a second model of this size does not fit in the memory")
    counts = [len(sequence) + 2 for sequence in some]
    flops = 3 * shape.forward_flops(counts, round(0.15 * sum(counts)))
    lab.measure("train", size, builders, sum(counts), "tokens/s", flops)
    recomputed = ", layers recomputed" if recomputes else ""
    for row in [row for row in lab.rows if row.section == "train" and row.size == size and "esm2kit" in row.name]:
        micro = f"{len(micros)} x {sum(counts) // len(micros):,} tokens per update{recomputed}"
        note_difference(lab, *row[:3], micro)
    best = find_best(lab, "train", size)
    if best is not None:
        precision = "bf16-true" if "bf16-true" in best.name else "bf16-mixed"
        lab.profiles[size] = profile_kernels(lab, lambda: made[0](precision, "compiled" in best.name))


def build_padded_update(lab: Lab, model: nn.Module, micros: list[list[str]]) -> Callable:
    budget = max(sum(len(sequence) + 2 for sequence in micro) for micro in micros) // 2
    blocks = [tokenize(block).to(lab.device) for micro in micros for block in batches_of(micro, budget, padded=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    chosen = [(torch.rand(tokens_BT.shape, device=lab.device) < 0.15) & (tokens_BT != PAD_IDX) for tokens_BT in blocks]

    def update() -> None:
        for tokens_BT, chosen_BT in zip(blocks, chosen, strict=True):
            with torch.autocast(lab.device, torch.bfloat16):
                logits_BTV = model(tokens_BT.masked_fill(chosen_BT, MASK_IDX))
                loss = F.cross_entropy(logits_BTV[chosen_BT].float(), tokens_BT[chosen_BT])
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def build_te_update(lab: Lab, model: TransformerEngineModel, micros: list[list[str]]) -> Callable:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    masked = [mask_tokens(lab, micro) for micro in micros]

    def update() -> None:
        for inputs_N, counts, rows_M, targets_M in masked:
            with torch.autocast("cuda", torch.bfloat16):
                logits_MV = model.head(model(inputs_N, Packed(counts, "cuda"))[rows_M])
                loss = F.cross_entropy(logits_MV.float(), targets_M)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def profile_kernels(lab: Lab, step: Callable) -> list[str]:
    """List the ten kernels, or operations of a CPU, with the most time in one update, as Markdown."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if lab.is_cuda else [])]) as profiled:
        step()
        lab.synchronize()
    name = "self_device_time_total" if lab.is_cuda else "self_cpu_time_total"
    events = [
        event for event in profiled.key_averages() if event.device_type.name == ("CUDA" if lab.is_cuda else "CPU")
    ]
    total = sum(getattr(event, name) for event in events) or 1
    events.sort(key=lambda event: -getattr(event, name))
    lines = ["| kernel | calls | ms | share |", "| --- | --- | --- | --- |"]
    for event in events[:10]:
        took, key = getattr(event, name), event.key.replace("|", "/")[:100]
        lines.append(f"| `{key}` | {event.count} | {took / 1000:.2f} | {took / total:.0%} |")
    return lines


def section_pretrain(lab: Lab) -> None:
    """Measure `esm2kit pretrain` of 8M: the rates of its log after the first quarter of the updates."""
    fasta = write_fasta(lab.folder / "train.fasta", lab.proteins)
    data = lab.folder / "data"
    esm2kit.preprocess(
        esm2kit.PreprocessConfig(fasta, out_dir=data, val_size=max(2, len(lab.proteins) // 100), leakage_identity=0.0)
    )
    shape = lab.shapes["8M"]
    custom = {"model": "custom", "num_layers": shape.num_layers, "embed_dim": shape.embed_dim}
    other = not lab.is_cuda  # auto compiles on CUDA
    steps, size = lab.options.pretrain_steps, lab.options.pretrain_sequences
    cases = {
        "esm2kit, defaults": {},
        f"esm2kit, --compile {str(other).lower()}": {"compile": other},
        f"esm2kit, --micro_batch_size {size // 2}": {"micro_batch_size": size // 2},
        "esm2kit, --num_workers 0": {"num_workers": 0},
    }
    longest = 0.0
    for number, (name, case) in enumerate(cases.items()):
        if longest > lab.left:
            lab.skip("pretrain", "8M", name, f"a run takes {longest:.0f} s, and {max(lab.left, 0):.0f} s are left")
            continue
        began = time.monotonic()
        found = esm2kit.pretrain(
            esm2kit.PretrainConfig(
                data, out_dir=lab.folder / f"pretrain{number}", max_steps=steps, global_batch_size=size,
                accelerator=lab.device, attention_heads=shape.attention_heads, val_check_interval=steps,
                log_every_n_steps=max(1, steps // 8), **custom, **case,
            )
        )  # fmt: skip
        longest = max(longest, time.monotonic() - began)
        rates = [float(row["tokens_per_s"]) for row in read_metrics(found["metrics"]) if row["tokens_per_s"]]
        remark = f"{size} sequences per update, one run; rounds are rows of its log"
        lab.rows.append(Row("pretrain", "8M", name, tuple(rates[len(rates) // 4 :]), "tokens/s", remark=remark))


def section_checkpoints(lab: Lab) -> None:
    """Measure how long a save stops the training."""
    from benchmarks import checkpoints

    for size, repeats in zip(lab.options.sizes, (3, 1), strict=False):
        folder = lab.folder / f"checkpoints_{size}"
        folder.mkdir()
        options = SimpleNamespace(tokens=min(4096, lab.options.train_tokens), repeats=repeats)
        found = checkpoints.measure(lab.shapes[size], folder, options, lab.device)
        for key, name in (("held", "copied, then written by a thread"), ("direct", "written directly")):
            remark = f"{found['gib']:.2f} GiB; complete after {found['complete']:.2f} s" if key == "held" else ""
            lab.rows.append(
                Row("checkpoints", size, f"training stands still, {name}", (found[key],), "s", remark=remark)
            )


def section_memory(lab: Lab) -> None:
    """Compare estimates with the largest number of bytes that torch had allocated."""
    for size, use in (("8M", "train"), ("650M", "train"), ("650M", "train, recomputed"), ("650M", "embed")):
        if size not in lab.shapes:
            continue
        tokens = TRAIN_TOKENS[size][0] if "train" in use else EMBED_TOKENS
        some = up_to(lab.proteins, min(tokens, lab.options.train_tokens))
        tokens = sum(len(sequence) + 2 for sequence in some)
        shape, recomputes = lab.shapes[size], use.endswith("recomputed")
        if use == "embed":
            precision = "bfloat16" if lab.is_cuda else "float32"
            settings = InferenceSettings(tokens=tokens, precision=precision, device=lab.device)
            expected = estimate_inference(shape, settings).total
        else:
            settings = TrainingSettings(
                tokens=tokens, precision="bf16-mixed", device=lab.device, activation_checkpointing=recomputes
            )
            expected = estimate_training(shape, settings).total
        before = start_peak(lab)
        if use == "embed":
            run = build_embedder(lab, size, [some])
        else:
            run = partial(Update(lab, size, [some], recomputes), "bf16-mixed", False)
            run()  # creates AdamW's averages
        start_peak(lab)  # without that of building the model
        run()
        measured = read_peak(lab) - before
        del run
        remark = f"{tokens:,} tokens; estimate {format_gib(expected)}, measured {format_gib(measured)}"
        lab.rows.append(
            Row("memory", size, f"{use}: estimate / measured", (expected / max(measured, 1),), "x", remark=remark)
        )


def start_peak(lab: Lab) -> int:
    """Forget the peak of the memory until now, and return its current use."""
    if lab.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return read_memory_use(torch.device("cpu"))


def read_peak(lab: Lab) -> int:
    return torch.cuda.max_memory_allocated() if lab.is_cuda else read_memory_use(torch.device("cpu"), peak=True)


# name: function and its share of --minutes, in seconds of nine minutes
SECTIONS: dict[str, tuple[Callable[[Lab], None], int]] = {
    "parity": (section_parity, 10),
    "embed": (section_embed, 95),
    "program": (section_program, 120),
    "write": (section_write, 15),
    "train": (section_train, 200),
    "pretrain": (section_pretrain, 60),
    "checkpoints": (section_checkpoints, 15),
    "memory": (section_memory, 25),
}


# The report


def find_best(lab: Lab, section: str, size: str) -> Row | None:
    rows = [row for row in lab.rows if row[:2] == (section, size) and row.name.startswith("esm2kit") and row.values]
    rows = [row for row in rows if not row.name.endswith("with loading") and "residues" not in row.name]
    return max(rows, key=lambda row: row.median, default=None)


def find_peer(lab: Lab, row: Row) -> float | None:
    """Return the median of transformers in the same comparison."""
    peers = [peer for peer in lab.rows if peer[:2] == row[:2] and peer.name == "transformers" and peer.unit == row.unit]
    return next((peer.median for peer in peers), None)


def format_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def list_rows(lab: Lab) -> list[str]:
    lines = [
        "| section | model | contestant | median | slowest to fastest | rounds | of ceiling | of transformers | |",
        "| --- " * 9 + "|",
    ]
    places = {place: number for number, place in enumerate(dict.fromkeys(row[:2] for row in lab.rows))}
    for row in sorted(lab.rows, key=lambda row: (places[row[:2]], not row.values)):
        cells = [row.section, row.size, row.name, "", "", "", "", "", row.remark]
        if row.values:
            peer, ends = find_peer(lab, row), sorted(row.values, reverse=row.unit == "s")
            cells[3] = f"**{format_number(row.median)}** {row.unit}"
            cells[4] = f"{format_number(ends[0])} to {format_number(ends[-1])}" if len(ends) > 1 else ""
            cells[5] = str(len(ends))
            cells[6] = "" if row.share is None else f"{row.share:.0%}"
            cells[7] = f"{row.median / peer:.2f}x" if peer else ""
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return lines


def judge(lab: Lab, goal: Goal) -> tuple[str, str]:
    """Return what was measured for a goal, and the verdict."""
    best = find_best(lab, goal.section, goal.size)
    peer = find_peer(lab, best) if best else None
    if best is None or (goal.relative and peer is None):
        remarks = [row.remark for row in lab.rows if row[:2] == (goal.section, goal.size) and not row.values]
        return "", f"not measured ({next(iter(remarks), 'the section did not measure it')})"
    value = best.median / peer if goal.relative else best.median
    peak = next((peak for name, peak in HALF_PEAK.items() if lab.is_cuda and name in describe_device(lab)), None)
    share = f", {best.share * lab.ceiling / peak:.0%} MFU" if peak and best.share else ""
    found = f"{format_number(value)} {goal.unit} ({best.name}{share})"
    return found, "reached" if value >= goal.least else f"missed: {value / goal.least:.0%} of the goal"


def describe_device(lab: Lab) -> str:
    return torch.cuda.get_device_name() if lab.is_cuda else f"CPU ({cpu_name()})"


def write_report(lab: Lab, seconds: dict[str, float]) -> str:
    flash = "with" if lab.has_flash_4 else "without"
    date, minutes = time.strftime("%Y-%m-%d"), sum(seconds.values()) / 60
    lines = [
        f"{describe_device(lab)}, torch {torch.__version__}, transformers {transformers.__version__}, {flash} "
        f"FlashAttention 4, {date}, {minutes:.1f} minutes. A product of two matrices reached "
        f'{lab.ceiling / 1e12:,.3g} TFLOP/s; "of ceiling" is relative to that.',
        "",
        f"`python benchmarks/gpu.py {shlex.join(lab.options.arguments)}`",
        "",
        *list_rows(lab),
        "",
        "| goal, on one H100 | at least | found | |",
        "| --- | --- | --- | --- |",
    ]
    missed = set()
    for goal in GOALS:
        found, verdict = judge(lab, goal)
        lines.append(f"| {goal.name} | {format_number(goal.least)} {goal.unit} | {found} | {verdict} |")
        if verdict.startswith("missed") and goal.section in ("train", "pretrain"):
            missed.add(goal.size)
    for size in [size for size in lab.profiles if size in missed]:
        lines += ["", f"Kernels with the most time in an update of {size}:", "", *lab.profiles[size]]
    left_out = [name for name in SECTIONS if name not in lab.options.sections]
    if left_out:
        lines += ["", f"Not run: {', '.join(left_out)}."]
    if lab.failures:
        lines += ["", "Failed:", "", *(f"- {failure}" for failure in lab.failures)]
    times = ", ".join(f"{name} {took:.0f}" for name, took in seconds.items())
    return "\n".join([*lines, "", f"Seconds per section: {times}.", ""])


def update_docs(path: Path, report: str) -> None:
    """Replace what stands between the two markers of a page."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{path} must have the lines '{BEGIN}' and '{END}' once each")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n\n{report.strip()}\n\n{END}{after}", encoding="utf-8")


def run_section(lab: Lab, name: str, seconds: float) -> None:
    function, _ = SECTIONS[name]
    lab.end = time.monotonic() + seconds
    try:
        with limit_time(seconds):
            function(lab)
    except OverTimeError:
        lab.skip(name, "", "the rest of the section", f"its {seconds:.0f} s were used up")
    except Exception as error:  # continue with the other sections
        if is_out_of_memory(error):
            lab.skip(name, "", "the rest of the section", "out of memory")
        else:
            lab.fail(name, "", "the section", error)
    if lab.is_cuda:
        torch.cuda.empty_cache()


def parse_shape(text: str) -> tuple[str, ESM2Config]:
    name, numbers = text.split("=")
    return name, ESM2Config(*map(int, numbers.split("x")))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, required=True, help="Proteins to sample from, the first 100,000.")
    parser.add_argument("--sizes", nargs="+", default=["8M", "650M"], choices=list(SHORT_NAMES))
    parser.add_argument("--train_sizes", nargs="+", default=["8M", "650M", "3B"], choices=list(SHORT_NAMES))
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="Time of all sections together.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--residues",
        type=int,
        default=1_000_000,
        help="Residues to embed per run with 8M; a sixth of it with others.",
    )
    parser.add_argument("--program_proteins", type=int, default=6_000, help="With 8M; a fourth of it with others.")
    parser.add_argument("--train_tokens", type=int, default=65_536, help="Most tokens per micro-batch.")
    parser.add_argument("--pretrain_steps", type=int, default=40)
    parser.add_argument("--pretrain_sequences", type=int, default=512, help="Sequences per update.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu tests the script itself.")
    parser.add_argument("--compile_backend", default="inductor", help="Backend of torch.compile.")
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=[], metavar="SIZE=LAYERSxWIDTHxHEADS",
        help="Other shapes in place of sizes, to test the script.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="Output file for the report in Markdown; written after each section.")
    parser.add_argument("--update_docs", type=Path, help="Page whose section between the markers is replaced.")
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    sys.path.insert(0, str(ROOT))  # sections import other benchmarks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    compilation.BACKEND = options.compile_backend
    proteins = [record.sequence[:MAX_RESIDUES] for record in islice(read_fasta(options.fasta), MOST_PROTEINS)]
    np.random.default_rng(0).shuffle(proteins)
    shapes = {size: SIZES[SHORT_NAMES[size]] for size in SHORT_NAMES} | dict(options.shapes)
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(options, proteins, Path(folder), shapes)
        lab.ceiling = matmul_rate(options.device, torch.bfloat16 if lab.is_cuda else torch.float32)
        lab.has_flash_4 = lab.is_cuda and activate_flash_attention_4()
        seconds: dict[str, float] = {}
        total = sum(share for _, share in SECTIONS.values())
        for name in options.sections:
            began = time.monotonic()
            run_section(lab, name, SECTIONS[name][1] / total * 60 * options.minutes)
            seconds[name] = time.monotonic() - began
            report = write_report(lab, seconds)
            if options.out:
                options.out.write_text(report, encoding="utf-8")
    print(report)
    if options.update_docs and not lab.failures:
        update_docs(options.update_docs, report)
    elif options.update_docs:
        print(f"{options.update_docs} is unchanged, because something failed", file=sys.stderr)
    return 1 if lab.failures else 0


if __name__ == "__main__":
    sys.exit(main())
