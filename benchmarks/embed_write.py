r"""Measure how fast an embedding run can read, check and write, with no model between.

    python -m benchmarks.embed_write --work_dir scratch [--num_proteins 30000] [--widths 320 1280] [--rounds 5]

The stages of a GPU run work as usual, except that kernels are replaced by a constant block of values: the FASTA is
read, tokenised and packed, values are copied to the buffers, looked at, checksummed, written, synced and recorded in
the journal. So the rate is the fastest at which a GPU's results can be taken. The proteins are synthetic, with UniRef's
lengths up to 1,022 residues. Cases: means in both layouts in float32, and all residue vectors in float16. For each case
`stage` is the whole run without its preparation (table, files and seal), and `write` the time in calls that write, both
medians of the rounds, which are interleaved. Prints a Markdown table.
"""

import argparse
import shutil
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.embed_stream import make_proteins, write_fasta
from esm2kit.core.hardware import cpu_name
from esm2kit.core.processes import count_cores
from esm2kit.embedding import embed as embed_module
from esm2kit.embedding import run as embed_run
from esm2kit.embedding import stream as embed_stream
from esm2kit.embedding.batch import Output, PackedBatch
from esm2kit.embedding.config import EmbedConfig
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2

CASES = {
    "means, datasets, float32": {},
    "means, packed, float32": {"layout": "packed"},
    "residues, packed, float16": {"layout": "packed", "per_protein": False, "per_residue": True, "dtype": "float16"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="Parent of the folder embed_write.")
    parser.add_argument("--num_proteins", type=int, default=30_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[320, 1280], help="Widths of 8M and 650M.")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = options.work_dir / "embed_write"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    proteins = make_proteins(options.num_proteins, 1.0)
    residues = sum(len(sequence) for _, sequence in proteins)
    fasta = write_fasta(folder / "proteins.fasta", proteins)
    # residue vectors of a tenth of the proteins, to limit the size of the files
    tenth = proteins[: len(proteins) // 10]
    fewer = write_fasta(folder / "tenth.fasta", tenth)
    residues_of = {fasta: residues, fewer: sum(len(sequence) for _, sequence in tenth)}
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for width in options.widths:
            model = write_model(folder / f"width{width}.safetensors", width)
            for case, settings in CASES.items():
                source = fewer if settings.get("per_residue") else fasta
                found = measure(source, model, folder / "out", settings)
                seconds.setdefault((case, width), []).append(found)
    machine = f"{cpu_name()}, {count_cores()} cores, {datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}"
    print(f"{machine}; {len(proteins):,} proteins, {residues:,} residues; {options.rounds} rounds\n")
    print("| case | width | stage: residues/s | proteins/s | write: residues/s | MB/s |")
    print("| --- " * 6 + "|")
    for (case, width), runs in seconds.items():
        source = fewer if "residues" in case else fasta
        number, vectors = residues_of[source], residues_of[source] if "residues" in case else len(proteins)
        count = len(tenth) if "residues" in case else len(proteins)
        size = vectors * width * (2 if "float16" in case else 4)
        stage, write = (statistics.median(run[part] for run in runs) for part in (0, 1))
        print(
            f"| {case} | {width} | {number / stage:,.0f} | {count / stage:,.0f} | {number / write:,.0f} | "
            f"{size / write / 1e6:,.0f} |"
        )


def write_model(path: Path, width: int, heads: int = 20) -> Path:
    config = ESM2Config(1, width, heads)
    state = ESM2.initialised(config, 0).state_dict()
    write_checkpoint(path, {f"model.{name}": tensor for name, tensor in state.items()}, {"model": config})
    return path


def measure(fasta: Path, model: Path, out_dir: Path, settings: dict[str, Any]) -> tuple[float, float]:
    """Run `embed` with constant values in place of the model; seconds of the stages, and of the calls that write."""
    shutil.rmtree(out_dir, ignore_errors=True)
    blocks: dict[tuple[int, str], torch.Tensor] = {}
    times = {"stage": 0.0, "write": 0.0}

    def give_values(encoder: Any, packed: PackedBatch, outputs: list[Output], dtype: str) -> list[list[torch.Tensor]]:
        found = []
        for output in outputs:
            rows = sum(map(output.num_vectors, packed.num_residues))
            if rows > len(blocks.get((output.width, dtype), ())):
                blocks[output.width, dtype] = torch.rand(2 * rows, output.width).to(getattr(torch, dtype))
            found.append([blocks[output.width, dtype][:rows]])
        return found

    def count_time(name: str, function: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                times[name] += time.perf_counter() - began

        return timed

    patches = [
        (embed_stream, "embed_on_device", give_values),
        (embed_run, "choose_copies", lambda device: embed_stream.DirectCopies()),
        (embed_run.EmbeddingRun, "work", count_time("stage", embed_run.EmbeddingRun.work)),
        (embed_run.EmbeddingRun, "_write_batch", count_time("write", embed_run.EmbeddingRun._write_batch)),
    ]
    originals = [(place, name, getattr(place, name)) for place, name, _ in patches]
    for place, name, value in patches:
        setattr(place, name, value)
    try:
        embed_module.embed(EmbedConfig(fasta, out_dir, model=str(model), batch_tokens=32_768, **settings))
    finally:
        for place, name, value in originals:
            setattr(place, name, value)
    return times["stage"], times["write"]


if __name__ == "__main__":
    main()
