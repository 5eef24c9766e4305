"""Masked-language-model pretraining: the configuration, the Lightning module, and `pretrain`.

One update is one item of the training set: its micro-batches are run one after the other, each loss divided by the
masked tokens of the *global* batch, so gradients and curves do not know how many devices or micro-batches there were.
"""

import logging
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from esm2kit.checkpoint import fill, read_metadata
from esm2kit.data import Masking, MicroBatch, PretrainingData, fingerprint, unigram_perplexity
from esm2kit.errors import InputError
from esm2kit.model import ESM2, SIZES, ESM2Config, Packed
from esm2kit.parallel import (
    BatchLayout,
    StrategyName,
    any_rank,
    clip_grad_norm,
    data_parallel_group,
    gathered,
    gradient_sync,
    make_strategy,
    parameter_groups,
    shard_model,
    sum_over,
)
from esm2kit.provenance import provenance, write_json
from esm2kit.training_log import TrainingLog
from esm2kit.training_state import (
    CheckpointWriter,
    alone_in,
    continue_at,
    end_after_this_update,
    restore,
    resume_point,
)
from esm2kit.weights import load_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain an ESM-2 on a preprocessed folder; optimizer, schedule and masks default to the published recipe.

    Args:
        data: folder that `esm2kit preprocess` made.
        out_dir: checkpoints, metrics.csv and logs go here.
        model: a published size such as esm2_t12_35M_UR50D, or `custom` with the three fields below; by default the size
            of init_from, or else esm2_t6_8M_UR50D.
        num_layers: layers of a custom model.
        embed_dim: width of a custom model.
        attention_heads: heads of a custom model.
        init_from: begin from these weights (official name or path) instead of random ones: second-stage pretraining.
        seed: decides initial weights, order, cluster members, crops and masks.
        max_steps: updates in all.
        devices: devices of one node.
        num_nodes: nodes.
        tensor_model_parallel_size: devices that share one model's matrices.
        strategy: ddp, fsdp2, or auto (ddp where there is more than one data-parallel rank).
        micro_batch_size: sequences one device holds at a time.
        accumulate_grad_batches: micro-batches a device works through for one update.
        global_batch_size: sequences of one update = micro_batch_size x accumulate_grad_batches x data-parallel ranks;
            yours to give: the published updates of 2M tokens hold about 6,000 of UniRef's sequences.
        max_tokens: crop longer sequences to a window of so many tokens, BOS and EOS included.
        lr: peak learning rate; by default 4e-4, and 1.6e-4 for the 15B size.
        warmup_steps: updates of linear warm-up.
        decay_share: share of max_steps at whose end the linear decay has come down to min_lr_share; flat from there.
        min_lr_share: final learning rate as a share of the peak.
        weight_decay: decoupled weight decay; by default 0.01, and 0.1 for the 15B size.
        beta1: AdamW's decay of the gradient average.
        beta2: AdamW's decay of the squared-gradient average.
        eps: AdamW's epsilon.
        gradient_clip_val: largest total gradient norm; 0 leaves gradients as they are.
        mask_prob: share of residues to predict.
        precision: 32-true, or bf16-mixed (bf16 arithmetic on fp32 weights).
        accelerator: cpu, cuda, or auto.
        compile: compile the layers with torch.compile.
        activation_checkpointing: recompute layers in the backward pass; less memory, about a third more time.
        val_check_interval: updates between validations.
        validation_masking: hidden puts <mask> on every residue that is scored; bert leaves a tenth of them readable and
            swaps a tenth, as in training and in published perplexities. A model that copies what it can read and knows
            only frequencies scores well below the unigram floor under bert, and at it under hidden.
        tokens_per_validation_batch: token budget of a validation batch.
        save_top_k: checkpoints to keep by lowest val_loss, the last one aside.
        log_every_n_steps: updates between rows of metrics.csv.
        num_workers: processes that prepare batches.
        resume_if_exists: go on from the last checkpoint in out_dir where there is one.
        tensorboard: also write TensorBoard event files.
    """

    data: Path
    out_dir: Path
    model: str | None = None
    num_layers: int | None = None
    embed_dim: int | None = None
    attention_heads: int | None = None
    init_from: str | None = None
    seed: int = 0
    max_steps: int = 500_000
    devices: int = 1
    num_nodes: int = 1
    tensor_model_parallel_size: int = 1
    strategy: StrategyName = "auto"
    micro_batch_size: int | None = None
    accumulate_grad_batches: int | None = None
    global_batch_size: int | None = None
    max_tokens: int = 1024
    lr: float | None = None
    warmup_steps: int = 2000
    decay_share: float = 0.9
    min_lr_share: float = 0.1
    weight_decay: float | None = None
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    gradient_clip_val: float = 1.0
    mask_prob: float = 0.15
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    val_check_interval: int = 1000
    validation_masking: Literal["hidden", "bert"] = "hidden"
    tokens_per_validation_batch: int = 4096
    save_top_k: int = 1
    log_every_n_steps: int = 10
    num_workers: int = 0
    resume_if_exists: bool = True
    tensorboard: bool = False

    @property
    def layout(self) -> BatchLayout:
        return BatchLayout.of(**{field.name: getattr(self, field.name) for field in LAYOUT_FIELDS})

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else 1.6e-4 if self.model == "esm2_t48_15B_UR50D" else 4e-4

    @property
    def model_config(self) -> ESM2Config:
        """The shape asked for. Raises: InputError for a name that is no published size, or a custom shape left open."""
        custom = (self.num_layers, self.embed_dim, self.attention_heads)
        if self.model == "custom":
            if None in custom:
                raise InputError("model custom wants num_layers, embed_dim and attention_heads")
            return ESM2Config(*custom)
        if custom != (None, None, None):
            raise InputError("num_layers, embed_dim and attention_heads want --model custom")
        name = self.model or "esm2_t6_8M_UR50D"
        if name not in SIZES:
            raise InputError(f"model {name!r} is unknown; choose custom or one of {', '.join(SIZES)}")
        return SIZES[name]


# share of scored residues that read <mask>, and share that read another residue
VALIDATION_SHARES = {"hidden": (1.0, 0.0), "bert": (0.8, 0.1)}
LAYOUT_FIELDS = [field for field in fields(PretrainConfig) if field.name in BatchLayout.of.__annotations__]


def lr_at(step: int, config: PretrainConfig) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, linear decay, flat.

    Source: Lin et al. 2023, supplement A.2.4.
    """
    warmup, end = config.warmup_steps, config.decay_share * config.max_steps
    if step < warmup:
        return config.peak_lr * (step + 1) / warmup
    decayed = min(1.0, (step + 1 - warmup) / max(1.0, end - warmup))
    return config.peak_lr * (1 - (1 - config.min_lr_share) * decayed)


class MaskedLM(LightningModule):
    """ESM-2 under Lightning, updating once a training item.

    Args:
        config: the run.
        esm2: the model, whole, the same on every rank.
        first_step: updates done before.
        optimizer_state: what the optimizer held then.
    """

    def __init__(
        self, config: PretrainConfig, esm2: ESM2, first_step: int = 0, optimizer_state: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.esm2, self.step = config, esm2, first_step
        self.optimizer_state = optimizer_state
        self.stop_requested = False
        # what the callbacks read: figures of the update just made, and of the last validation
        self.update: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.validation_sums = torch.zeros(2, dtype=torch.float64)
        esm2.activation_checkpointing = config.activation_checkpointing
        esm2.contact_head.requires_grad_(False)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard_model(self.esm2, self.device_mesh, torch.bfloat16 if self.config.precision == "bf16-mixed" else None)
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
        packed = Packed(batch.num_tokens, self.device)
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
            with gradient_sync(strategy, self.esm2, enabled=position == len(batches) - 1):
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
        sums[0] = self.masked_loss_sum(batch).double()
        self.validation_sums += sums

    def on_validation_epoch_end(self) -> None:
        sums = sum_over(data_parallel_group(self.trainer.strategy), self.validation_sums.to(self.device))
        self.validation_sums = torch.zeros(2, dtype=torch.float64)
        val_loss = (sums[0] / sums[1].clamp(min=1)).item()
        self.validation = {"val_loss": val_loss, "val_perplexity": math.exp(val_loss)}


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train, resuming where out_dir holds a checkpoint of the same run.

    Args:
        config: the run; every rank is given the same.
    Returns: {"best": path, "last": path, "metrics": path, "val_loss", "val_perplexity", "unigram_perplexity", "step"},
        also in `<out_dir>/pretrain.json`; ranks other than the first return {}.
    Raises: InputError for a folder, size, layout or checkpoint that does not fit, and for a loss that is no number,
        naming the update and the sequences.
    """
    with alone_in(Path(config.out_dir)):
        return _pretrain(config)


def _pretrain(config: PretrainConfig) -> dict[str, Any]:
    layout, out_dir = config.layout, Path(config.out_dir)
    floor = unigram_perplexity(Path(config.data))
    manifest = provenance("pretrain", config, {"data": fingerprint(Path(config.data))})
    resumed = resume_point(out_dir, config, manifest) if config.resume_if_exists else None
    first_step = resumed.step if resumed else 0
    esm2 = _initial_model(config)
    if resumed:
        fill(esm2, resumed.model, resumed.path)
        logger.info("resuming from %s at update %d of %d", resumed.path, first_step, config.max_steps)
    accelerator = config.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
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
    module = MaskedLM(config, esm2, first_step, resumed.optimizer if resumed else None)
    log = TrainingLog(out_dir, config.log_every_n_steps, floor, first_step)
    writer = CheckpointWriter(out_dir, config.save_top_k, manifest, layout.global_batch_size)
    trainer = Trainer(
        accelerator=accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=make_strategy(config.strategy, layout, accelerator),
        precision=config.precision,
        max_epochs=1,
        val_check_interval=min(config.val_check_interval, config.max_steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(out_dir, name="tensorboard", version="") if config.tensorboard else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[log, writer],
        default_root_dir=out_dir,
    )
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
    write_json(out_dir / "pretrain.json", result | {"provenance": manifest})
    return result


def _initial_model(config: PretrainConfig) -> ESM2:
    if config.init_from is None:
        return ESM2.initialised(config.model_config, config.seed)
    esm2, _ = load_model(config.init_from)
    if config.model is not None and esm2.config != config.model_config:
        raise InputError(
            f"init_from {config.init_from} is {esm2.config}, model {config.model} is {config.model_config}"
        )
    return esm2.train()
