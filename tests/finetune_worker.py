"""Started by test_finetune.py, alone or by torchrun: fine-tune several configurations, one after another.

A second argument {"update": n} or {"save": n} has the process kill itself, as a crash would, right before its n-th
update or in the middle of its n-th save.
"""

import json
import os
import signal
import sys
import warnings

import torch

from esm2kit import checkpoint, finetune
from esm2kit.arguments import parse
from esm2kit.finetune_module import LabelTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(moment: dict[str, int]) -> None:
    left = {"update": -1, "save": -1} | moment
    step, save, write = LabelTrainer.training_step, checkpoint.save_tensors, checkpoint._bytes

    def counted_step(*arguments):
        left["update"] -= 1
        return die() if left["update"] == 0 else step(*arguments)

    def counted_save(*arguments):
        left["save"] -= 1
        save(*arguments)

    def counted_write(tensor):
        return die() if left["save"] == 0 and tensor.numel() > 1000 else write(tensor)

    LabelTrainer.training_step, checkpoint.save_tensors, checkpoint._bytes = counted_step, counted_save, counted_write


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        arrange_death(json.loads(sys.argv[2]))
    for arguments in json.loads(sys.argv[1]):
        finetune.finetune(parse(finetune.FinetuneConfig, "finetune", arguments))
