"""How long a training run stands still for a checkpoint: written directly, or copied and written by a thread.

    python benchmarks/checkpoints.py --sizes 35M 150M --out_dir checkpoints_trial

Both ways save the same model with its AdamW state, interleaved, after a real update. Training updates are repeated
while the thread writes. Printed are medians: seconds for which `CheckpointWriter` holds up the training, seconds from
the save until the file is complete, and the seconds of an update while no thread writes and while one does.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from esm2kit import ESM2
from esm2kit.core.hardware import cpu_name, resolve_device
from esm2kit.models.config import SHORT_NAMES, SIZES, ESM2Config
from esm2kit.training.resume import CheckpointWriter, collect_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["35M", "150M"])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="Tokens of an update.")
    parser.add_argument("--out_dir", type=Path, help="Folder on the disk to measure. Default: a temporary folder.")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(
        "| model | file | written directly | in a thread: held up | until complete | update | update while it writes |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.out_dir) as folder:
            found = measure(SIZES[SHORT_NAMES[size]], Path(folder), arguments, device)
            times = " | ".join(f"{found[name]:.2f} s" for name in ("direct", "held", "complete", "idle", "writing"))
            print(f"| {size} | {found['gib']:.2f} GiB | {times} |", flush=True)


def measure(config: ESM2Config, folder: Path, arguments: Any, device: str) -> dict[str, float]:
    """Measure one shape; returns medians in seconds, nan where nothing was measured, and the size of the file."""
    model = ESM2.initialised(config, 0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens_BT = torch.randint(4, 24, (1, arguments.tokens), device=device)

    def update() -> float:
        started = time.perf_counter()
        model(tokens_BT)["logits"].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    module = SimpleNamespace(
        step=0, finished=False, last_validation={"val_loss": 1.0}, esm2=model,
        checkpoint_tensors=lambda: collect_state(model, optimizer), checkpoint_details=dict,
    )  # fmt: skip
    (folder / "metrics.csv").write_text("step\n", encoding="utf-8")
    writer = CheckpointWriter(folder, 0, {}, 1)
    update()
    seconds: dict[str, list[float]] = {name: [] for name in ("direct", "held", "complete", "idle", "writing")}
    for _ in range(arguments.repeats):
        seconds["idle"].append(update())
        for name, at_end in (("direct", True), ("held", False)):
            module.step += 1
            started = time.perf_counter()
            writer.on_validation_end(SimpleNamespace(is_global_zero=True, should_stop=at_end), module)
            seconds[name].append(time.perf_counter() - started)
        while writer.pending is not None and not writer.pending.done():
            seconds["writing"].append(update())
        seconds["complete"].append(time.perf_counter() - started)
        writer.best()  # raises the error of the thread
    medians = {name: statistics.median(values or [float("nan")]) for name, values in seconds.items()}
    return medians | {"gib": writer.last.stat().st_size / 2**30}


if __name__ == "__main__":
    main()
