"""Embedding speed: ours, fair-esm, transformers and esm-cpp on the same real proteins at equal weights, beside the
sgemm ceiling.

    python -m venv peers && peers/bin/pip install esm-cpp==0.2.1
    python benchmarks/embed.py --model esm2_t6_8M_UR50D --num_proteins 300 --esm_cpp peers/bin/python

Each contestant is a process that stays up, holds the same random weights and gets its turn in every round; turns
alternate. `model` is the time from token ids to per-protein means in memory, `program` from the FASTA to the files
(ours: HDF5 by `embed`; fair-esm: one .pt a protein, as its scripts/extract.py). fair-esm gets extract.py's batches
(sorted, 4,096 tokens, padded), transformers EsmModel with SDPA the same batches, esm-cpp its own scheduler; esm-cpp
gives logits only, so its LM head is included. The ceiling is a float32 product of 1,024 rows in each of as many
one-thread workers. int8 and bfloat16 are approximate: their largest difference from our float32 is printed. Prints a
line a turn and a JSON summary of medians.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

PEER_TOKENS = 4096  # extract.py's --toks_per_batch
MAX_RESIDUES = 1022
CONTESTANTS = ("ceiling", "ours", "ours_int8", "ours_bfloat16", "ours_program", "fair_esm", "fair_esm_program",
               "transformers", "esm_cpp")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="esm2_t6_8M_UR50D", help="one of the official sizes")
    parser.add_argument(
        "--fasta", type=Path, default=Path("../shared/data/uniprot_mini/uniref50_train_filt.fasta"), help="to draw from"
    )
    parser.add_argument("--num_proteins", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--esm_cpp", help="python of an environment with esm-cpp; without it, esm-cpp is left out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(options)
        return
    with TemporaryDirectory() as folder:
        options.folder = Path(folder)
        compete(options)


def compete(options: argparse.Namespace) -> None:
    """Make the input, start the contestants, give them their turns, print what came out."""
    import torch

    from esm2kit.convert import save_fair_esm, save_hf
    from esm2kit.fasta import read_fasta
    from esm2kit.model import SIZES
    from esm2kit.weights import load_model

    records = list(read_fasta(options.fasta))
    chosen = np.sort(np.random.default_rng(options.seed).choice(len(records), options.num_proteins, replace=False))
    sequences = [records[index].sequence[:MAX_RESIDUES] for index in chosen]
    fasta = "".join(f">p{index}\n{sequence}\n" for index, sequence in enumerate(sequences))
    (options.folder / "proteins.fasta").write_text(fasta)
    model, _ = load_model(options.model, untrained_seed=options.seed)
    save_hf(model, options.folder / "hf")
    save_fair_esm(model, options.folder / f"{options.model}.pt")
    config, tokens = SIZES[options.model], np.array([len(sequence) + 2 for sequence in sequences], dtype=np.float64)
    flop = config.num_layers * (24 * tokens.sum() * config.embed_dim**2 + 4 * (tokens**2).sum() * config.embed_dim)
    residues = int(tokens.sum()) - 2 * len(sequences)

    names = [name for name in options.contestants if name != "esm_cpp" or options.esm_cpp]
    children = {name: start(name, options) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    means: dict[str, np.ndarray] = {}
    for turn in range(options.repeats + 1):  # the first warms up and is not counted
        for name, child in children.items():
            child.stdin.write("go\n")
            child.stdin.flush()
            answer = child.stdout.readline()
            if not answer:
                sys.exit(f"{name} ended: {child.wait()}")
            if turn:
                seconds[name].append(json.loads(answer)["seconds"])
                print(f"turn {turn} {name}: {seconds[name][-1]:.2f}", flush=True)
    for name, child in children.items():
        child.stdin.close()
        child.wait()
        if (options.folder / f"{name}.npy").is_file():
            means[name] = np.load(options.folder / f"{name}.npy")
    result = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": cpu_name(), "threads": options.threads, "torch": torch.__version__, "python":
        platform.python_version(), "model": options.model, "proteins": len(sequences), "residues": residues, "repeats":
        options.repeats, "contestants": {},
    }  # fmt: skip
    for name, times in seconds.items():
        median = statistics.median(times)
        if name == "ceiling":
            result["ceiling_gflops"] = round(median, 1)
            continue
        row = {"seconds": round(median, 3), "residues_per_s": round(residues / median)}
        row["gflops"] = round(flop / median / 1e9, 1)
        if name in means and "ours" in means:
            row["max_difference_from_ours"] = float(np.abs(means[name] - means["ours"]).max())
        result["contestants"][name] = row
    for row in result["contestants"].values():
        if "ceiling_gflops" in result:
            row["share_of_ceiling"] = round(row["gflops"] / result["ceiling_gflops"], 3)
    print(json.dumps(result, indent=2))


def start(name: str, options: argparse.Namespace) -> subprocess.Popen:
    python = options.esm_cpp if name == "esm_cpp" else sys.executable
    command = [python, __file__, "--child", name, "--folder", str(options.folder), "--model", options.model]
    command += ["--threads", str(options.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def serve(options: argparse.Namespace) -> None:
    """Be one contestant: a run for every line that comes in; seconds (ceiling: GFLOP/s) go out."""
    text = (options.folder / "proteins.fasta").read_text()
    sequences = [block.split("\n")[1] for block in text.split(">")[1:]]
    run = globals()[f"make_{options.child.split('_bf')[0].split('_int')[0]}"](options, sequences)
    for _ in sys.stdin:
        began = time.perf_counter()
        value = run()
        took = time.perf_counter() - began
        if isinstance(value, np.ndarray):
            np.save(options.folder / f"{options.child}.npy", value)
        print(json.dumps({"seconds": value if isinstance(value, float) else took}), flush=True)


def make_ceiling(options: argparse.Namespace, sequences: list[str]) -> Callable[[], float]:
    import torch

    from esm2kit.model import SIZES

    width = SIZES[options.model].embed_dim
    pool = ThreadPoolExecutor(options.threads, initializer=torch.set_num_threads, initargs=(1,))

    def products(times: int) -> None:
        with torch.inference_mode():
            rows, weight, out = torch.randn(1024, width), torch.randn(width, 4 * width), torch.empty(1024, 4 * width)
            for _ in range(times):
                torch.mm(rows, weight, out=out)

    def run() -> float:
        times = max(10, int(1e11 / (8 * 1024 * width**2)))
        began = time.perf_counter()
        list(pool.map(products, [times] * options.threads))
        return options.threads * times * 8 * 1024 * width**2 / (time.perf_counter() - began) / 1e9

    return run


def make_ours(options: argparse.Namespace, sequences: list[str]) -> Callable[[], np.ndarray]:
    import torch

    from esm2kit.embed_batch import Output, Segments, embed_batch
    from esm2kit.embed_plan import plan_window
    from esm2kit.inference import Encoder
    from esm2kit.weights import load_model

    model, _ = load_model(options.folder / "hf")
    precision = options.child.partition("ours_")[2] or "float32"
    encoder = Encoder(model, precision)
    outputs = [Output("embeddings", model.config.num_layers, "mean", model.config.embed_dim)]
    segments = Segments(MAX_RESIDUES, 0, 1024)
    batches = plan_window(np.array([len(sequence) + 2 for sequence in sequences]), 0, 0, 1024)
    pool = ThreadPoolExecutor(options.threads, initializer=torch.set_num_threads, initargs=(1,))

    def run() -> np.ndarray:
        means_PD = np.empty((len(sequences), model.config.embed_dim), dtype=np.float32)

        def one(rows: np.ndarray) -> None:
            means_PD[rows] = embed_batch(encoder, [sequences[row] for row in rows], outputs, segments, "float32")[0]

        list(pool.map(one, [batch.rows for batch in batches]))
        return means_PD

    return run


def make_ours_program(options: argparse.Namespace, sequences: list[str]) -> Callable[[], None]:
    from esm2kit.embed import EmbedConfig, embed

    out_dir = options.folder / "ours_program"
    config = EmbedConfig(
        options.folder / "proteins.fasta",
        out_dir,
        model=str(options.folder / "hf"),
        workers=options.threads,
        device="cpu",
    )

    def run() -> None:
        shutil.rmtree(out_dir, ignore_errors=True)
        embed(config)

    return run


def fair_esm_model(options: argparse.Namespace):
    """fair-esm's model and alphabet, by its own loading."""
    from argparse import Namespace

    import esm
    import torch

    torch.set_num_threads(options.threads)
    with torch.serialization.safe_globals([Namespace]):
        model, alphabet = esm.pretrained.load_model_and_alphabet_local(options.folder / f"{options.model}.pt")
    return model.eval(), alphabet


def make_fair_esm(options: argparse.Namespace, sequences: list[str]) -> Callable[[], np.ndarray]:
    import torch
    from esm import FastaBatchedDataset

    model, alphabet = fair_esm_model(options)
    dataset = FastaBatchedDataset(list(map(str, range(len(sequences)))), sequences)
    convert = alphabet.get_batch_converter()
    indices = dataset.get_batch_indices(PEER_TOKENS, extra_toks_per_seq=1)
    batches = [(rows, convert([dataset[row] for row in rows])[2]) for rows in indices]

    @torch.no_grad()
    def run() -> np.ndarray:
        means_PD = np.empty((len(sequences), model.embed_dim), dtype=np.float32)
        for rows, tokens_BT in batches:
            hidden_BTD = model(tokens_BT, repr_layers=[model.num_layers])["representations"][model.num_layers]
            for row, hidden_TD in zip(rows, hidden_BTD, strict=True):
                means_PD[row] = hidden_TD[1 : len(sequences[row]) + 1].mean(0)
        return means_PD

    return run


def make_fair_esm_program(options: argparse.Namespace, sequences: list[str]) -> Callable[[], None]:
    import torch
    from esm import FastaBatchedDataset

    out_dir = options.folder / "fair_esm_program"

    @torch.no_grad()
    def run() -> None:
        model, alphabet = fair_esm_model(options)
        out_dir.mkdir(exist_ok=True)
        dataset = FastaBatchedDataset.from_file(options.folder / "proteins.fasta")
        convert = alphabet.get_batch_converter(MAX_RESIDUES)
        for rows in dataset.get_batch_indices(PEER_TOKENS, extra_toks_per_seq=1):
            labels, texts, tokens_BT = convert([dataset[row] for row in rows])
            hidden_BTD = model(tokens_BT, repr_layers=[model.num_layers])["representations"][model.num_layers]
            for label, sequence, hidden_TD in zip(labels, texts, hidden_BTD, strict=True):
                mean = hidden_TD[1 : len(sequence) + 1].mean(0).clone()
                torch.save({"label": label, "mean_representations": {model.num_layers: mean}}, out_dir / f"{label}.pt")

    return run


def make_transformers(options: argparse.Namespace, sequences: list[str]) -> Callable[[], np.ndarray]:
    import torch
    from esm import FastaBatchedDataset
    from transformers import EsmModel

    from esm2kit.model import tokenize

    torch.set_num_threads(options.threads)
    model = EsmModel.from_pretrained(options.folder / "hf", attn_implementation="sdpa", add_pooling_layer=False).eval()
    dataset = FastaBatchedDataset(list(map(str, range(len(sequences)))), sequences)
    indices = dataset.get_batch_indices(PEER_TOKENS, extra_toks_per_seq=2)
    batches = [(rows, tokenize([sequences[row] for row in rows])) for rows in indices]

    @torch.inference_mode()
    def run() -> np.ndarray:
        means_PD = np.empty((len(sequences), model.config.hidden_size), dtype=np.float32)
        for rows, tokens_BT in batches:
            hidden_BTD = model(tokens_BT, attention_mask=tokens_BT.ne(1).long()).last_hidden_state
            for row, hidden_TD in zip(rows, hidden_BTD, strict=True):
                means_PD[row] = hidden_TD[1 : len(sequences[row]) + 1].mean(0)
        return means_PD

    return run


def make_esm_cpp(options: argparse.Namespace, sequences: list[str]) -> Callable[[], None]:
    import esm_cpp

    model = esm_cpp.Model.load_from_safetensors(str(options.folder / "hf" / "model.safetensors"))
    tokenizer = esm_cpp.Tokenizer()
    ids = [tokenizer.encode(sequence) for sequence in sequences]

    def run() -> None:
        model.forward_scheduled(ids)

    return run


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
