"""Draw when the stages of a GPU's embedding run work, with the CPU in place of the GPU.

    python -m benchmarks.embed_timeline --work_dir scratch --out docs/images/embed_timeline.png

Runs `DeviceStream` (esm2kit/embedding/stream.py) on the CPU with one layer, random weights and synthetic proteins,
and records the start and the end of every call of its stages. The figure shows that they overlap; its durations are
those of the CPU. Prints the share of the time in which each stage worked.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.embed_stream import make_proteins, write_fasta
from esm2kit.embedding import run as embed_run
from esm2kit.embedding import stream as embed_stream
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2

STAGES = {"read": "read, tokenise, pack", "compute": "compute, pool, copy", "check": "check", "write": "write"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="Parent of the folder embed_timeline.")
    parser.add_argument("--out", type=Path, default=Path("embed_timeline.png"))
    parser.add_argument("--num_proteins", type=int, default=400)
    options = parser.parse_args()
    folder = options.work_dir / "embed_timeline"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = ESM2Config(1, 320, 5)
    state = ESM2.initialised(config, 0).state_dict()
    model = folder / "model.safetensors"
    write_checkpoint(model, {f"model.{name}": tensor for name, tensor in state.items()}, {"model": config})
    fasta = write_fasta(folder / "proteins.fasta", make_proteins(options.num_proteins, 1.0))

    spans: dict[str, list[tuple[float, float]]] = {stage: [] for stage in STAGES}

    def record(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(self: Any, *arguments: Any) -> Any:
            if stage in ("compute", "check"):
                arguments[0].exception()  # waiting for the stage before is not work
            began = time.perf_counter()
            found = function(self, *arguments)
            if found is not None or stage == "write":
                spans[stage].append((began, time.perf_counter() - began))
            return found

        return recorded

    for stage in ("read", "compute", "check"):
        setattr(embed_stream.DeviceStream, stage, record(stage, getattr(embed_stream.DeviceStream, stage)))
    embed_run.EmbeddingRun._write_batch = record("write", embed_run.EmbeddingRun._write_batch)
    embed_run.choose_copies = lambda device: embed_stream.DirectCopies()
    embed(
        EmbedConfig(
            fasta, folder / "out", model=str(model), per_residue=True, batch_tokens=4096, repr_layers=[0], device="cpu"
        )
    )

    began = min(start for times in spans.values() for start, _ in times)
    total = max(start + seconds for times in spans.values() for start, seconds in times) - began
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    for row, (stage, title) in enumerate(STAGES.items()):
        bars = [(start - began, seconds) for start, seconds in sorted(spans[stage])]
        colours = [f"C{number % 10}" for number in range(len(bars))]
        axes.broken_barh(bars, (row - 0.35, 0.7), color=colours, edgecolor="white", linewidth=0.4)
        print(f"{title}: {sum(seconds for _, seconds in bars) / total:.1%} of {total:.1f} s")
    axes.set(xlabel="seconds", xlim=(0, total), ylim=(len(STAGES) - 0.5, -0.5))
    axes.set_yticks(range(len(STAGES)), STAGES.values())
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
