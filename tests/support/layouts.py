"""Pretraining runs in several layouts, for the tests that compare their metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from esm2kit.cli.arguments import parse
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain

COMMON = {
    "model": "custom",
    "num_layers": 2,
    "embed_dim": 32,
    "attention_heads": 4,
    "global_batch_size": 16,
    "warmup_steps": 4,
    "lr": 1e-3,
    "log_every_n_steps": 1,
    "accelerator": "cpu",
    # so small that every update is clipped: a wrong norm in one layout changes its losses
    "gradient_clip_val": 0.5,
}
# name -> (processes, settings)
LAYOUTS = {
    "ddp2": (2, {"devices": 2}),
    "fsdp2": (2, {"devices": 2, "strategy": "fsdp2"}),
    "tp2": (2, {"devices": 2, "tensor_model_parallel_size": 2}),
    "2x2": (4, {"devices": 4, "tensor_model_parallel_size": 2}),
}


GLOO_CRASH = "Signal 11 (SIGSEGV)"


def arguments(out_dir: Path, data: Path, **settings: object) -> list[str]:
    settings = COMMON | {"data": data, "out_dir": out_dir} | settings
    return [f"--{name}={value}" for name, value in settings.items()]


def train_with_torchrun(processes: int, runs: list[list[str]], *more: str) -> None:
    """Run configurations, one after another, in one group of processes, as starting a group takes longer than a run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(Path(__file__).parent / "layout_worker.py"), json.dumps(runs), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    if done.returncode and GLOO_CRASH in done.stderr:
        # a group sometimes dies in a thread of gloo (pt_gloo_runloop reads address 0); the second call resumes the runs
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def train_in_process(runs: list[list[str]]) -> None:
    torch.set_num_threads(1)
    for run in runs:
        pretrain(parse(PretrainConfig, "pretrain", run))
