"""The module that trains an encoder and a head: the loss of the global batch, validation, what is trained and saved."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from esm2kit.benchmarking.scores import headline
from esm2kit.core.errors import InputError
from esm2kit.core.files import to_json
from esm2kit.core.process_group import gathered, sum_over
from esm2kit.finetuning.config import FinetuneConfig, lr_share
from esm2kit.finetuning.heads import LabelModel
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.lora import adapters
from esm2kit.tasks.data import TaskData
from esm2kit.tasks.labels import decide
from esm2kit.tasks.packing import EvaluationBatch, EvaluationBatches, LabelledBatch, LabelledProteins, Labels
from esm2kit.tasks.task import Task
from esm2kit.training.parallel import clip_grad_norm, data_parallel_group, gradient_sync, parameter_groups, shard_model
from esm2kit.training.precision import computing, gathered_dtype
from esm2kit.training.resume import ResumePoint, end_after_this_update, restore, state_of


def loss_sum(outputs_MC: Tensor, targets_M: Tensor, weights_M: Tensor, task: Task) -> Tensor:
    """Weighted loss summed over labels: squared error, cross-entropy, or the mean cross-entropy of binary labels."""
    if task.target == "value":
        return (weights_M * (outputs_MC[:, 0] - targets_M).square()).sum()
    if task.binary_labels:
        losses_ML = F.binary_cross_entropy_with_logits(outputs_MC, targets_M, reduction="none")
        return (weights_M * losses_ML).mean(1).sum()
    return (weights_M * F.cross_entropy(outputs_MC, targets_M, reduction="none")).sum()


class LabelTrainer(LightningModule):
    """An encoder and a head under Lightning, updating once a training item.

    Args:
        config: the run, settled.
        model: whole, the same on every rank.
        proteins: the task.
        resumed: what to go on from.
    """

    def __init__(
        self, config: FinetuneConfig, model: LabelModel, proteins: LabelledProteins, resumed: ResumePoint | None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters(to_json(config))  # which Lightning tells its loggers
        self.config, self.model, self.proteins, self.task = config, model, proteins, proteins.data.task
        self.resumed = resumed
        self.step = resumed.step if resumed else 0
        stopping = resumed.metadata["early_stopping"] if resumed else {}
        self.best_loss, self.since_best = stopping.get("best_loss"), stopping.get("since_best", 0)
        self.stop_requested = False
        # what the callbacks read: figures of the update just made, and of the last validation
        self.update: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.validation_rows = EvaluationBatches(proteins, "validation", config.tokens_per_validation_batch)
        self.slots = torch.from_numpy(proteins.data.scored[_targets_of(proteins.data, "validation")])
        self.sums_MC: Tensor | None = None
        model.esm2.activation_checkpointing = config.activation_checkpointing
        freeze(model, config)

    @property
    def esm2(self) -> ESM2:
        return self.model.esm2

    @property
    def out_of_patience(self) -> bool:
        return self.config.patience is not None and self.since_best >= self.config.patience

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard_model(self.esm2, self.device_mesh, gathered_dtype(self.config.precision))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config, groups = self.config, []
        for rate, parameters in learning_rates(self.model, config).items():
            groups += [{"params": group, "lr": rate, "peak": rate} for group in parameter_groups(parameters)]
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)
        if self.resumed:
            restore(self.model, optimizer, self.resumed.optimizer)
            self.resumed = None
        return optimizer

    def training_step(self, batches: list[LabelledBatch], batch_idx: int) -> None:
        strategy, optimizer = self.trainer.strategy, self.optimizers()
        group = data_parallel_group(strategy)
        # one exchange before the update: labels of the global batch, its tokens, its work, was any rank told to stop
        weight = sum(batch.label_weight for batch in batches)
        tokens = sum(len(batch.tokens_N) for batch in batches)
        flops = sum(training_flops(self.esm2.config, batch.num_tokens, self.config) for batch in batches)
        counts = torch.tensor([weight, tokens, flops, self.stop_requested], dtype=torch.float64, device=self.device)
        weight, tokens, flops, stop = sum_over(group, counts).tolist()
        ranks = self.config.layout.data_parallel_size
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for position, batch in enumerate(batches):
            last = position == len(batches) - 1
            with gradient_sync(strategy, self.esm2, last), computing(self.esm2, self.config.precision):
                outputs = self.model(batch.tokens_N, batch.num_tokens, batch.keys_B)[batch.rows_M]
                loss = loss_sum(outputs, batch.targets_M, batch.weights_M, self.task)
                # ranks' gradients are averaged: times their number, the average is the sum over the global batch
                self.manual_backward(loss * (ranks / max(weight, 1e-12)))
            total += loss.detach()
        if isinstance(strategy, ModelParallelStrategy):
            # FSDP2 holds the encoder alone; the head is whole on every rank and its gradients are averaged here
            for parameter in self.model.head.parameters():
                parameter.grad = sum_over(group, parameter.grad) / ranks
        norm = clip_grad_norm(self.model.parameters(), self.config.gradient_clip_val)
        mean_loss = sum_over(group, total).item() / max(weight, 1e-12)
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise InputError(self.blame(batches, mean_loss, float(norm)))
        share = lr_share(self.step, self.config)
        for parameters in optimizer.param_groups:
            parameters["lr"] = parameters["peak"] * share
        optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        rate = self.config.head_lr if self.config.mode == "frozen" else self.config.lr
        figures = {"train_loss": mean_loss, "lr": rate * share, "grad_norm": float(norm)}
        self.update = figures | {"tokens": tokens, "flops": flops}
        if stop:
            end_after_this_update(self.trainer, self.step)

    def blame(self, batches: list[LabelledBatch], loss: float, norm: float) -> str:
        """One line for a loss or gradient that is no number: the update, and the global batch's sequences."""
        ids = gathered([self.proteins.data.ids[protein] for batch in batches for protein in batch.proteins])
        return (
            f"update {self.step + 1}: loss {loss}, gradient norm {norm}; weights are as after update {self.step}. "
            f"Its sequences: {', '.join(dict.fromkeys(ids))}. A lower lr or longer warm-up is the usual remedy"
        )

    def on_validation_epoch_start(self) -> None:
        self.sums_MC = torch.zeros(self.validation_rows.num_slots, self.model.spec.num_outputs + 1, device=self.device)

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        with computing(self.esm2, self.config.precision):
            outputs = self.model(batch.tokens_N, batch.num_tokens)
        if len(batch.slots_M):
            counted = torch.cat([outputs, outputs.new_ones(len(outputs), 1)], dim=1)
            self.sums_MC.index_add_(0, batch.slots_M, counted)

    def on_validation_epoch_end(self) -> None:
        summed = sum_over(data_parallel_group(self.trainer.strategy), self.sums_MC).cpu()
        outputs_MC = (summed[:, :-1] / summed[:, -1:])[self.slots]
        val_loss, figures = judge(outputs_MC, self.proteins.labels, self.proteins.data, "validation")
        self.validation = {"val_loss": val_loss, **figures}
        if not math.isfinite(val_loss):
            raise InputError(f"update {self.step}: validation loss {val_loss}; a lower lr is the usual remedy")
        better = self.best_loss is None or val_loss < self.best_loss
        self.best_loss, self.since_best = (val_loss, 0) if better else (self.best_loss, self.since_best + 1)
        if self.out_of_patience:
            self.trainer.should_stop = True


def _targets_of(data: TaskData, set_name: str) -> np.ndarray:
    """Indices of all targets of a set, those that do not count included."""
    return np.flatnonzero((data.sets == set_name)[data.protein_of_target])


def judge(outputs_MC: Tensor, labels: Labels, data: TaskData, set_name: str) -> tuple[float, dict[str, float]]:
    """Loss and headline metric of a set's scored outputs, as training sees them.

    Returns: the loss, and {"val_<metric>": value}; an undefined metric (no spread in the predictions) is 0.
    """
    rows = torch.from_numpy(data.target_rows(set_name))
    targets, weights = labels.targets[rows], labels.weights[rows]
    divisor = (weights if weights.ndim == 1 else weights.mean(1)).sum(dtype=torch.float64).item()
    loss = loss_sum(
        outputs_MC.double(), targets.double() if targets.is_floating_point() else targets, weights, data.task
    )
    predicted = decide(outputs_MC, data.task).numpy()
    if data.task.target == "value":
        predicted = predicted.astype(np.float64) * labels.spread + labels.centre
    value = headline(data.task, data.targets[rows.numpy()], predicted)
    return loss.item() / divisor, {f"val_{data.task.metric}": value if math.isfinite(value) else 0.0}


def freeze(model: LabelModel, config: FinetuneConfig) -> None:
    """Leave gradients to what the mode trains: parts that no label depends on never have any.

    Raises: InputError if the model has fewer layers than last_n.
    """
    esm2, layers = model.esm2, len(model.esm2.layers)
    if config.mode == "last_n" and config.last_n > layers:
        raise InputError(f"last_n is {config.last_n} and the model has {layers} layers: give at most {layers}")
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


def learning_rates(model: LabelModel, config: FinetuneConfig) -> dict[float, list[nn.Parameter]]:
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


def saved_tensors(module: LabelTrainer) -> dict[str, Tensor]:
    """What a checkpoint of fine-tuning holds: `model.*` or, of LoRA, `adapter.*`; `head.*`; `optimizer.*`."""
    model, lora = module.model, module.config.mode == "lora"
    trained = {f"esm2.{name}" for name in adapters(model.esm2)}
    held = state_of(
        model,
        module.optimizers(use_pl_optimizer=False),
        lambda name: not lora or name.startswith("head.") or name in trained,
    )
    prefix = "adapter." if lora else "model."
    return {name.replace("model.esm2.", prefix, 1).replace("model.head.", "head.", 1): t for name, t in held.items()}
