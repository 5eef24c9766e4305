r"""Compare the speed and the memory of contact prediction by esm2kit and by fair-esm's `predict_contacts`.

    python benchmarks/contacts.py --sizes 8M --num_residues 300 1000 --num_proteins 8 --repeats 3

Both have the same random weights and the same random proteins, and run in one process each, one after the other, with
the same number of threads. The first one changes from round to round. The time is that from sequences to probabilities;
fair-esm computes the proteins one by one, as its example does. The memory is the peak above that of the loaded model.
The largest difference between both is printed, so that equal numbers are compared. Prints medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

NAMES = {
    "8M": "esm2_t6_8M_UR50D",
    "35M": "esm2_t12_35M_UR50D",
    "150M": "esm2_t30_150M_UR50D",
    "650M": "esm2_t33_650M_UR50D",
}
CONTESTANTS = ("esm2kit", "fair-esm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8M"], choices=list(NAMES))
    parser.add_argument("--num_residues", nargs="+", type=int, default=[300, 1000], help="Lengths, one row each.")
    parser.add_argument("--num_proteins", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="Rounds.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    print("| model | residues | " + " | ".join(f"{name}: s | MB" for name in CONTESTANTS) + " | largest difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in options.sizes:
        for num_residues in options.num_residues:
            print(compete(options, size, num_residues), flush=True)


def compete(options: argparse.Namespace, size: str, num_residues: int) -> str:
    """Run both contestants in turn; returns a row of the table."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with TemporaryDirectory() as folder:
        for round in range(options.repeats):
            for name in CONTESTANTS[:: 1 if round % 2 == 0 else -1]:
                command = [sys.executable, __file__, "--child", name, "--out", f"{folder}/{name}.npy"]
                command += ["--sizes", size, "--num_residues", str(num_residues), "--threads", str(options.threads)]
                command += ["--num_proteins", str(options.num_proteins)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[name].append(json.loads(done.stdout))
        ours, theirs = (np.load(f"{folder}/{name}.npy") for name in CONTESTANTS)
    cells = [
        f"{statistics.median(each['seconds'] for each in found[name]):.2f} | "
        f"{statistics.median(each['megabytes'] for each in found[name]):,.0f}"
        for name in CONTESTANTS
    ]
    return f"| {size} | {num_residues} | {' | '.join(cells)} | {np.abs(ours - theirs).max():.1e} |"


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run one contestant once."""
    import esm

    from esm2kit.core.hardware import read_memory_use
    from esm2kit.models.config import SIZES
    from esm2kit.models.esm2 import ESM2, tokenize
    from esm2kit.structure.attention import ContactModel

    torch.set_num_threads(options.threads)
    config = SIZES[NAMES[options.sizes[0]]]
    model = ESM2.initialised(config, seed=0).eval()
    model.contact_head.regression.bias.fill_(-1.0)
    letters = np.array(list("LAGVSERTIDPKQNFYMHWC"))
    generator = np.random.default_rng(0)
    sequences = ["".join(generator.choice(letters, options.num_residues[0])) for _ in range(options.num_proteins)]
    cpu = torch.device("cpu")
    if options.child == "fair-esm":
        reference = esm.ESM2(config.num_layers, config.embed_dim, config.attention_heads).eval()
        reference.load_state_dict(model.state_dict())
        del model
    else:
        ours = ContactModel(model, "contacts", "float32", cpu)
    before, started = read_memory_use(cpu), time.perf_counter()
    if options.child == "fair-esm":
        maps = [reference.predict_contacts(tokenize([sequence]))[0].numpy() for sequence in sequences]
    else:
        maps = [map_TT for sequence in sequences for map_TT in ours.predict([sequence])]
    seconds = time.perf_counter() - started
    np.save(options.out, np.array(maps))
    return {"seconds": seconds, "megabytes": (read_memory_use(cpu, peak=True) - before) / 1e6}


if __name__ == "__main__":
    main()
