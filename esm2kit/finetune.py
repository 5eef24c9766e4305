"""Fine-tuning: an ESM-2 and a head trained on labels, under any layout with one loss curve.

As in pretraining one update is one item of the training set; its loss is the mean over the labels of the *global*
batch, so gradients and curves do not know how many devices or micro-batches there were.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from esm2kit.checkpoint import fill, read_checkpoint, read_metadata, write_checkpoint
from esm2kit.errors import InputError
from esm2kit.features import decide
from esm2kit.finetune_config import FinetuneConfig, lr_share, settled
from esm2kit.finetune_data import (
    EvaluationBatch,
    EvaluationBatches,
    FinetuneData,
    LabelledBatch,
    LabelledProteins,
    Labels,
    labels_of,
    task_sha256,
)
from esm2kit.finetune_heads import HeadSpec, LabelModel, check_head, rows_read
from esm2kit.finetune_report import headline, write_finetune_report
from esm2kit.finetuned import FILE, load_finetuned, load_head, task_facts
from esm2kit.flip import Task
from esm2kit.hf_export import save_hf_classifier
from esm2kit.inference import Encoder
from esm2kit.lora import adapters, add_lora, load_adapters, weights_sha256
from esm2kit.model import ESM2
from esm2kit.parallel import (
    clip_grad_norm,
    data_parallel_group,
    gradient_sync,
    make_strategy,
    parameter_groups,
    shard_model,
    sum_over,
)
from esm2kit.provenance import provenance, write_json
from esm2kit.tasks import TaskData, load_task
from esm2kit.training_log import TrainingLog, read_metrics
from esm2kit.training_state import (
    CheckpointWriter,
    ResumePoint,
    alone_in,
    continue_at,
    end_after_this_update,
    restore,
    resume_point,
    whole_state,
)
from esm2kit.weights import load_model

logger = logging.getLogger(__name__)

__all__ = ["FinetuneConfig", "finetune"]


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
            shard_model(self.esm2, self.device_mesh, torch.bfloat16 if self.config.precision == "bf16-mixed" else None)

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
        # one exchange before the update: labels of the global batch, its tokens, was any rank told to stop
        weight = sum(batch.label_weight for batch in batches)
        tokens = sum(len(batch.tokens_N) for batch in batches)
        counts = torch.tensor([weight, tokens, self.stop_requested], dtype=torch.float64, device=self.device)
        weight, tokens, stop = sum_over(group, counts).tolist()
        ranks = self.config.layout.data_parallel_size
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for position, batch in enumerate(batches):
            with gradient_sync(strategy, self.esm2, enabled=position == len(batches) - 1):
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
        self.update = {"train_loss": mean_loss, "lr": rate * share, "grad_norm": float(norm), "tokens": tokens}
        if stop:
            end_after_this_update(self.trainer, self.step)

    def blame(self, batches: list[LabelledBatch], loss: float, norm: float) -> str:
        """One line for a loss or gradient that is no number: the update, and whose sequences this rank held."""
        ids = [self.proteins.data.ids[protein] for batch in batches for protein in batch.proteins]
        return (
            f"update {self.step}: loss {loss}, gradient norm {norm}; weights are as after update {self.step - 1}. "
            f"This rank's sequences: {', '.join(ids)}. A lower lr or longer warm-up is the usual remedy"
        )

    def on_validation_epoch_start(self) -> None:
        self.sums_MC = torch.zeros(self.validation_rows.num_slots, self.model.spec.num_outputs + 1, device=self.device)

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
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
    value = headline(data, set_name, predicted)
    return loss.item() / divisor, {f"val_{data.task.metric}": value if math.isfinite(value) else 0.0}


def freeze(model: LabelModel, config: FinetuneConfig) -> None:
    """Leave gradients to what the mode trains: parts that no label depends on never have any."""
    esm2 = model.esm2
    if config.mode != "lora":
        trained = {"full": len(esm2.layers), "last_n": min(config.last_n, len(esm2.layers))}.get(config.mode, 0)
        esm2.requires_grad_(False)
        for layer in list(esm2.layers)[len(esm2.layers) - trained :]:
            layer.requires_grad_(True)
        esm2.emb_layer_norm_after.requires_grad_(trained > 0)
        esm2.embed_tokens.requires_grad_(config.mode == "full")


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
    whole = whole_state(
        model,
        module.optimizers(use_pl_optimizer=False),
        lambda name: not lora or name.startswith("head.") or name in trained,
    )
    prefix = "adapter." if lora else "model."
    return {name.replace("model.esm2.", prefix, 1).replace("model.head.", "head.", 1): t for name, t in whole.items()}


class Run(NamedTuple):
    """One seed's training, done or not.

    Args:
        config: settled, with one seed and a folder of its own.
        finished: False if it was told to stop before its end.
        step: updates made.
        writer: its checkpoints.
        log: its metrics.csv.
    """

    config: FinetuneConfig
    finished: bool
    step: int
    writer: CheckpointWriter
    log: Path


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune, one run a seed; score the test set once; write the models, predictions and the report.

    A run that was stopped or killed goes on from its last checkpoint.

    Args:
        config: every rank is given the same.
    Returns: {"finished", "runs": [{"seed", "step", "best_step", "val_loss", "model", "metrics"}], "test": {metric:
        {"value", "low", "high", "seeds"}}, "predictions", "report", "html"}, also in `<out_dir>/finetune.json`; a run
        told to stop gives "finished": False and no "test". Ranks other than the first return {}.
    Raises: InputError for a task, model, head, layout or checkpoint that does not fit, for a folder in which another
        run trains, and for a loss that is no number, naming the update and the sequences.
    """
    with alone_in(Path(config.out_dir)):
        return _finetune(config)


def _finetune(config: FinetuneConfig) -> dict[str, Any]:
    out_dir = Path(config.out_dir)
    config.layout  # a contradiction is told before anything is read  # noqa: B018
    data = load_task(config.task, config.split, Path(config.data_dir), config.target)
    if config.limit is not None:
        data = data.limited(config.limit)
    runs: list[Run] = []
    for seed in config.seeds:
        folder = out_dir if len(config.seeds) == 1 else out_dir / f"seed={seed}"
        own = settled(replace(config, seeds=[seed], out_dir=folder), data.task, len(data.rows("train")))
        run, is_first_rank = _train(own, data)
        runs.append(run)
        if not run.finished:
            break
    if not is_first_rank:
        return {}
    result: dict[str, Any] = {"finished": all(run.finished for run in runs) and len(runs) == len(config.seeds)}
    result["runs"] = [_described(run) for run in runs]
    manifest = provenance("finetune", config, {"data": task_sha256(data)})
    if result["finished"]:
        models = [_publish(run) for run in runs]
        histories = [read_metrics(run.log) for run in runs]
        result |= write_finetune_report(config, runs[0].config, data, models, histories, manifest)
        if config.export_hf:
            for run in runs:
                save_hf_classifier(load_finetuned(run.config.out_dir), Path(run.config.out_dir) / "huggingface")
    else:
        logger.info("stopped at update %d of %d; the same command goes on", runs[-1].step, runs[-1].config.max_steps)
    write_json(out_dir / "finetune.json", result | {"provenance": manifest})
    return result


def _described(run: Run) -> dict[str, Any]:
    best = read_metadata(run.writer.best())
    return {
        "seed": run.config.seeds[0],
        "step": run.step,
        "max_steps": run.config.max_steps,
        "best_step": best["step"],
        "val_loss": best.get("val_loss"),
        "model": str(Path(run.config.out_dir) / FILE),
        "metrics": str(run.log),
    }


def _publish(run: Run) -> Path:
    """The best checkpoint without what only resuming needs."""
    path = Path(run.config.out_dir) / FILE
    tensors, metadata = read_checkpoint(run.writer.best())
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    write_checkpoint(path, kept, metadata)
    return path


def _train(config: FinetuneConfig, data: TaskData) -> tuple[Run, bool]:
    """One seed, resuming where its folder holds a checkpoint of the same run; whether this is the first rank."""
    out_dir, seed, layout = Path(config.out_dir), config.seeds[0], config.layout
    check_head(config.head, data.task)
    esm2, source = load_model(config.model, config.untrained_seed)
    base = {
        "model": str(config.model),
        "untrained_seed": config.untrained_seed,
        "name": source["name"],
        "sha256": weights_sha256(esm2),
    }
    manifest = provenance("finetune", config, {"data": task_sha256(data), "model": base["sha256"]})
    resumed = resume_point(out_dir, config, manifest) if config.resume_if_exists else None
    labels = labels_of(data, config.scale_targets, config.class_weights)
    proteins = LabelledProteins(data, labels, out_dir / "cache", config.max_tokens - 2)
    model = _model(config, esm2, data, proteins, resumed)
    module = LabelTrainer(config, model, proteins, resumed)
    facts = {
        "mode": config.mode,
        "head": model.spec._asdict(),
        "task": task_facts(data.task),
        "split": data.split,
        "max_tokens": config.max_tokens,
        "target_centre": labels.centre,
        "target_spread": labels.spread,
        "base": base,
        "lora": {
            "rank": config.lora_rank,
            "alpha": config.lora_alpha,
            "targets": config.lora_targets,
            "biases": config.lora_biases,
        },
    }
    writer = CheckpointWriter(
        out_dir,
        config.save_top_k,
        manifest,
        layout.global_batch_size,
        saved_tensors,
        lambda module: {
            "finetune": facts,
            "early_stopping": {"best_loss": module.best_loss, "since_best": module.since_best},
        },
    )
    first_step = module.step
    log = TrainingLog(out_dir, config.log_every_n_steps, None, first_step, ("val_loss", f"val_{data.task.metric}"))
    trainer = _trainer(config, [log, writer])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(
        "%s, split %s, seed %d: mode %s, head %s, %s of %s parameters train; %d updates, validated every %d; %s",
        *(data.task.name, data.split, seed, config.mode, config.head, f"{trained:,}"),
        f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        *(config.max_steps, config.val_check_interval, layout.equation),
    )
    if first_step < config.max_steps and not module.out_of_patience:
        if resumed:
            logger.info("resuming from %s at update %d of %d", resumed.path, first_step, config.max_steps)
        continue_at(trainer, first_step)
        budget = config.tokens_per_validation_batch
        trainer.fit(module, FinetuneData(proteins, layout, seed, config.max_steps, first_step, budget))
    else:
        logger.info("nothing to train: the run ended at update %d of %d", first_step, config.max_steps)
    finished = module.step >= config.max_steps or module.out_of_patience
    return Run(config, finished, module.step, writer, log.path), trainer.is_global_zero


def _trainer(config: FinetuneConfig, callbacks: list[Any]) -> Trainer:
    accelerator = config.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    out_dir = Path(config.out_dir)
    return Trainer(
        accelerator=accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=make_strategy(config.strategy, config.layout, accelerator),
        precision=config.precision if config.strategy != "fsdp2" else "32-true",
        max_epochs=1,
        val_check_interval=config.val_check_interval,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(out_dir, name="tensorboard", version="") if config.tensorboard else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
        default_root_dir=out_dir,
    )


def _model(
    config: FinetuneConfig, esm2: ESM2, data: TaskData, proteins: LabelledProteins, resumed: ResumePoint | None
) -> LabelModel:
    """Encoder and head as the run begins, or as its last checkpoint has them."""
    seed = config.seeds[0]
    spec = HeadSpec(
        config.head,
        data.task.level,
        esm2.config.embed_dim,
        data.task.num_outputs,
        config.hidden,
        config.dropout,
        config.standardize,
    )
    model = LabelModel(esm2, spec, seed)
    if config.mode == "lora":
        add_lora(esm2, config.lora_rank, config.lora_alpha, config.lora_targets, config.lora_biases, seed)
    if resumed:
        load_head(model, resumed.parts["head"], resumed.path)
        if config.mode == "lora":
            load_adapters(esm2, resumed.parts["adapter"], str(resumed.path))
        else:
            fill(esm2, resumed.model, resumed.path)
    else:
        if spec.standardize:
            model.head.mean_D.copy_((moments := column_moments(esm2, proteins, config, spec))[0])
            model.head.scale_D.copy_(moments[1])
        if config.head_from is not None:
            path = Path(config.head_from)
            path = path / FILE if path.is_dir() else path
            tensors, metadata = read_checkpoint(path, "head.")
            if "finetune" not in metadata:
                raise InputError(f"{path}: head_from wants a file of `esm2kit finetune`; this one has no head")
            load_head(model, {name.removeprefix("head."): tensor for name, tensor in tensors.items()}, path)
    return model.train()


def column_moments(
    esm2: ESM2, proteins: LabelledProteins, config: FinetuneConfig, spec: HeadSpec
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what the head reads, over train: two (D,) float32; 1 where nothing varies."""
    encoder, last = Encoder(esm2.eval()), esm2.config.num_layers
    count, mean_D, squares_D = 0, torch.zeros(spec.embed_dim).double(), torch.zeros(spec.embed_dim).double()
    for rows_ND in _rows_of_train(encoder, last, proteins, config, spec):
        size, block_mean = len(rows_ND), rows_ND.mean(0)
        delta = block_mean - mean_D
        squares_D += (rows_ND - block_mean).square().sum(0) + delta.square() * count * size / (count + size)
        mean_D += delta * size / (count + size)
        count += size
    scale_D = (squares_D / count).sqrt()
    scale_D[scale_D < 1e-8] = 1.0
    return mean_D.float(), scale_D.float()


def _rows_of_train(
    encoder: Encoder, last: int, proteins: LabelledProteins, config: FinetuneConfig, spec: HeadSpec
) -> Iterator[Tensor]:
    for windows in EvaluationBatches(proteins, "train", config.tokens_per_validation_batch).batches:
        tokens_N, num_tokens = proteins.pack(windows)
        hidden_ND = encoder.encode(tokens_N, num_tokens, [last])[last]
        yield rows_read(hidden_ND, num_tokens, spec.reads)[0].double()
