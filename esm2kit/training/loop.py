"""The update loop and the course of a run, shared by every stage that trains.

One update is one item of the training set: its micro-batches run one after the other, each loss divided by the label
weight of the *global* batch (masked tokens, labels), so gradients and curves do not depend on how many devices or
micro-batches there were.
"""

import logging
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from esm2kit.core.errors import InputError
from esm2kit.core.files import to_json
from esm2kit.core.process_group import gather_strings, is_set_on_any_rank, sum_over_group
from esm2kit.models.esm2 import ESM2
from esm2kit.training.config import TrainingConfig
from esm2kit.training.metrics_log import TrainingLog
from esm2kit.training.parallel import clip_grad_norm, data_parallel_group, gradient_sync, parameter_groups, shard_model
from esm2kit.training.precision import gather_dtype, precision_context
from esm2kit.training.resume import (
    CheckpointWriter,
    ResumePoint,
    collect_state,
    restore_optimizer,
    set_start_step,
    stop_after_update,
)
from esm2kit.training.trainer import make_trainer

logger = logging.getLogger(__name__)


class TrainingLoop(LightningModule, ABC):
    """A model under Lightning, updated once a training item; a stage fills in loss, rates and validation.

    A micro-batch has `tokens_N`, `num_tokens` and `label_weight`, what its summed loss is divided by.

    Args:
        config: the run, with lr, weight_decay, max_steps and val_check_interval decided.
        model: whole, the same on every rank: an ESM2, or a module with one as its `esm2`.
        resumed: the checkpoint to continue from.
    """

    def __init__(self, config: TrainingConfig, model: nn.Module, resumed: ResumePoint | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters(to_json(config))  # Lightning hands them to its loggers
        self.config, self.model = config, model
        self.step = resumed.step if resumed else 0
        self.optimizer_state = resumed.optimizer if resumed else None
        self.stop_requested = False
        # for the callbacks: metrics of the update just made, and of the last validation
        self.last_update: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        self.esm2.activation_checkpointing = config.activation_checkpointing

    @property
    def esm2(self) -> ESM2:
        return self.model if isinstance(self.model, ESM2) else self.model.esm2

    @property
    def finished(self) -> bool:
        """Whether no update is left to make."""
        return self.step >= self.config.max_steps

    # what a stage supplies

    @abstractmethod
    def loss_sum(self, batch: Any) -> Tensor:
        """The loss of a micro-batch, summed over its labels."""

    @abstractmethod
    def training_flops(self, batch: Any) -> float:
        """Floating-point operations that a micro-batch's forward and backward pass take."""

    @abstractmethod
    def sequence_ids(self, batch: Any) -> list[str]:
        """The sequences of a micro-batch, to name them when the loss is not finite."""

    @abstractmethod
    def peak_rates(self) -> dict[float, list[nn.Parameter]]:
        """Peak learning rate -> the parameters that train at it."""

    @abstractmethod
    def learning_rate(self, peak: float) -> float:
        """The rate of the update in hand."""

    @abstractmethod
    def validation_metrics(self) -> dict[str, float]:
        """val_loss and the stage's own metrics, over all ranks' validation batches."""

    @property
    def logged_peak(self) -> float:
        """The peak of the rate in metrics.csv."""
        return self.config.lr

    def unsharded_parameters(self) -> list[nn.Parameter]:
        """Trained parameters outside the ESM-2, which FSDP2 leaves whole on every rank."""
        return []

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, shards as they are."""
        return collect_state(self.model, self.optimizers(use_pl_optimizer=False))

    def checkpoint_details(self) -> dict[str, Any]:
        """What a checkpoint's metadata holds besides model, step and provenance."""
        return {}

    # the loop

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard_model(self.esm2, self.device_mesh, gather_dtype(self.config.precision))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config, groups = self.config, []
        for peak, parameters in self.peak_rates().items():
            groups += [{"params": group, "lr": peak, "peak": peak} for group in parameter_groups(parameters)]
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)
        if self.optimizer_state:
            restore_optimizer(self.model, optimizer, self.optimizer_state)
            self.optimizer_state = None
        return optimizer

    def training_step(self, batches: list[Any], batch_idx: int) -> None:
        strategy, optimizer = self.trainer.strategy, self.optimizers()
        group, ranks = data_parallel_group(strategy), self.config.layout.data_parallel_size
        # before the update: the global batch's label weight, tokens and work; and whether any rank was told to stop
        weight = sum(batch.label_weight for batch in batches)
        tokens = sum(len(batch.tokens_N) for batch in batches)
        flops = sum(map(self.training_flops, batches))
        counts = torch.tensor([weight, tokens, flops], dtype=torch.float64, device=self.device)
        weight, tokens, flops = sum_over_group(group, counts).tolist()
        weight = max(weight, 1e-12)  # a batch without any label has the loss 0
        stop = is_set_on_any_rank(self.stop_requested, self.device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for position, batch in enumerate(batches):
            last = position == len(batches) - 1
            with gradient_sync(strategy, self.esm2, last), precision_context(self.esm2, self.config.precision):
                loss = self.loss_sum(batch)
                # ranks' gradients are averaged: times their number, the average is the sum over the global batch
                self.manual_backward(loss * (ranks / weight))
            loss_sum += loss.detach()
        if isinstance(strategy, ModelParallelStrategy):
            for parameter in self.unsharded_parameters():
                parameter.grad = sum_over_group(group, parameter.grad) / ranks
        norm = float(clip_grad_norm(self.model.parameters(), self.config.gradient_clip_val))
        mean_loss = sum_over_group(group, loss_sum).item() / weight
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise self._divergence_error(batches, mean_loss, norm)
        for parameters in optimizer.param_groups:
            parameters["lr"] = self.learning_rate(parameters["peak"])
        lr = self.learning_rate(self.logged_peak)
        optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        self.last_update = {"train_loss": mean_loss, "lr": lr, "grad_norm": norm, "tokens": tokens, "flops": flops}
        if stop:
            stop_after_update(self.trainer, self.step)

    def _divergence_error(self, batches: list[Any], loss: float, norm: float) -> InputError:
        """Names the update and the global batch's sequences."""
        ids = list(dict.fromkeys(gather_strings([name for batch in batches for name in self.sequence_ids(batch)])))
        return InputError(
            f"update {self.step + 1}: loss {loss}, gradient norm {norm}; weights are as after update {self.step}. "
            f"Its sequences: {', '.join(ids)}. A lower lr or longer warm-up is the usual remedy",
            code="run.diverged",
            update=self.step + 1,
            sequences=ids,
        )

    def on_validation_epoch_end(self) -> None:
        self.last_validation = self.validation_metrics()
        loss = self.last_validation["val_loss"]
        if not math.isfinite(loss):  # before the weights that gave it take the place of the last good ones
            raise InputError(
                f"update {self.step}: validation loss {loss}; a lower lr is the usual remedy",
                code="run.validation-loss",
                update=self.step,
            )


class TrainingRun(NamedTuple):
    """What a run leaves: its checkpoints, its metrics.csv, and whether this is the rank that reports."""

    writer: CheckpointWriter
    metrics: Path
    is_first_rank: bool


def fit(
    module: TrainingLoop,
    data: LightningDataModule,
    manifest: dict[str, Any],
    metrics: tuple[str, ...],
    unigram_perplexity: float | None = None,
) -> TrainingRun:
    """Train from the module's update to its end, with checkpoints, metrics.csv and a log.

    Args:
        module: the stage's, as it begins or as its last checkpoint has it.
        data: its batches, beginning with the module's next update.
        manifest: the run's provenance, which every checkpoint carries.
        metrics: names that a validation gives, columns of metrics.csv.
        unigram_perplexity: logged with each validation.
    Raises:
        InputError: devices or a logger that are not there, a checkpoint that cannot be written, a loss that is not
            finite.
    """
    config, first_step = module.config, module.step
    log = TrainingLog(config.out_dir, config.log_every_n_steps, unigram_perplexity, first_step, metrics)
    writer = CheckpointWriter(config.out_dir, config.save_top_k, manifest, config.layout.global_batch_size)
    trainer = make_trainer(config, [log, writer])
    if module.finished:
        logger.info("nothing to train: the run ended at update %d of %d", first_step, config.max_steps)
    else:
        if first_step:
            logger.info("resuming from %s at update %d of %d", writer.last, first_step, config.max_steps)
        set_start_step(trainer, first_step)
        trainer.fit(module, data)
    return TrainingRun(writer, log.path, trainer.is_global_zero)
