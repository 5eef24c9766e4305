"""An encoder and a head in the training loop: loss, validation, what is trained and saved."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esm2kit.benchmarking.scores import compute_headline
from esm2kit.core.errors import InputError
from esm2kit.core.process_group import sum_over_group
from esm2kit.finetuning.config import FinetuneConfig, lr_factor
from esm2kit.finetuning.heads import LabelModel
from esm2kit.models.config import ESM2Config
from esm2kit.models.lora import list_adapters
from esm2kit.tasks.data import TaskData
from esm2kit.tasks.labels import decode_outputs
from esm2kit.tasks.packing import EvaluationBatch, EvaluationBatches, LabelledBatch, LabelledProteins, Labels
from esm2kit.tasks.task import Task
from esm2kit.training.loop import TrainingLoop
from esm2kit.training.parallel import data_parallel_group
from esm2kit.training.precision import precision_context
from esm2kit.training.resume import ResumePoint, collect_state


def loss_sum(outputs_MC: Tensor, targets_M: Tensor, weights_M: Tensor, task: Task) -> Tensor:
    """Weighted loss summed over labels: squared error, cross-entropy, or the mean cross-entropy of binary labels."""
    if task.target == "value":
        return (weights_M * (outputs_MC[:, 0] - targets_M).square()).sum()
    if task.binary_labels:
        losses_ML = F.binary_cross_entropy_with_logits(outputs_MC, targets_M, reduction="none")
        return (weights_M * losses_ML).mean(1).sum()
    return (weights_M * F.cross_entropy(outputs_MC, targets_M, reduction="none")).sum()


class LabelTrainer(TrainingLoop):
    """An encoder and a head trained on labels.

    Args:
        config: the run, with its defaults resolved.
        model: whole, the same on every rank.
        proteins: the task.
        resumed: the checkpoint to continue from.
        facts: what predictions need to know of the model; every checkpoint carries them.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: LabelModel,
        proteins: LabelledProteins,
        resumed: ResumePoint | None,
        facts: dict[str, Any],
    ) -> None:
        super().__init__(config, model, resumed)
        self.proteins, self.task, self.facts = proteins, proteins.data.task, facts
        stopping = resumed.metadata["early_stopping"] if resumed else {}
        self.best_loss, self.since_best = stopping.get("best_loss"), stopping.get("since_best", 0)
        self.validation_rows = EvaluationBatches(proteins, "validation", config.tokens_per_validation_batch)
        self.slots = torch.from_numpy(proteins.data.scored[_targets_of(proteins.data, "validation")])
        self.sums_MC: Tensor | None = None
        freeze_parameters(model, config)

    @property
    def out_of_patience(self) -> bool:
        return self.config.patience is not None and self.since_best >= self.config.patience

    @property
    def finished(self) -> bool:
        return super().finished or self.out_of_patience

    def loss_sum(self, batch: LabelledBatch) -> Tensor:
        outputs = self.model(batch.tokens_N, batch.num_tokens, batch.keys_B)[batch.rows_M]
        return loss_sum(outputs, batch.targets_M, batch.weights_M, self.task)

    def training_flops(self, batch: LabelledBatch) -> float:
        return training_flops(self.esm2.config, batch.num_tokens, self.config)

    def sequence_ids(self, batch: LabelledBatch) -> list[str]:
        return [self.proteins.data.ids[protein] for protein in batch.proteins]

    def peak_rates(self) -> dict[float, list[nn.Parameter]]:
        return group_by_learning_rate(self.model, self.config)

    def learning_rate(self, peak: float) -> float:
        return peak * lr_factor(self.step, self.config)

    @property
    def logged_peak(self) -> float:
        return self.config.head_lr if self.config.mode == "frozen" else self.config.lr

    def unsharded_parameters(self) -> list[nn.Parameter]:
        return list(self.model.head.parameters())

    def on_validation_epoch_start(self) -> None:
        self.sums_MC = torch.zeros(self.validation_rows.num_slots, self.model.spec.num_outputs + 1, device=self.device)

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        with precision_context(self.esm2, self.config.precision):
            outputs = self.model(batch.tokens_N, batch.num_tokens)
        if len(batch.slots_M):
            counted = torch.cat([outputs, outputs.new_ones(len(outputs), 1)], dim=1)
            self.sums_MC.index_add_(0, batch.slots_M, counted)

    def validation_metrics(self) -> dict[str, float]:
        summed = sum_over_group(data_parallel_group(self.trainer.strategy), self.sums_MC).cpu()
        outputs_MC = (summed[:, :-1] / summed[:, -1:])[self.slots]
        val_loss, metrics = evaluate(outputs_MC, self.proteins.labels, self.proteins.data, "validation")
        return {"val_loss": val_loss, **metrics}

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        val_loss = self.last_validation["val_loss"]
        better = self.best_loss is None or val_loss < self.best_loss
        self.best_loss, self.since_best = (val_loss, 0) if better else (self.best_loss, self.since_best + 1)
        if self.out_of_patience:
            self.trainer.should_stop = True

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """`model.*` or, of LoRA, `adapter.*`; `head.*`; `optimizer.*`."""
        lora = self.config.mode == "lora"
        trained = {f"esm2.{name}" for name in list_adapters(self.esm2)}
        held = collect_state(
            self.model,
            self.optimizers(use_pl_optimizer=False),
            lambda name: not lora or name.startswith("head.") or name in trained,
        )
        prefix = "adapter." if lora else "model."
        return {
            name.replace("model.esm2.", prefix, 1).replace("model.head.", "head.", 1): tensor
            for name, tensor in held.items()
        }

    def checkpoint_details(self) -> dict[str, Any]:
        stopping = {"best_loss": self.best_loss, "since_best": self.since_best}
        return {"finetune": self.facts, "early_stopping": stopping}


def _targets_of(data: TaskData, set_name: str) -> np.ndarray:
    """Indices of all targets of a set, those that do not count included."""
    return np.flatnonzero((data.sets == set_name)[data.protein_of_target])


def evaluate(outputs_MC: Tensor, labels: Labels, data: TaskData, set_name: str) -> tuple[float, dict[str, float]]:
    """Loss and headline metric of a set's scored outputs, as training sees them.

    Returns: the loss, and {"val_<metric>": value}; an undefined metric (no spread in the predictions) is 0.
    """
    rows = torch.from_numpy(data.target_rows(set_name))
    targets, weights = labels.targets[rows], labels.weights[rows]
    divisor = (weights if weights.ndim == 1 else weights.mean(1)).sum(dtype=torch.float64).item()
    loss = loss_sum(
        outputs_MC.double(), targets.double() if targets.is_floating_point() else targets, weights, data.task
    )
    predicted = decode_outputs(outputs_MC, data.task).numpy()
    if data.task.target == "value":
        predicted = predicted.astype(np.float64) * labels.spread + labels.centre
    value = compute_headline(data.task, data.targets[rows.numpy()], predicted)
    return loss.item() / divisor, {f"val_{data.task.metric}": value if math.isfinite(value) else 0.0}


def freeze_parameters(model: LabelModel, config: FinetuneConfig) -> None:
    """Leave gradients to what the mode trains: parts that no label depends on never have any.

    Raises: InputError if the model has fewer layers than last_n.
    """
    esm2, layers = model.esm2, len(model.esm2.layers)
    if config.mode == "last_n" and config.last_n > layers:
        raise InputError(
            f"last_n is {config.last_n} and the model has {layers} layers: give at most {layers}",
            code="option.range",
            name="last_n",
            found=config.last_n,
            at_most=layers,
        )
    if config.mode != "lora":
        trained = {"full": layers, "last_n": config.last_n}.get(config.mode, 0)
        esm2.requires_grad_(False)
        for layer in list(esm2.layers)[layers - trained :]:
            layer.requires_grad_(True)
        esm2.emb_layer_norm_after.requires_grad_(trained > 0)
        esm2.embed_tokens.requires_grad_(config.mode == "full")


def training_flops(shape: ESM2Config, num_tokens: list[int], config: FinetuneConfig) -> float:
    """Useful floating-point operations of an encoder's training step on a packed batch, the head's few left out.

    A backward pass costs a forward pass for the rows' gradients and one more for the weights'; it goes down to the
    lowest layer that trains. Mode lora has the first alone, its adapters' own work aside; frozen has neither.
    """
    forward = shape.forward_flops(num_tokens, 0)
    trained = config.last_n / shape.num_layers
    return forward * {"full": 3.0, "last_n": 1.0 + 2.0 * trained, "lora": 2.0, "frozen": 1.0}[config.mode]


def group_by_learning_rate(model: LabelModel, config: FinetuneConfig) -> dict[float, list[nn.Parameter]]:
    """Peak learning rate -> parameters: the head's own, the top layer's lr, and below it ever less."""
    rates: dict[float, list[nn.Parameter]] = {}
    layers = len(model.esm2.layers)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = config.lr
        if name.startswith("head."):
            rate = config.head_lr
        elif name.startswith("esm2.layers."):
            rate *= config.layer_lr_decay ** (layers - 1 - int(name.split(".")[2]))
        elif name.startswith("esm2.embed_tokens."):
            rate *= config.layer_lr_decay**layers
        rates.setdefault(rate, []).append(parameter)
    return rates
