"""Masked-language-model pretraining: the Lightning module, and `pretrain`.

One update is one item of the training set: its micro-batches are run one after the other, each loss divided by the
masked tokens of the *global* batch, so gradients and curves do not know how many devices or micro-batches there were.
"""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.core.files import to_json, write_json
from esm2kit.core.process_group import any_rank, gathered, sum_over
from esm2kit.core.provenance import provenance
from esm2kit.models.checkpoint import read_metadata
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.models.initialise import drawn, materialise, without_weights
from esm2kit.models.load import load_model
from esm2kit.pretraining.config import PretrainConfig, lr_at
from esm2kit.pretraining.data import Masking, MicroBatch, PretrainingData, fingerprint
from esm2kit.pretraining.downstream import DownstreamProbe
from esm2kit.pretraining.unigram import unigram_perplexity
from esm2kit.tasks.data import TaskData, load_task
from esm2kit.training.layout import is_sharded
from esm2kit.training.metrics_log import TrainingLog
from esm2kit.training.parallel import (
    clip_grad_norm,
    data_parallel_group,
    data_parallel_rank,
    gradient_sync,
    parameter_groups,
    shard_model,
)
from esm2kit.training.precision import computing, gathered_dtype
from esm2kit.training.resume import (
    CheckpointWriter,
    ResumePoint,
    alone_in,
    continue_at,
    end_after_this_update,
    restore,
    resume_point,
)
from esm2kit.training.trainer import make_trainer

logger = logging.getLogger(__name__)

__all__ = ["PretrainConfig", "lr_at", "pretrain"]

# share of scored residues that read <mask>, and share that read another residue
VALIDATION_SHARES = {"hidden": (1.0, 0.0), "bert": (0.8, 0.1)}


class MaskedLM(LightningModule):
    """ESM-2 under Lightning, updating once a training item.

    Args:
        config: the run.
        esm2: the model, whole, the same on every rank; on the meta device where `weights` follow.
        first_step: updates done before.
        optimizer_state: what the optimizer held then.
        downstream: what to probe at validations, if anything.
        weights: whole tensors by name, to fill the model with once it is laid out over the devices.
    """

    def __init__(
        self,
        config: PretrainConfig,
        esm2: ESM2,
        first_step: int = 0,
        optimizer_state: dict[str, Tensor] | None = None,
        downstream: DownstreamProbe | None = None,
        weights: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters(to_json(config))  # which Lightning tells its loggers
        self.config, self.esm2, self.step = config, esm2, first_step
        self.optimizer_state, self.downstream, self.weights = optimizer_state, downstream, weights
        self.stop_requested = False
        # what the callbacks read: figures of the update just made, and of the last validation
        self.update: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.validation_sums = torch.zeros(2, dtype=torch.float64)
        esm2.activation_checkpointing = config.activation_checkpointing
        esm2.contact_head.requires_grad_(False)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard_model(self.esm2, self.device_mesh, gathered_dtype(self.config.precision))
        if self.weights is not None:
            materialise(self.esm2, self.weights, self.trainer.strategy.root_device)
            self.weights = None
        if self.config.compile:
            for layer in self.esm2.layers:
                layer.compile(dynamic=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.config
        decay = config.weight_decay
        if decay is None:
            decay = 0.1 if config.model == "esm2_t48_15B_UR50D" else 0.01
        groups = [{"params": group} for group in parameter_groups(self.esm2.parameters())]
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.peak_lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=decay,
            fused=True,
        )
        if self.optimizer_state:
            restore(self.esm2, optimizer, self.optimizer_state)
            self.optimizer_state = None
        return optimizer

    def masked_loss_sum(self, batch: MicroBatch) -> Tensor:
        """Cross-entropy summed over a micro-batch's masked tokens, in float32."""
        packed = Packed(batch.num_tokens, self.device, recurring=True)
        logits_MV = self.esm2.masked_logits(batch.tokens_N, packed, batch.rows_M)
        return F.cross_entropy(logits_MV.float(), batch.targets_M, reduction="sum")

    def training_step(self, batches: list[MicroBatch], batch_idx: int) -> None:
        strategy, optimizer = self.trainer.strategy, self.optimizers()
        group = data_parallel_group(strategy)
        # before the update: the global batch's masked tokens, all its tokens, its work; and was any rank told to stop
        masked = sum(len(batch.targets_M) for batch in batches)
        tokens = sum(len(batch.tokens_N) for batch in batches)
        flops = 3 * sum(self.esm2.config.forward_flops(batch.num_tokens, len(batch.targets_M)) for batch in batches)
        counts = torch.tensor([masked, tokens, flops], dtype=torch.float64, device=self.device)
        masked, tokens, flops = sum_over(group, counts).tolist()
        stop = any_rank(self.stop_requested, self.device)
        data_parallel_size = self.config.layout.data_parallel_size
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for position, batch in enumerate(batches):
            last = position == len(batches) - 1
            with gradient_sync(strategy, self.esm2, last), computing(self.esm2, self.config.precision):
                loss = self.masked_loss_sum(batch)
                # ranks' gradients are averaged: times their number, the average is the sum over the global batch
                self.manual_backward(loss * (data_parallel_size / max(masked, 1.0)))
            loss_sum += loss.detach()
        norm = clip_grad_norm(self.esm2.parameters(), self.config.gradient_clip_val)
        mean_loss = sum_over(group, loss_sum).item() / max(masked, 1.0)
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise InputError(self.blame(batches, mean_loss, float(norm)))
        lr = lr_at(self.step, self.config)
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        self.update = {"train_loss": mean_loss, "lr": lr, "grad_norm": float(norm), "tokens": tokens, "flops": flops}
        if stop:
            end_after_this_update(self.trainer, self.step)

    def blame(self, batches: list[MicroBatch], loss: float, norm: float) -> str:
        """One line for a loss or gradient that is no number: the update, and the global batch's sequences."""
        store = self.trainer.datamodule.train_store
        ids = gathered([store.id(row) for batch in batches for row in batch.store_rows])
        return (
            f"update {self.step + 1}: loss {loss}, gradient norm {norm}; weights are as after update {self.step}. "
            f"Its sequences: {', '.join(dict.fromkeys(ids))}. A lower lr or longer warm-up is the usual remedy"
        )

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        sums = torch.tensor([0.0, len(batch.targets_M)], dtype=torch.float64)
        with computing(self.esm2, self.config.precision):
            sums[0] = self.masked_loss_sum(batch).double()
        self.validation_sums += sums

    def on_validation_epoch_end(self) -> None:
        sums = sum_over(data_parallel_group(self.trainer.strategy), self.validation_sums.to(self.device))
        self.validation_sums = torch.zeros(2, dtype=torch.float64)
        val_loss = (sums[0] / sums[1].clamp(min=1)).item()
        if not math.isfinite(val_loss):  # before the weights that gave it take the place of the last good ones
            raise InputError(f"update {self.step}: validation loss {val_loss}; a lower lr is the usual remedy")
        perplexity = math.exp(min(val_loss, 700.0))  # e^709 is the largest number there is
        self.validation = {"val_loss": val_loss, "val_perplexity": perplexity}
        validations = self.step // int(self.trainer.val_check_interval)
        if self.downstream is not None and validations % self.config.downstream_every == 0:
            strategy = self.trainer.strategy
            self.validation |= self.downstream.figures(
                self.final_rows,
                self.device,
                data_parallel_group(strategy),
                *data_parallel_rank(strategy),
                self.trainer.is_global_zero,
            )

    def final_rows(self, tokens_N: Tensor, num_tokens: list[int]) -> Tensor:
        """(N, D) of packed sequences, by the model as it is, computed as validation computes."""
        with self.trainer.precision_plugin.forward_context(), computing(self.esm2, self.config.precision):
            return self.esm2.encode(tokens_N, Packed(num_tokens, self.device, recurring=True))


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train, resuming where out_dir holds a checkpoint of the same run.

    Args:
        config: the run; every rank is given the same.
    Returns: {"best": path, "last": path, "metrics": path, "val_loss", "val_perplexity", "unigram_perplexity", "step"},
        also in `<out_dir>/pretrain.json`, beside the model's shape; ranks other than the first return {}.
    Raises: InputError for a folder, size, layout or checkpoint that does not fit, and for a loss that is no number,
        naming the update and the sequences.
    """
    with alone_in(Path(config.out_dir)):
        return _pretrain(config)


def _pretrain(config: PretrainConfig) -> dict[str, Any]:
    layout, out_dir = config.layout, Path(config.out_dir)
    floor = unigram_perplexity(Path(config.data))
    task = _downstream_task(config)
    manifest = provenance("pretrain", config, {"data": fingerprint(Path(config.data))})
    resumed = resume_point(out_dir, config, manifest) if config.resume_if_exists else None
    first_step = resumed.step if resumed else 0
    esm2, weights = _initial_model(config, resumed)
    if resumed:
        logger.info("resuming from %s at update %d of %d", resumed.path, first_step, config.max_steps)
    data = PretrainingData(
        Path(config.data),
        layout,
        config.seed,
        config.max_steps,
        first_step,
        config.max_tokens - 2,
        config.tokens_per_validation_batch,
        config.num_workers,
        Masking(config.mask_prob),
        Masking(config.mask_prob, *VALIDATION_SHARES[config.validation_masking]),
    )
    downstream, figures = None, ("val_loss", "val_perplexity")
    if task is not None:
        widths = esm2.config.embed_dim, config.max_tokens - 2, config.tokens_per_validation_batch
        downstream = DownstreamProbe(task, out_dir / "downstream", *widths)
        figures += (f"downstream_{task.task.metric}", "downstream_peak_gib")
    module = MaskedLM(config, esm2, first_step, resumed.optimizer if resumed else None, downstream, weights)
    log = TrainingLog(out_dir, config.log_every_n_steps, floor, first_step, figures)
    writer = CheckpointWriter(out_dir, config.save_top_k, manifest, layout.global_batch_size)
    trainer = make_trainer(config, [log, writer])
    logger.info(
        "ESM-2 of %d layers x %d, %.2fM parameters; %s; unigram floor perplexity %.2f",
        esm2.config.num_layers,
        esm2.config.embed_dim,
        esm2.config.num_parameters / 1e6,
        layout.equation,
        floor,
    )
    if first_step < config.max_steps:
        continue_at(trainer, first_step)
        trainer.fit(module, data)
    else:
        logger.info("nothing to do: %d of %d updates are made already", first_step, config.max_steps)
    if not trainer.is_global_zero:
        return {}
    best = writer.best()
    figures = read_metadata(best)
    result = {
        "best": best,
        "last": writer.last,
        "metrics": log.path,
        "unigram_perplexity": floor,
        "step": read_metadata(writer.last)["step"],
        "val_loss": figures.get("val_loss"),
        "val_perplexity": figures.get("val_perplexity"),
    }
    write_json(out_dir / "pretrain.json", result | {"model": esm2.config, "provenance": manifest})
    return result


def _downstream_task(config: PretrainConfig) -> TaskData | None:
    if config.downstream_task is None:
        return None
    data = load_task(config.downstream_task, config.downstream_split, Path(config.downstream_data))
    return data.limited(config.downstream_limit)


def _initial_model(
    config: PretrainConfig, resumed: ResumePoint | None
) -> tuple[ESM2, Iterable[tuple[str, Tensor]] | None]:
    """The model as the run begins or goes on; where ranks hold parts, its shape alone, and the weights to follow."""
    if resumed or config.init_from is None:
        shape = ESM2Config(**resumed.metadata["model"]) if resumed else config.model_config
        esm2, weights = without_weights(shape), resumed.model.items() if resumed else drawn(shape, config.seed)
        if is_sharded(config.strategy, config.layout):
            return esm2, weights
        materialise(esm2, weights, torch.device("cpu"))
        return esm2, None
    loaded, _ = load_model(config.init_from)
    if config.model is not None and loaded.config != config.model_config:
        raise InputError(
            f"init_from {config.init_from} is {loaded.config}, model {config.model} is {config.model_config}"
        )
    if is_sharded(config.strategy, config.layout):
        return without_weights(loaded.config), loaded.state_dict().items()
    return loaded.train(), None
