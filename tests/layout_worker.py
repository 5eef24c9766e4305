"""Started by torchrun from test_layouts.py: pretrain several configurations, one after another, in one group."""

import json
import sys
import warnings

from esm2kit.arguments import parse
from esm2kit.pretrain import PretrainConfig, pretrain

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for arguments in json.loads(sys.argv[1]):
        pretrain(parse(PretrainConfig, "pretrain", arguments))
