r"""Compare the embedding speed of esm2kit, fair-esm, transformers and esm-cpp on the same proteins and weights.

    python -m venv peers && peers/bin/pip install esm-cpp==0.2.1
    python benchmarks/embed.py --fasta proteins.fasta --sizes 8M 35M 150M 650M --num_proteins 300 1000 \
        --peer_python peers/bin/python

Each contestant is a long-running process with the same random weights. It runs once per round, and the first
contestant changes from round to round. `model` is the time from token ids to per-protein means in memory. `program`
is the time from FASTA to files: HDF5 for esm2kit, one .pt per protein for fair-esm's scripts/extract.py. fair-esm
uses the batches of extract.py (sorted, 4,096 tokens, padded), transformers' EsmModel with SDPA uses the same batches,
and esm-cpp uses its own scheduler. The time of esm-cpp includes the LM head because it returns only logits. The
ceiling is the rate of float32 matrix products with 1,024 rows, in one single-threaded worker per thread. int8 and
bfloat16 are approximate; the summary contains their largest difference from esm2kit's float32. Prints one line per
run, a JSON summary of medians per model size and number of proteins, and a final table.

The 650M model requires about 3 GB per contestant. Choose fewer contestants, proteins or rounds if this is too much.
"""

import argparse
import importlib.metadata
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
from typing import Any

import numpy as np

PEER_TOKENS = 4096  # extract.py's --toks_per_batch
MAX_RESIDUES = 1022
NAMES = {
    "8M": "esm2_t6_8M_UR50D",
    "35M": "esm2_t12_35M_UR50D",
    "150M": "esm2_t30_150M_UR50D",
    "650M": "esm2_t33_650M_UR50D",
    "3B": "esm2_t36_3B_UR50D",
}
CONTESTANTS = ("ceiling", "ours", "ours_int8", "ours_bfloat16", "ours_program", "fair_esm", "fair_esm_program",
               "transformers", "esm_cpp")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8M"], choices=list(NAMES), help="Sizes of the official models.")
    parser.add_argument("--fasta", type=Path, help="Proteins to sample from; required.")
    parser.add_argument(
        "--num_proteins", type=int, nargs="+", default=[300], help="Numbers of proteins, one table row each."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the sample and the weights.")
    parser.add_argument("--repeats", type=int, default=5, help="Measured rounds, after one warm-up round.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--peer_python", help="Python of an environment with esm-cpp. Default: omit esm-cpp.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(options)
        return
    if options.fasta is None:
        parser.error("--fasta: name a FASTA file to draw proteins from")
    results = []
    for size in options.sizes:
        for num_proteins in options.num_proteins:
            with TemporaryDirectory() as folder:
                options.folder, options.model = Path(folder), NAMES[size]
                results.append(compete(options, num_proteins))
                print(json.dumps(results[-1], indent=2), flush=True)
    print_table(results)


def compete(options: argparse.Namespace, num_proteins: int) -> dict[str, Any]:
    """Create the input, run the contestants and return the measurements."""
    from esm2kit.core.hardware import cpu_name
    from esm2kit.models.config import SIZES
    from esm2kit.models.formats.fair_esm import save_fair_esm
    from esm2kit.models.formats.huggingface import save_hf
    from esm2kit.models.load import load_model
    from esm2kit.sequences.fasta import read_fasta

    records = list(read_fasta(options.fasta))
    chosen = np.sort(np.random.default_rng(options.seed).choice(len(records), num_proteins, replace=False))
    sequences = [records[index].sequence[:MAX_RESIDUES] for index in chosen]
    fasta = "".join(f">p{index}\n{sequence}\n" for index, sequence in enumerate(sequences))
    (options.folder / "proteins.fasta").write_text(fasta, encoding="utf-8")
    model, _ = load_model(options.model, untrained_seed=options.seed)
    save_hf(model, options.folder / "hf")
    save_fair_esm(model, options.folder / f"{options.model}.pt")
    flop = SIZES[options.model].forward_flops([len(sequence) + 2 for sequence in sequences], 0)
    residues = sum(map(len, sequences))
    del model

    names = [name for name in options.contestants if name != "esm_cpp" or options.peer_python]
    seconds = take_turns({name: start(name, options) for name in names}, options.repeats)
    means = {name: np.load(path) for name in names if (path := options.folder / f"{name}.npy").is_file()}
    result = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": cpu_name(),
        "threads": options.threads,
        "versions": versions(options),
        "command": " ".join(["python", *sys.argv]),
        "model": options.model,
        "proteins": len(sequences),
        "residues": residues,
        "rounds": options.repeats,
        "contestants": {},
    }
    if "ceiling" in seconds:
        result["ceiling_gflops"] = round(statistics.median(seconds.pop("ceiling")), 1)
    for name, times in seconds.items():
        median = statistics.median(times)
        row = {"seconds": round(median, 3), "fastest": round(min(times), 3), "slowest": round(max(times), 3)}
        row |= {"residues_per_s": round(residues / median), "gflops": round(flop / median / 1e9, 1)}
        if name in means and "ours" in means:
            row["max_difference_from_ours"] = float(np.abs(means[name] - means["ours"]).max())
        if "ceiling_gflops" in result:
            row["share_of_ceiling"] = round(row["gflops"] / result["ceiling_gflops"], 3)
        result["contestants"][name] = row
    return result


def take_turns(children: dict[str, subprocess.Popen], rounds: int) -> dict[str, list[float]]:
    """Run each contestant once per round and collect its answers; the first round is a warm-up."""
    answers: dict[str, list[float]] = {name: [] for name in children}
    order = list(children)
    for turn in range(rounds + 1):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            child = children[name]
            child.stdin.write("go\n")
            child.stdin.flush()
            answer = child.stdout.readline()
            if not answer:
                sys.exit(f"{name} exited with code {child.wait()}")
            if turn:
                answers[name].append(json.loads(answer)["seconds"])
                unit = "GFLOP/s" if name == "ceiling" else "s"
                print(f"round {turn} {name}: {answers[name][-1]:.2f} {unit}", flush=True)
    for child in children.values():
        child.stdin.close()
        child.wait()
    return answers


def versions(options: argparse.Namespace) -> dict[str, str]:
    """Return the versions of Python and of all contestants."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "fair-esm", "h5py")}
    if options.peer_python and "esm_cpp" in options.contestants:
        ask = "import importlib.metadata; print(importlib.metadata.version('esm-cpp'))"
        found["esm-cpp"] = subprocess.check_output(
            [options.peer_python, "-c", ask], text=True, encoding="utf-8"
        ).strip()
    return {"python": platform.python_version()} | found


def print_table(results: list[dict[str, Any]]) -> None:
    """Print residues per second and esm2kit's speed relative to each contestant and the ceiling, in Markdown."""
    names = list(dict.fromkeys(name for result in results for name in result["contestants"]))
    first = results[0]
    packages = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    print(f"\n{first['machine']}, {first['threads']} threads, {packages}, {first['date'][:10]}")
    print(f"`{first['command']}`\n")
    print(f"residues/s, medians of {first['rounds']}; in brackets: speed of esm2kit relative to it\n")
    print(f"| model | proteins | {' | '.join(names)} | esm2kit / ceiling | program compared with model |")
    print(f"| {' | '.join(['---'] * (len(names) + 4))} |")
    for result in results:
        rows = result["contestants"]
        cells = []
        for name in names:
            if name not in rows:
                cells.append("")
                continue
            ours = rows.get("ours_program" if name.endswith("_program") else "ours")
            ratio = f" ({ours['residues_per_s'] / rows[name]['residues_per_s']:.2f})" if ours else ""
            cells.append(f"{rows[name]['residues_per_s']:,}{'' if name in ('ours', 'ours_program') else ratio}")
        share = f"{rows['ours']['share_of_ceiling']:.0%}" if "share_of_ceiling" in rows.get("ours", {}) else ""
        both = {"ours", "ours_program"} <= rows.keys()
        overhead = f"{rows['ours_program']['seconds'] / rows['ours']['seconds'] - 1:+.1%} time" if both else ""
        size = result["model"].split("_")[2]
        print(f"| {size} | {result['proteins']:,} | {' | '.join(cells)} | {share} | {overhead} |")


def start(name: str, options: argparse.Namespace) -> subprocess.Popen:
    python = options.peer_python if name == "esm_cpp" else sys.executable
    command = [python, __file__, "--child", name, "--folder", str(options.folder), "--model", options.model]
    command += ["--threads", str(options.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, encoding="utf-8"
    )


def serve(options: argparse.Namespace) -> None:
    """Run as one contestant: one run per input line; prints seconds (ceiling: GFLOP/s)."""
    text = (options.folder / "proteins.fasta").read_text(encoding="utf-8")
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

    from esm2kit.models.config import SIZES

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

    from esm2kit.embedding.batch import Output, embed_batch
    from esm2kit.embedding.plan import plan_window
    from esm2kit.models.encoder import Encoder
    from esm2kit.models.load import load_model
    from esm2kit.sequences.windows import Windowing

    model, _ = load_model(options.folder / "hf")
    precision = options.child.partition("ours_")[2] or "float32"
    encoder = Encoder(model, precision)
    outputs = [Output("embeddings", model.config.num_layers, "mean", model.config.embed_dim)]
    segments = Windowing(MAX_RESIDUES, 0, 1024)
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
    from esm2kit.embedding.config import EmbedConfig
    from esm2kit.embedding.embed import embed

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
    """Load the model and alphabet with fair-esm."""
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

    from esm2kit.models.esm2 import tokenize

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


if __name__ == "__main__":
    main()
