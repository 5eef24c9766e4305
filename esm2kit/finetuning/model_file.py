"""Files of fine-tuned models: one safetensors file with encoder or adapters, head and task.

Tensors: `model.*` with the names of fair-esm, so that `esm2kit embed --model` can read the file; or `adapter.*` for
low-rank adapters, with the SHA-256 of the base model's weights; and `head.*`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esm2kit.benchmarking.uncertainty import Uncertainty
from esm2kit.core.errors import InputError
from esm2kit.core.hardware import choose_device
from esm2kit.core.paths import expand_path
from esm2kit.core.processes import local_rank
from esm2kit.finetuning.heads import HeadSpec, LabelModel
from esm2kit.models.checkpoint import (
    check_tensor_shapes,
    open_checkpoint,
    read_checkpoint,
    read_metadata,
    write_checkpoint,
)
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import TOKENS_PER_BATCH, Encoder, Precision
from esm2kit.models.esm2 import ESM2
from esm2kit.models.layerwise import LayerwiseEncoder, fits_in_memory
from esm2kit.models.load import ModelFile, build_model, find_model, load_model
from esm2kit.models.lora import add_lora, load_adapters, merge_layers, merge_lora, weights_sha256
from esm2kit.models.sharded import Shard, ShardedEncoder, choose_sharding
from esm2kit.models.weights import ChangeLayer, Weights
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode
from esm2kit.sequences.windows import Windowing
from esm2kit.tasks.label_metrics import DEFAULT_THRESHOLD
from esm2kit.tasks.labels import compute_probabilities, decide_outputs
from esm2kit.tasks.packing import WINDOW_OVERLAP, Window, batch_windows
from esm2kit.tasks.scaling import TargetScale
from esm2kit.tasks.task import Task, read_task
from esm2kit.training.resume import group_by_prefix

logger = logging.getLogger(__name__)

FILE = "finetuned.safetensors"


def load_head(model: LabelModel, state: dict[str, Tensor], source: Path | str) -> None:
    """Load the weights of a trained head.

    Args:
        model: The model with the head.
        state: Tensors of the trained head.
        source: File for messages.

    Raises:
        InputError: The trained head has another number of outputs, or tensors of another name or shape.
    """
    outputs = state["bias_out"].shape[-1] if "bias_out" in state else 0
    if outputs != model.spec.num_outputs:
        raise InputError(
            f"{source}: the head has {outputs} outputs, but the task requires {model.spec.num_outputs}. Choose a head "
            "that was trained on the same labels, or train a new one.",
            code="head.outputs",
            found=outputs,
            expected=model.spec.num_outputs,
        )
    remedy = "Use the head, hidden and standardize settings that it was trained with."
    check_tensor_shapes(model.head.state_dict(), state, source, f"head '{model.spec.name}'", remedy)
    model.head.load_state_dict(state)


@dataclass(frozen=True)
class FinetunedModel:
    """A fine-tuned encoder and head for prediction.

    Args:
        encoder: The encoder with merged adapters.
        labels: The head.
        task: The task.
        metadata: Metadata of the file; `finetune` contains mode, base and scaling.
        esm2: The encoder as a module, to save or export. None if no process has all of it.
        source: The file.
    """

    encoder: Encoder
    labels: LabelModel
    task: Task
    metadata: dict[str, Any]
    esm2: ESM2 | None
    source: Path

    @property
    def facts(self) -> dict[str, Any]:
        """Metadata of fine-tuning: mode, head, task, max_tokens, scaling of the targets, base and lora."""
        return self.metadata["finetune"]

    @property
    def scale(self) -> TargetScale:
        """Scale of the values during training."""
        return TargetScale.from_stored(self.facts["target_centre"], self.facts["target_spread"])

    @property
    def threshold(self) -> float:
        """Probability above which a label of a multi-label task is predicted."""
        return self.facts.get("threshold", DEFAULT_THRESHOLD)

    @property
    def model_name(self) -> str:
        """Name of the base model."""
        return self.facts["base"]["name"]

    @property
    def mode(self) -> str:
        """Weights that were trained."""
        return self.facts["mode"]

    @property
    def training_labels(self) -> dict[str, Any]:
        """Description of the training labels; empty in files of earlier versions."""
        return self.facts.get("training_labels", {})

    @cached_property
    def uncertainty(self) -> Uncertainty | None:
        """What validation says about the predictions; None in files of earlier versions."""
        return Uncertainty.from_description(self.facts.get("uncertainty"))

    @property
    def has_spread(self) -> bool:
        """Whether values are the mean of several seeds; a file has a single one."""
        return False

    def outputs_and_spreads(
        self, sequences: Sequence[str], tokens_per_batch: int | None = None
    ) -> list[tuple[np.ndarray, None]]:
        """Compute the outputs; a single model has no spread of seeds."""
        return [(outputs, None) for outputs in self.outputs(sequences, tokens_per_batch)]

    @torch.inference_mode()
    def outputs(self, sequences: Sequence[str], tokens_per_batch: int | None = None) -> list[np.ndarray]:
        """Compute the outputs of the head, values in the unit of the target.

        A sequence longer than the training window is split into overlapping windows, whose outputs are averaged.

        Args:
            sequences: Amino-acid sequences.
            tokens_per_batch: Tokens per batch. It changes the outputs only by rounding (1e-5).

        Returns:
            For each sequence (C,) for a protein task, or (residues, C) for a residue task: float32, values float64.
        """
        longest = self.facts["max_tokens"] - 2
        segments = Windowing(longest, min(WINDOW_OVERLAP, longest // 2), 0)
        windows = [
            Window(row, *span) for row, sequence in enumerate(sequences) for span in segments.split(len(sequence))
        ]
        per_residue, width = self.task.level == "residue", self.labels.spec.num_outputs
        sums = [np.zeros((len(sequence) if per_residue else 1, width), np.float32) for sequence in sequences]
        counts = [np.zeros((len(total), 1), np.float32) for total in sums]
        budget = tokens_per_batch or TOKENS_PER_BATCH[self.encoder.device.type]
        for batch in batch_windows(windows, max(budget, self.encoder.group_tokens)):
            parts = [(BOS_IDX, *encode(sequences[w.protein][w.start : w.stop]), EOS_IDX) for w in batch]
            num_tokens = [len(part) for part in parts]
            tokens_N = torch.from_numpy(np.concatenate(parts).astype(np.int64))
            last = self.encoder.config.num_layers
            hidden_ND = self.encoder.encode(tokens_N, num_tokens, [last])[last]
            found = self.labels.label(hidden_ND, num_tokens).numpy()
            sizes = [w.stop - w.start if per_residue else 1 for w in batch]
            for window, rows in zip(batch, np.split(found, np.cumsum(sizes)[:-1]), strict=True):
                where = slice(window.start, window.stop) if per_residue else slice(None)
                sums[window.protein][where] += rows
                counts[window.protein][where] += 1
        merged = [total / count for total, count in zip(sums, counts, strict=True)]
        if self.task.target == "value":
            merged = [self.scale.restore(rows) for rows in merged]
        return merged if per_residue else [rows[0] for rows in merged]

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        """Convert outputs (..., C) to classes (int64), values (float64), or labels that are present (int64)."""
        return decide_outputs(outputs, self.task, self.threshold)

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Convert outputs to probabilities (..., C) of classes or binary labels; values are returned unchanged."""
        return compute_probabilities(outputs, self.task, self.uncertainty.divisor if self.uncertainty else 1.0)


def load_finetuned(
    path: Path,
    base: str | None = None,
    device: str = "cpu",
    precision: Precision = "auto",
    layer_by_layer: bool | None = None,
    shard: Shard = False,
) -> FinetunedModel:
    """Load a model of `esm2kit finetune`.

    Args:
        path: finetuned.safetensors, or its folder.
        base: Base model of adapters. Default: its location during training.
        device: auto, cpu, cuda or mps.
        precision: See `Encoder`.
        layer_by_layer: See `load_encoder`.
        shard: See `load_encoder`.

    Returns:
        The model, with adapters merged.

    Raises:
        InputError: The file does not exist, is damaged or is not a fine-tuned model; the base differs from the one of
            the training; or a base is specified for a file that contains its encoder.
    """
    path = expand_path(path)
    if path.is_dir():
        seeds = sorted(folder.name for folder in path.glob("seed=*") if (folder / FILE).is_file())
        if not (path / FILE).is_file() and seeds:
            raise InputError(
                f"{path} contains one model per seed ({', '.join(seeds)}). Choose one of these folders.",
                code="finetuned.several",
                path=path,
                found=list(seeds),
            )
        path = path / FILE
    if not path.is_file():
        raise InputError(
            f"{path} does not exist. `esm2kit finetune` writes it at the end of a run.",
            code="finetuned.missing",
            path=path,
        )
    metadata = read_metadata(path)
    if "finetune" not in metadata:
        raise InputError(
            f"{path} is a pretraining checkpoint without a head. Fine-tune it with `esm2kit finetune`.",
            code="finetuned.no-head",
            path=path,
        )
    facts, place = metadata["finetune"], choose_device(device, local_rank())
    about = (ESM2Config(**metadata["model"]), facts["base"]["name"], precision, place)
    sharded = choose_sharding(shard, *about, layer_by_layer=layer_by_layer)
    if not sharded and layer_by_layer is None:
        layer_by_layer = not fits_in_memory(*about)
    if sharded or layer_by_layer:
        readers, metadata = open_checkpoint(path)
        tensors = {name: read() for name, read in readers.items() if not name.startswith("model.")}
    else:
        tensors, metadata = read_checkpoint(path)
    parts = group_by_prefix(tensors)
    spec = HeadSpec(**facts["head"])
    labels = LabelModel(None, spec)
    task = read_task(facts["task"])
    if task.num_outputs != spec.num_outputs:
        raise InputError(
            f"{path}: the head has {spec.num_outputs} outputs, but task {task.name} requires {task.num_outputs}",
            code="head.outputs",
            found=spec.num_outputs,
            expected=task.num_outputs,
        )
    load_head(labels, parts["head"], path)
    if "adapter" not in parts and base is not None:
        raise InputError(
            f"{path} contains the complete encoder, so base {base!r} is not used: omit base",
            code="finetuned.base-unused",
            path=path,
            base=base,
        )
    if sharded or layer_by_layer:
        weights, change = _open_encoder(path, parts, metadata, base)
        kind = ShardedEncoder if sharded else LayerwiseEncoder
        esm2, encoder = None, kind(weights, precision, place, change=change)
    else:
        esm2 = _load_encoder(path, parts, metadata, base)
        encoder = Encoder(esm2, precision, place)
    return FinetunedModel(encoder, labels.eval(), task, metadata, esm2, path)


def save_merged(model: FinetunedModel, path: Path) -> None:
    """Write the encoder and head with adapters merged, as a file that needs no base model."""
    tensors = {f"model.{name}": tensor for name, tensor in model.esm2.state_dict().items()}
    tensors |= {f"head.{name}": tensor for name, tensor in model.labels.head.state_dict().items()}
    write_checkpoint(path, tensors, model.metadata)


def _load_encoder(path: Path, parts: dict[str, dict[str, Tensor]], metadata: dict[str, Any], base: str | None) -> ESM2:
    """Load the encoder, with adapters merged into the base model."""
    if "adapter" not in parts:
        return build_model(ESM2Config(**metadata["model"]), parts["model"], path)
    named, lora = metadata["finetune"]["base"], metadata["finetune"]["lora"]
    esm2, source = load_model(base or named["model"], named["untrained_seed"] if base is None else None)
    _check_base(path, named, source.name, weights_sha256(esm2))
    add_lora(esm2, lora["rank"], lora["alpha"], lora["targets"], lora["biases"])
    load_adapters(esm2, parts["adapter"], str(path))
    return merge_lora(esm2).requires_grad_(False).eval()


def _open_encoder(
    path: Path, parts: dict[str, dict[str, Tensor]], metadata: dict[str, Any], base: str | None
) -> tuple[Weights, ChangeLayer | None]:
    """Open the encoder to be read layer by layer; also return what merges the adapters into a layer."""
    if "adapter" not in parts:
        return ModelFile(path.stem, str(path), "esm2kit", path).open(), None
    named, lora = metadata["finetune"]["base"], metadata["finetune"]["lora"]
    source = find_model(base or named["model"], named["untrained_seed"] if base is None else None)
    weights = source.open()
    _check_base(path, named, source.name, weights.sha256())
    settings = (lora["rank"], lora["alpha"], lora["targets"], lora["biases"])
    return weights, merge_layers(weights.config, parts["adapter"], str(path), *settings)


def _check_base(path: Path, named: dict[str, Any], name: str, found: str) -> None:
    """Check that the base model has the weights that the adapters were trained on."""
    if found != named["sha256"]:
        raise InputError(
            f"{path}: these adapters were trained on {named['name']} (weights {named['sha256'][:12]}), "
            f"but {name} has weights {found[:12]}. Set base to the model they were trained on.",
            code="lora.other-base",
            path=path,
            expected=named["sha256"],
            found=found,
        )
