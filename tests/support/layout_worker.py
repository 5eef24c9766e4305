"""Pretrain several configurations, one after another, in one process group; test_layouts.py starts it with torchrun.

With a second argument, a file, it then checks models that get their weights after sharding, and writes `equal` to it.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_models import assert_late_weights_match

from esm2kit.cli.arguments import parse
from esm2kit.core.processes import exit_process
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for arguments in json.loads(sys.argv[1]):
        pretrain(parse(PretrainConfig, "pretrain", arguments))
    if len(sys.argv) > 2:
        assert_late_weights_match()
        if dist.get_rank() == 0:
            Path(sys.argv[2]).write_text("equal", encoding="utf-8")
    exit_process(0)
