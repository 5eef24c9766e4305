"""Settings that depend on the hardware: precision, compiled layers, data workers and the size of micro-batches."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from esm2kit.core.errors import InputError
from esm2kit.core.processes import count_cores
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import resolve_precision
from esm2kit.models.memory import largest_budget
from esm2kit.training.config import TrainingConfig
from esm2kit.training.memory import describe_memory
from esm2kit.training.resume import ResumePoint
from esm2kit.training.trainer import resolve_accelerator

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainingConfig)

MOST_WORKERS = 4
# Share of a GPU's memory that the estimate may fill; the rest is for the allocator, CUDA and the logits.
MEMORY_SHARE = 0.7
FEWEST_TOKENS, MOST_TOKENS = 1024, 65_536


def resolve_hardware(config: Config) -> Config:
    """Fill in precision, compile and num_workers, and log what was chosen on a CUDA GPU.

    Args:
        config: The run.

    Returns:
        The run with these settings resolved.

    Raises:
        InputError: As `resolve_accelerator`.
    """
    device = resolve_accelerator(config)
    chosen: dict[str, Any] = {}
    if config.precision == "auto":
        chosen["precision"] = choose_precision(device)
    if config.compile == "auto":
        chosen["compile"] = device == "cuda"
    if config.num_workers is None:
        chosen["num_workers"] = choose_workers(device, config.devices)
    config = replace(config, **chosen)
    if device == "cuda":
        logger.info(
            "training on %s: precision %s, %s, %d data workers per device",
            torch.cuda.get_device_name(0),
            config.precision,
            "compiled layers" if config.compile else "layers not compiled",
            config.num_workers,
        )
    return config


def resolve_micro_batches(config: Config, shape: ESM2Config) -> Config:
    """Fill in micro_batch_tokens on a CUDA GPU, if the configuration does not say how to divide a batch.

    Args:
        config: The run, with the settings of `resolve_hardware` resolved.
        shape: Architecture of the encoder.

    Returns:
        The run, whose global batch is the same as before. The token budget is the largest power of two, from 1,024 to
        65,536, with which the estimate of `models.memory` stays below 70% of the memory of the node's smallest GPU.
    """
    divisions = (config.micro_batch_size, config.accumulate_grad_batches, config.micro_batch_tokens)
    if resolve_accelerator(config) != "cuda" or divisions != (None, None, None):
        return config
    # of the smallest GPU, as all ranks of the node must divide the batch in the same way
    gpus = range(min(config.devices, torch.cuda.device_count()))
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in gpus)
    fitting = largest_budget(shape, describe_memory(config), MEMORY_SHARE * memory)
    return replace(config, micro_batch_tokens=min(MOST_TOKENS, max(FEWEST_TOKENS, fitting)))


def choose_precision(device: str) -> str:
    """Return the precision that `auto` means: bf16-mixed on a CUDA GPU with bfloat16, otherwise 32-true."""
    return "bf16-mixed" if resolve_precision("auto", device) == "bfloat16" else "32-true"


def choose_workers(device: str, devices: int) -> int:
    """Return the default number of data workers per device.

    On a CUDA GPU it is at most MOST_WORKERS, and leaves a core to each training process. It is 0 elsewhere, and also in
    a script that calls the Python API: each worker imports the script, which then has to protect its calls with
    `if __name__ == "__main__":`.

    Args:
        device: Type of the device.
        devices: Devices of this node.
    """
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", "")
    runs_esm2kit = name.partition(".")[0] == "esm2kit" or Path(getattr(main, "__file__", "")).stem == "esm2kit"
    if device != "cuda" or not runs_esm2kit:
        return 0
    return max(0, min(MOST_WORKERS, count_cores() // devices - 1))


def check_resumed_precision(requested: str, resolved: str, resumed: ResumePoint | None) -> None:
    """Check that `auto` does not change the precision of a run that resumes, as another device would.

    Args:
        requested: The setting of the user. Another precision that the user chose is accepted.
        resolved: What it means on this device.
        resumed: The checkpoint to continue from.

    Raises:
        InputError: The checkpoint was trained in another precision.
    """
    before = resumed.metadata["provenance"]["config"].get("precision", "32-true") if resumed else resolved
    if requested == "auto" and before != resolved:
        raise InputError(
            f"{resumed.path} was trained with precision {before}, but auto means {resolved} on this device. Pass "
            f"--precision {before} to continue as before, or --precision {resolved} to change it.",
            code="resume.precision",
            path=str(resumed.path),
            before=before,
            now=resolved,
        )
