"""The memory of a training run: its estimate, automatic activation checkpointing, and what to do if it is exhausted."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning import LightningDataModule

from esm2kit.core.hardware import read_free_memory
from esm2kit.core.processes import rank, read_launch
from esm2kit.models.config import ESM2Config
from esm2kit.models.memory import TrainingSettings, estimate_training, format_gib
from esm2kit.sequences.batching import bucket_size
from esm2kit.training.config import TrainingConfig
from esm2kit.training.layout import BatchLayout, uses_fsdp
from esm2kit.training.trainer import resolve_accelerator

logger = logging.getLogger(__name__)
# Share of the device's memory that the estimate may reach. The rest is for what it does not count.
USABLE_SHARE = 0.9
REMEDIES = 3  # settings that an error about memory names


class TrainingData(LightningDataModule, ABC):
    """The batches of a training stage."""

    @abstractmethod
    def count_tokens(self) -> list[int]:
        """Count the tokens of each sample of the next update, of all ranks."""


@dataclass
class MemoryPlan:
    """The estimate of a run's memory on one device.

    Args:
        config: The run.
        shape: Architecture of the ESM-2.
        settings: What decides its memory.
    """

    config: TrainingConfig
    shape: ESM2Config
    settings: TrainingSettings

    @classmethod
    def of(cls, config: TrainingConfig, shape: ESM2Config, data: TrainingData) -> "MemoryPlan":
        """Plan the memory of a run from its configuration, its model and its next update."""
        layout, num_tokens = config.layout, data.count_tokens()
        accumulates = len(layout.split(num_tokens, 0)) > 1
        settings = describe_memory(config, count_micro_batch_tokens(layout, num_tokens), accumulates)
        return cls(config, shape, settings)

    @property
    def needed(self) -> float:
        """Estimated bytes at the peak."""
        return estimate_training(self.shape, self.settings).total

    @property
    def action(self) -> str:
        """What is done, for the message about exhausted memory."""
        return f"training with {self.settings.tokens:,} tokens per micro-batch (about {format_gib(self.needed)})"

    def choose_checkpointing(self, device: torch.device) -> bool:
        """Decide on activation checkpointing, and log the memory that the run needs.

        Args:
            device: The device, with the model on it.

        Returns:
            Whether layers are recomputed in the backward pass. With `auto`, only if the run does not fit otherwise.
        """
        available = self._read_available_memory(device)
        automatic = self.config.activation_checkpointing == "auto"
        if automatic and available is not None and self.needed > USABLE_SHARE * available:
            self.settings = replace(self.settings, activation_checkpointing=True)
        exceeds = available is not None and self.needed > available
        if rank() == 0 and available is not None and (device.type != "cpu" or exceeds or self._recomputes_unasked):
            unasked = ", chosen because the run does not fit without it" if self._recomputes_unasked else ""
            logger.log(
                logging.WARNING if exceeds else logging.INFO,
                "%s tokens per micro-batch: about %s of %s, activation checkpointing %s%s%s",
                f"{self.settings.tokens:,}",
                format_gib(self.needed),
                format_gib(available),
                "on" if self.settings.activation_checkpointing else "off",
                unasked,
                f"; this may not fit. Use {self.list_remedies()[0]}" if exceeds else "",
            )
        return self.settings.activation_checkpointing

    def _read_available_memory(self, device: torch.device) -> int | None:
        """Read the memory that this rank can use: its share of what is free, and what it already has on the device."""
        free = read_free_memory(device)
        if free is None:
            return None
        if device.type == "cuda":
            return free + torch.cuda.memory_reserved(device)
        if device.type == "mps":
            return free + torch.mps.current_allocated_memory()
        ranks = read_launch().local_world_size  # each rank of the node needs as much of the same memory
        return free // ranks + int(estimate_training(self.shape, self.settings).weights)

    @property
    def _recomputes_unasked(self) -> bool:
        return self.settings.activation_checkpointing and self.config.activation_checkpointing == "auto"

    def list_remedies(self) -> list[str]:
        """List up to three settings that need less memory, each with its estimate."""
        found = [
            f"--{name} (about {format_gib(size)})"
            for name, settings in self._alternatives()
            if (size := estimate_training(self.shape, settings).total) < self.needed
        ]
        return found[:REMEDIES] if len(found) >= REMEDIES else [*found, "a smaller --model"]

    def _alternatives(self) -> list[tuple[str, TrainingSettings]]:
        """List options of the command line with the settings that they lead to, the best first."""
        now, layout, found = self.settings, self.config.layout, []

        def add(name: str, **changes: Any) -> None:
            found.append((name, replace(now, **changes)))

        if layout.micro_batch_tokens is not None:
            tokens = min(layout.micro_batch_tokens, now.tokens) // 2
            add(f"micro_batch_tokens {tokens}", tokens=tokens)
        elif (size := layout.micro_batch_size) > 1:
            factor = next(number for number in range(2, size + 1) if size % number == 0)
            accumulate = layout.accumulate_grad_batches * factor
            option = f"micro_batch_size {size // factor} --accumulate_grad_batches {accumulate}"
            add(option, tokens=now.tokens // factor, accumulates=True)
        if not now.activation_checkpointing:
            add("activation_checkpointing true", activation_checkpointing=True)
        if now.device == "cuda" and now.precision != "bf16-true":
            add("precision bf16-true", precision="bf16-true")
        if hasattr(self.config, "mode") and now.mode in ("full", "last_n"):
            add("mode lora", mode="lora")
        if hasattr(self.config, "mode") and now.mode != "frozen":
            add("mode frozen", mode="frozen")
        if now.device == "cuda" and not now.fsdp:
            devices = max(2, now.data_parallel)
            add(f"strategy fsdp2 --devices {devices}", fsdp=True, data_parallel=devices)
        return found


def describe_memory(config: TrainingConfig, tokens: int = 1, accumulates: bool = True) -> TrainingSettings:
    """Return the settings that decide the memory of a run, for `models.memory`.

    Args:
        config: The run of either stage, with precision resolved.
        tokens: Tokens per micro-batch.
        accumulates: Whether an update has more than one micro-batch.

    Returns:
        Settings for `estimate_training`. `activation_checkpointing` auto counts as off.
    """
    layout = config.layout
    return TrainingSettings(
        tokens=tokens,
        precision=config.precision,
        device=resolve_accelerator(config),
        mode=getattr(config, "mode", "full"),
        last_n=getattr(config, "last_n", 1),
        lora_rank=getattr(config, "lora_rank", None) or 8,
        activation_checkpointing=config.activation_checkpointing is True,
        accumulates=accumulates,
        data_parallel=layout.data_parallel_size,
        tensor_parallel=layout.tensor_model_parallel_size,
        fsdp=uses_fsdp(config.strategy, layout),
    )


def count_micro_batch_tokens(layout: BatchLayout, num_tokens: list[int]) -> int:
    """Count the tokens of the largest micro-batch of an update, rounded up as `Packed` rounds.

    Args:
        layout: The batch layout.
        num_tokens: Tokens per sample of the update.

    Returns:
        Rows of the packed batch.
    """
    parts = [part for each in range(layout.data_parallel_size) for part in layout.split(num_tokens, each)]
    largest = max(sum(num_tokens[position] for position in part) for part in parts)
    return largest + -largest % bucket_size(largest)
