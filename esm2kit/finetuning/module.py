"""Training of an encoder and a head: loss, validation, trained parameters and checkpoints."""

import math
from collections.abc import Iterable
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
from esm2kit.models.initialise import materialise
from esm2kit.models.lora import list_adapters
from esm2kit.tasks.label_metrics import choose_threshold
from esm2kit.tasks.labels import decode_outputs
from esm2kit.tasks.packing import EvaluationBatch, EvaluationBatches, LabelledBatch, LabelledProteins, Labels
from esm2kit.tasks.task import Task
from esm2kit.tasks.task_data import TaskData
from esm2kit.training.loop import TrainingLoop
from esm2kit.training.parallel import data_parallel_group
from esm2kit.training.precision import precision_context
from esm2kit.training.resume import ResumePoint, collect_state


def loss_sum(outputs_MC: Tensor, targets_M: Tensor, weights_M: Tensor, task: Task) -> Tensor:
    """Compute the weighted loss summed over labels: squared error, cross-entropy, or mean binary cross-entropy."""
    if task.columns:
        return (weights_M * (outputs_MC - targets_M).square()).mean(1).sum()
    if task.target == "value":
        return (weights_M * (outputs_MC[:, 0] - targets_M).square()).sum()
    if task.binary_labels:
        losses_ML = F.binary_cross_entropy_with_logits(outputs_MC, targets_M, reduction="none")
        return (weights_M * losses_ML).mean(1).sum()
    return (weights_M * F.cross_entropy(outputs_MC, targets_M, reduction="none")).sum()


class LabelTrainer(TrainingLoop):
    """Lightning module of an encoder and a head that are trained on labels.

    Args:
        config: Configuration with resolved defaults.
        model: The complete model, identical on every rank.
        proteins: The task.
        resumed: Checkpoint to resume from, or None.
        facts: Metadata for predictions, saved in every checkpoint.
        weights: Pairs of name and unsharded tensor of an encoder on the meta device, loaded after it is sharded.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: LabelModel,
        proteins: LabelledProteins,
        resumed: ResumePoint | None,
        facts: dict[str, Any],
        weights: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        super().__init__(config, model, resumed)
        self.weights = weights
        self.proteins, self.task, self.facts = proteins, proteins.data.task, facts
        stopping = resumed.metadata["early_stopping"] if resumed else {}
        self.best_loss, self.since_best = stopping.get("best_loss"), stopping.get("since_best", 0)
        self.validation_rows = EvaluationBatches(proteins, "validation", config.tokens_per_validation_batch)
        self.slots = torch.from_numpy(proteins.data.scored[_target_indices(proteins.data, "validation")])
        self.sums_MC: Tensor | None = None
        # probability above which a label of a multi-label task is predicted, chosen at the last validation
        self.threshold = resumed.metadata["finetune"].get("threshold") if resumed else None
        freeze_parameters(model, config)

    def configure_model(self) -> None:
        """Shard the encoder and load its weights, one tensor at a time."""
        super().configure_model()
        if self.weights is not None:
            materialise(self.esm2, self.weights, self.trainer.strategy.root_device)
            self.weights = None

    @property
    def out_of_patience(self) -> bool:
        """Whether early stopping ends the run."""
        return self.config.patience is not None and self.since_best >= self.config.patience

    @property
    def finished(self) -> bool:
        """Whether all updates are done or early stopping ends the run."""
        return super().finished or self.out_of_patience

    def loss_sum(self, batch: LabelledBatch) -> Tensor:
        """Compute the weighted loss summed over the labels of a micro-batch."""
        outputs = self.model(batch.tokens_N, batch.num_tokens, batch.keys_B)[batch.rows_M]
        return loss_sum(outputs, batch.targets_M, batch.weights_M, self.task)

    def training_flops(self, batch: LabelledBatch) -> float:
        """Return the floating-point operations of a micro-batch."""
        return training_flops(self.esm2.config, batch.num_tokens, self.config)

    def sequence_ids(self, batch: LabelledBatch) -> list[str]:
        """Return the ids of the proteins in a micro-batch."""
        return [self.proteins.data.ids[protein] for protein in batch.proteins]

    def peak_rates(self) -> dict[float, list[nn.Parameter]]:
        """Return the trained parameters by peak learning rate."""
        return group_by_learning_rate(self.model, self.config)

    def learning_rate(self, peak: float) -> float:
        """Return the learning rate of the current update for a peak learning rate."""
        return peak * lr_factor(self.step, self.config)

    @property
    def logged_peak(self) -> float:
        """Peak learning rate in the log: that of the head in mode frozen."""
        return self.config.head_lr if self.config.mode == "frozen" else self.config.lr

    def unsharded_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the head, which FSDP2 does not shard."""
        return list(self.model.head.parameters())

    def on_validation_epoch_start(self) -> None:
        """Reset the sums of the validation outputs."""
        self.sums_MC = torch.zeros(self.validation_rows.num_slots, self.model.spec.num_outputs + 1, device=self.device)

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Add the outputs of a validation batch to the sums over windows."""
        with precision_context(self.esm2, self.config.precision):
            outputs = self.model(batch.tokens_N, batch.num_tokens)
        if len(batch.slots_M):
            counted = torch.cat([outputs, outputs.new_ones(len(outputs), 1)], dim=1)
            self.sums_MC.index_add_(0, batch.slots_M, counted)

    def validation_metrics(self) -> dict[str, float]:
        """Return val_loss and the headline metric, over all ranks."""
        summed = sum_over_group(data_parallel_group(self.trainer.strategy), self.sums_MC).cpu()
        outputs_MC = (summed[:, :-1] / summed[:, -1:])[self.slots]
        if self.task.is_multilabel:
            data = self.proteins.data
            probability_ML = decode_outputs(outputs_MC, self.task).numpy()
            self.threshold = choose_threshold(data.targets[data.target_rows("validation")], probability_ML)
        val_loss, metrics = evaluate(outputs_MC, self.proteins.labels, self.proteins.data, "validation")
        return {"val_loss": val_loss, **metrics}

    def on_validation_epoch_end(self) -> None:
        """Update early stopping after a validation."""
        super().on_validation_epoch_end()
        val_loss = self.last_validation["val_loss"]
        better = self.best_loss is None or val_loss < self.best_loss
        self.best_loss, self.since_best = (val_loss, 0) if better else (self.best_loss, self.since_best + 1)
        if self.out_of_patience:
            self.trainer.should_stop = True

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return `model.*` (in mode lora `adapter.*`), `head.*` and `optimizer.*`."""
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
        """Return the metadata of a checkpoint: the task, the model and early stopping."""
        stopping = {"best_loss": self.best_loss, "since_best": self.since_best}
        chosen = {} if self.threshold is None else {"threshold": self.threshold}
        return {"finetune": self.facts | chosen, "early_stopping": stopping}


def _target_indices(data: TaskData, set_name: str) -> np.ndarray:
    """Return the indices of all targets of a set, including those that are not scored."""
    return np.flatnonzero((data.sets == set_name)[data.protein_of_target])


def evaluate(outputs_MC: Tensor, labels: Labels, data: TaskData, set_name: str) -> tuple[float, dict[str, float]]:
    """Compute the loss and the headline metric of a set.

    Args:
        outputs_MC: Outputs for the scored targets of the set.
        labels: Labels of the task as they are used in training.
        data: The task.
        set_name: Name of the set.

    Returns:
        The loss, and {"val_<metric>": value}. An undefined metric (constant predictions) is 0.
    """
    rows = torch.from_numpy(data.target_rows(set_name))
    targets, weights = labels.targets[rows], labels.weights[rows]
    divisor = (weights if weights.ndim == 1 else weights.mean(1)).sum(dtype=torch.float64).item()
    loss = loss_sum(
        outputs_MC.double(), targets.double() if targets.is_floating_point() else targets, weights, data.task
    )
    predicted = decode_outputs(outputs_MC, data.task).numpy()
    if data.task.target == "value":
        predicted = labels.scale.restore(predicted)
    value = compute_headline(data.task, data.targets[rows.numpy()], predicted)
    return loss.item() / divisor, {f"val_{data.task.metric}": value if math.isfinite(value) else 0.0}


def freeze_parameters(model: LabelModel, config: FinetuneConfig) -> None:
    """Freeze the parameters that the mode does not train.

    Args:
        model: The encoder and head.
        config: Mode and last_n.

    Raises:
        InputError: last_n exceeds the number of layers.
    """
    esm2, layers = model.esm2, len(model.esm2.layers)
    if config.mode == "last_n" and config.last_n > layers:
        raise InputError(
            f"last_n must be at most {layers}, the number of layers of the model, found {config.last_n}",
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
    """Count the floating-point operations of a training step of the encoder, without the head and the adapters.

    A backward pass costs as much as one forward pass for the gradients of the activations, and another one for the
    gradients of the weights. It ends at the lowest trained layer. Mode lora requires only the first part, and mode
    frozen neither.

    Args:
        shape: Architecture of the encoder.
        num_tokens: Tokens of each sequence of the packed batch.
        config: Mode and last_n.

    Returns:
        Floating-point operations.
    """
    forward = shape.forward_flops(num_tokens, 0)
    trained = config.last_n / shape.num_layers
    return forward * {"full": 3.0, "last_n": 1.0 + 2.0 * trained, "lora": 2.0, "frozen": 1.0}[config.mode]


def group_by_learning_rate(model: LabelModel, config: FinetuneConfig) -> dict[float, list[nn.Parameter]]:
    """Group the trained parameters by peak learning rate: head_lr for the head, and layer-wise decay below lr."""
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
