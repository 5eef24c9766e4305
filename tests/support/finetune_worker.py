"""Fine-tune several configurations, one after another; test_finetune.py starts it directly or with torchrun.

A run into a new folder called `cut` is interrupted before its fifth update. With a second argument, {"update": n} or
{"save": n}, the process instead kills itself before its n-th update or during its n-th save, like a crash.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch

from esm2kit.cli.arguments import parse
from esm2kit.core.processes import exit_process, rank
from esm2kit.finetuning import finetune
from esm2kit.finetuning.config import FinetuneConfig
from esm2kit.finetuning.module import LabelTrainer
from esm2kit.models import checkpoint
from esm2kit.training.metrics_log import read_metrics


class CutOffError(Exception):
    """Raised instead of an update."""


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def schedule_kill(moment: dict[str, int]) -> None:
    left = {"update": -1, "save": -1} | moment
    step, save, write = LabelTrainer.training_step, checkpoint.save_tensors, checkpoint._to_bytes

    def counted_step(*arguments):
        left["update"] -= 1
        return kill_self() if left["update"] == 0 else step(*arguments)

    def counted_save(*arguments):
        left["save"] -= 1
        save(*arguments)

    def counted_write(tensor):
        return kill_self() if left["save"] == 0 and tensor.numel() > 1000 else write(tensor)

    LabelTrainer.training_step = counted_step
    checkpoint.save_tensors, checkpoint._to_bytes = counted_save, counted_write


def finetune_interrupted(config: FinetuneConfig) -> None:
    step = LabelTrainer.training_step

    def raise_at_fifth_update(trainer: LabelTrainer, *arguments) -> None:
        if trainer.step == 4:
            raise CutOffError
        step(trainer, *arguments)

    LabelTrainer.training_step = raise_at_fifth_update
    try:
        finetune.finetune(config)
    except CutOffError:
        if not rank():
            updates = sum(bool(row["train_loss"]) for row in read_metrics(config.out_dir / "metrics.csv"))
            saved = checkpoint.read_metadata(config.out_dir / "checkpoints" / "last.safetensors")["step"]
            (config.out_dir / "cut_off_after").write_text(f"updates {updates}, checkpoint {saved}")
    finally:
        LabelTrainer.training_step = step


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        schedule_kill(json.loads(sys.argv[2]))
    seen = set()
    for arguments in json.loads(sys.argv[1]):
        config = parse(FinetuneConfig, "finetune", arguments)
        out_dir = Path(config.out_dir)
        if out_dir.name == "cut" and out_dir not in seen and len(sys.argv) == 2:
            seen.add(out_dir)
            finetune_interrupted(config)
        else:
            finetune.finetune(config)
    exit_process(0)
