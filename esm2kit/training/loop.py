"""The training loop that all training stages share.

Each item of the training set holds this rank's micro-batches for one update. Each summed loss is divided by the label
weight of the *global* batch (its number of masked tokens or labels), so gradients and loss curves do not depend on the
number of devices or micro-batches.
"""

import logging
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from esm2kit.core.errors import InputError
from esm2kit.core.files import to_json
from esm2kit.core.hardware import explain_out_of_memory
from esm2kit.core.process_group import gather_strings, is_set_on_any_rank, maximum_over_ranks, sum_over_group
from esm2kit.models.compiled import explain_compiler_errors
from esm2kit.models.esm2 import ESM2
from esm2kit.models.packing import activate_flash_attention_4
from esm2kit.training.compilation import compile_layers
from esm2kit.training.config import TrainingConfig
from esm2kit.training.memory import MemoryPlan, TrainingData
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
from esm2kit.training.updates import HostCopy, Update, send_to_device, sum_dtype

logger = logging.getLogger(__name__)


class TrainingLoop(LightningModule, ABC):
    """A LightningModule that makes one update per training item; each stage adds its loss, rates and validation.

    A micro-batch has the attributes `tokens_N`, `num_tokens` and `label_weight`. The summed loss of a global batch is
    divided by its total label weight.

    Args:
        config: The run, with all defaults resolved, including those of `resolve_hardware`.
        model: The full model, identical on all ranks: an ESM2, or a module with an ESM2 as its attribute `esm2`.
        resumed: The checkpoint to continue from.
    """

    def __init__(self, config: TrainingConfig, model: nn.Module, resumed: ResumePoint | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters(to_json(config))  # Lightning passes them to its loggers
        self.config, self.model = config, model
        self.step = resumed.step if resumed else 0
        self.optimizer_state = resumed.optimizer if resumed else None
        self.stop_requested = False
        self.update: Update | None = None  # the last one
        self.totals: Tensor | None = None  # (2,) tokens and FLOP of all ranks since the process started
        # read by the callbacks
        self.last_validation: dict[str, float] = {}
        self.memory_plan: MemoryPlan | None = None
        # of auto, the memory plan decides when the device is known
        self.esm2.activation_checkpointing = config.activation_checkpointing is True

    @property
    def esm2(self) -> ESM2:
        """The ESM-2 inside the model."""
        return self.model if isinstance(self.model, ESM2) else self.model.esm2

    @property
    def finished(self) -> bool:
        """Whether all updates have been made."""
        return self.step >= self.config.max_steps

    # Each stage implements these methods.

    @abstractmethod
    def loss_sum(self, batch: Any) -> Tensor:
        """Compute the loss of a micro-batch, summed over its labels."""

    @abstractmethod
    def training_flops(self, batch: Any) -> float:
        """Count the floating-point operations in a micro-batch's forward and backward pass."""

    @abstractmethod
    def sequence_ids(self, batch: Any) -> list[str]:
        """List the ids of a micro-batch's sequences, for the error message about a loss that is not finite."""

    @abstractmethod
    def peak_rates(self) -> dict[float, list[nn.Parameter]]:
        """Map each peak learning rate to the parameters that use it."""

    @abstractmethod
    def learning_rate(self, peak: float) -> float:
        """Compute the learning rate of the current update from its peak."""

    @abstractmethod
    def validation_metrics(self) -> dict[str, float]:
        """Compute val_loss and the stage's own metrics over the validation batches of all ranks."""

    @property
    def logged_peak(self) -> float:
        """The peak of the learning rate that metrics.csv reports."""
        return self.config.lr

    def unsharded_parameters(self) -> list[nn.Parameter]:
        """List the trained parameters outside the ESM-2, which FSDP2 does not shard."""
        return []

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Collect the tensors of a checkpoint; sharded tensors stay sharded."""
        return collect_state(self.model, self.optimizers(use_pl_optimizer=False))

    def checkpoint_details(self) -> dict[str, Any]:
        """Return the checkpoint metadata in addition to model, step and provenance."""
        return {}

    # Lightning calls these methods.

    def configure_model(self) -> None:
        """Shard the ESM-2 over the device mesh, if there is one, and compile its layers, as configured."""
        self._check_ranks_agree()
        if self.device_mesh is not None:
            shard_model(self.esm2, self.device_mesh, gather_dtype(self.config.precision))
        device = self.trainer.strategy.root_device
        if device.type == "cuda":
            activate_flash_attention_4()
        if self.config.compile:
            compile_layers(self.esm2, self.config.precision, device)

    def _check_ranks_agree(self) -> None:
        """Check that all ranks have the same settings, because defaults depend on the hardware of a node.

        With others, the ranks would divide a batch in different ways, or wait for each other forever.

        Raises:
            InputError: A setting differs.
        """
        for name in ("precision", "compile", "micro_batch_tokens"):
            found = list(dict.fromkeys(gather_strings([str(getattr(self.config, name))])))
            if len(found) > 1:
                raise InputError(
                    f"ranks have different values of {name} ({', '.join(found)}), because their devices differ. Pass "
                    f"--{name} on all nodes.",
                    code="layout.ranks-differ",
                    name=name,
                    found=found,
                )

    def on_fit_start(self) -> None:
        """Choose activation checkpointing, for all ranks alike; the device's memory is known and the model is on it."""
        if self.memory_plan is not None:
            recomputes = self.memory_plan.choose_checkpointing(self.device)
            self.esm2.activation_checkpointing = is_set_on_any_rank(recomputes, self.device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build AdamW, and restore its state when the run resumes."""
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
        """Make one update from this rank's micro-batches.

        No line reads a number of the device, so that the device receives the next update while it works on this one.
        """
        strategy, optimizer = self.trainer.strategy, self.optimizers()
        group, ranks = data_parallel_group(strategy), self.config.layout.data_parallel_size
        counts, stop = self._count(batches, group)
        # gradients are averaged over ranks; multiplied by the number of ranks, the average is the sum
        weight = counts[0].clamp(min=1e-12)  # a batch without labels has a loss of 0
        scale = (ranks / weight).float()
        loss_sum = torch.zeros((), dtype=counts.dtype, device=self.device)
        with precision_context(self.esm2, self.config.precision):
            for position, batch in enumerate(batches):
                with gradient_sync(strategy, self.esm2, position == len(batches) - 1):
                    loss = self.loss_sum(batch)
                    self.manual_backward(loss * scale)
                loss_sum += loss.detach()
        if isinstance(strategy, ModelParallelStrategy):
            for parameter in self.unsharded_parameters():
                parameter.grad = sum_over_group(group, parameter.grad) / ranks
        norm = clip_grad_norm(self.model.parameters(), self.config.gradient_clip_val)
        mean_loss = sum_over_group(group, loss_sum) / weight
        for parameters in optimizer.param_groups:
            parameters["lr"] = self.learning_rate(parameters["peak"])
        lr = self.learning_rate(self.logged_peak)
        optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        self.totals = counts[1:] if self.totals is None else self.totals + counts[1:]
        numbers = torch.cat([torch.stack([mean_loss, norm.to(counts.dtype), stop, counts[1]]), self.totals])
        self._finish_update(Update(self.step, batches, lr, HostCopy(numbers)))

    def _count(self, batches: list[Any], group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """Sum label weight, tokens and FLOP over the ranks, (3,), and check whether any rank must stop, ()."""
        weight = sum(batch.label_weight for batch in batches)
        tokens = sum(len(batch.tokens_N) for batch in batches)
        flops = sum(map(self.training_flops, batches))
        sent = send_to_device([weight, tokens, flops, self.stop_requested], sum_dtype(self.device), self.device)
        counts, stop = sent[:3].clone(), sent[3].clone()
        return sum_over_group(group, counts), maximum_over_ranks(stop)

    def _finish_update(self, update: Update) -> None:
        """Check the update before this one, and this one too if a row of the log, a checkpoint or the end follows.

        Raises:
            InputError: The loss or the gradient norm of a checked update is not finite.
        """
        previous, self.update = self.update, update
        # on one device the signal is known without reading a number
        stop = self.stop_requested if self.trainer.world_size == 1 else previous is not None and previous.stops_the_run
        checked = [previous] if previous else []
        intervals = (self.config.log_every_n_steps, int(self.trainer.val_check_interval))
        if stop or self.finished or self.step == 1 or any(self.step % interval == 0 for interval in intervals):
            checked.append(update)
        for each in checked:
            if not each.is_finite:
                raise self._divergence_error(each)
        if stop:
            stop_after_update(self.trainer, self.step)

    @property
    def last_update(self) -> dict[str, float]:
        """Metrics of the last update; reading them waits for the device."""
        return self.update.metrics

    def _divergence_error(self, update: Update) -> InputError:
        """Build the error that lists the update and the sequences of its global batch."""
        names = [name for batch in update.batches for name in self.sequence_ids(batch)]
        ids, metrics = list(dict.fromkeys(gather_strings(names))), update.metrics
        return InputError(
            f"update {update.step}: the loss is {metrics['train_loss']} and the gradient norm is "
            f"{metrics['grad_norm']}; no weights of this update were saved. Lower lr or increase warmup_steps. "
            f"Sequences of the update: {', '.join(ids)}.",
            code="run.diverged",
            update=update.step,
            sequences=ids,
        )

    def on_validation_epoch_end(self) -> None:
        """Compute the validation metrics and check that val_loss is finite."""
        self.last_validation = self.validation_metrics()
        loss = self.last_validation["val_loss"]
        if not math.isfinite(loss):  # raised before the checkpoint with the last good weights is overwritten
            raise InputError(
                f"update {self.step}: the validation loss is {loss}. Lower lr.",
                code="run.validation-loss",
                update=self.step,
            )


class TrainingRun(NamedTuple):
    """A finished run.

    Args:
        writer: The checkpoint writer, with the paths of the best and last checkpoints.
        metrics: The path of metrics.csv.
        is_first_rank: Whether this process is the first rank, which writes the results.
    """

    writer: CheckpointWriter
    metrics: Path
    is_first_rank: bool


def fit(
    module: TrainingLoop,
    data: TrainingData,
    manifest: dict[str, Any],
    metrics: tuple[str, ...],
    unigram_perplexity: float | None = None,
) -> TrainingRun:
    """Train from the module's current update to max_steps, and write checkpoints, metrics.csv and a log.

    Args:
        module: The stage's module, new or restored from a checkpoint.
        data: The batches, starting with the module's next update.
        manifest: The provenance of the run, stored in each checkpoint.
        metrics: Names of the validation metrics, which are columns of metrics.csv.
        unigram_perplexity: Perplexity of the unigram baseline, logged with each validation.

    Returns:
        The finished run.

    Raises:
        InputError: Devices or the logger's package are missing, a checkpoint cannot be written, a loss is not finite,
            the memory is exhausted, or compiled layers fail.
        KeyboardInterrupt: The user interrupted the run before its first update, or for the second time.
        SystemExit: Lightning ended the process.
    """
    config, first_step = module.config, module.step
    log = TrainingLog(config.out_dir, config.log_every_n_steps, unigram_perplexity, first_step, metrics)
    writer = CheckpointWriter(config.out_dir, config.save_top_k, manifest, config.layout.global_batch_size)
    trainer = make_trainer(config, [log, writer])
    if module.finished:
        logger.info("nothing to train: the run finished at update %d of %d", first_step, config.max_steps)
    else:
        if first_step:
            logger.info("resuming from %s at update %d of %d", writer.last, first_step, config.max_steps)
        set_start_step(trainer, first_step)
        plan = module.memory_plan = MemoryPlan.of(config, module.esm2.config, data)
        try:
            with explain_compiler_errors(), explain_out_of_memory(plan.action, plan.list_remedies):
                trainer.fit(module, data)
        except SystemExit as error:  # Lightning exits with code 1 after an interrupt
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
    return TrainingRun(writer, log.path, trainer.is_global_zero)
