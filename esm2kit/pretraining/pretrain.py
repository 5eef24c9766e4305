"""Masked-language-model pretraining: its training loop, and `pretrain`."""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esm2kit.core.checksums import write_sealed_json
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.process_group import sum_over_group
from esm2kit.core.processes import local_rank
from esm2kit.core.provenance import build_provenance
from esm2kit.models.checkpoint import read_metadata
from esm2kit.models.config import ESM2Config, check_lm_head
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.models.initialise import build_meta_model, materialise, sample_weights
from esm2kit.models.load import load_model
from esm2kit.pretraining.config import PretrainConfig, lr_at
from esm2kit.pretraining.data import Masking, MicroBatch, PretrainingData
from esm2kit.pretraining.downstream import DownstreamProbe
from esm2kit.pretraining.training_set import TrainingSet
from esm2kit.sequences.store import SequenceStore
from esm2kit.tasks.data import check_single_proteins, load_task
from esm2kit.tasks.task_data import TaskData
from esm2kit.training.defaults import check_resumed_precision, resolve_hardware, resolve_micro_batches
from esm2kit.training.layout import is_sharded
from esm2kit.training.loop import TrainingLoop, fit
from esm2kit.training.parallel import (
    data_parallel_group,
    data_parallel_rank,
)
from esm2kit.training.precision import precision_context
from esm2kit.training.resume import (
    ResumePoint,
    find_resume_point,
    lock_run_folder,
)
from esm2kit.training.updates import send_to_device, sum_dtype

logger = logging.getLogger(__name__)

__all__ = ["PretrainConfig", "lr_at", "pretrain"]

# shares of scored residues that are replaced with <mask> and with a random residue
VALIDATION_SHARES = {"hidden": (1.0, 0.0), "bert": (0.8, 0.1)}


class MaskedLM(TrainingLoop):
    """ESM-2 trained to predict masked residues.

    Args:
        config: The run, with lr and weight_decay resolved.
        esm2: The full model, identical on all ranks; on the meta device if `weights` is passed.
        train: The training sequences, for error messages.
        resumed: The checkpoint to continue from.
        downstream: The probe to evaluate at validations, or None.
        weights: Pairs of name and unsharded tensor, loaded after the model is sharded.
    """

    def __init__(
        self,
        config: PretrainConfig,
        esm2: ESM2,
        train: SequenceStore,
        resumed: ResumePoint | None = None,
        downstream: DownstreamProbe | None = None,
        weights: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        super().__init__(config, esm2, resumed)
        self.train_store, self.downstream, self.weights = train, downstream, weights
        self.validation_sums: Tensor | None = None  # (2,) loss and masked tokens
        esm2.contact_head.requires_grad_(False)

    def configure_model(self) -> None:
        """Shard and compile the model as configured, and load its weights."""
        super().configure_model()
        if self.weights is not None:
            materialise(self.esm2, self.weights, self.trainer.strategy.root_device)
            self.weights = None

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Compute the cross-entropy summed over a micro-batch's masked tokens, in float32."""
        packed = Packed(batch.num_tokens, self.device, bucketed=True)
        logits_MV = self.esm2.masked_logits(batch.tokens_N, packed, batch.rows_M)
        return F.cross_entropy(logits_MV.float(), batch.targets_M, reduction="sum")

    def training_flops(self, batch: MicroBatch) -> float:
        """Count the FLOP of a micro-batch: a backward pass takes twice those of a forward pass."""
        return 3 * self.esm2.config.forward_flops(batch.num_tokens, len(batch.targets_M))

    def sequence_ids(self, batch: MicroBatch) -> list[str]:
        """List the ids of a micro-batch's sequences."""
        return [self.train_store.id(row) for row in batch.store_rows]

    def peak_rates(self) -> dict[float, list[nn.Parameter]]:
        """Return one peak rate for all parameters."""
        return {self.config.lr: list(self.esm2.parameters())}

    def learning_rate(self, peak: float) -> float:
        """Compute the learning rate of the current update."""
        return lr_at(self.step, self.config)  # all parameters have the same peak

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Add the loss and the number of masked tokens of a validation batch to the sums of this rank."""
        dtype = sum_dtype(self.device)
        masked = send_to_device([len(batch.targets_M)], dtype, self.device)
        with precision_context(self.esm2, self.config.precision):
            sums = torch.cat([self.loss_sum(batch).to(dtype)[None], masked])
        self.validation_sums = sums if self.validation_sums is None else self.validation_sums + sums

    def validation_metrics(self) -> dict[str, float]:
        """Compute val_loss and val_perplexity over all ranks."""
        summed = sum_over_group(data_parallel_group(self.trainer.strategy), self.validation_sums)
        self.validation_sums = None
        loss, masked = summed.tolist()
        if not masked:
            raise InputError(
                f"no residue of the validation set is masked with mask_prob {self.config.mask_prob} and max_tokens "
                f"{self.config.max_tokens}, so val_loss is undefined. Raise one of them, or add validation sequences.",
                code="pretrain.no-targets",
                mask_prob=self.config.mask_prob,
                max_tokens=self.config.max_tokens,
            )
        val_loss = loss / masked
        perplexity = math.exp(min(val_loss, 700.0))  # e^709 is close to the largest float
        return {"val_loss": val_loss, "val_perplexity": perplexity}

    def on_validation_epoch_end(self) -> None:
        """Compute the validation metrics, and evaluate the downstream probe if it is due."""
        super().on_validation_epoch_end()
        validations = self.step // int(self.trainer.val_check_interval)
        if self.downstream is not None and validations % self.config.downstream_every == 0:
            strategy = self.trainer.strategy
            self.last_validation |= self.downstream.evaluate(
                self.encode_batch,
                self.device,
                data_parallel_group(strategy),
                *data_parallel_rank(strategy),
                self.trainer.is_global_zero,
            )

    def encode_batch(self, tokens_N: Tensor, num_tokens: list[int]) -> Tensor:
        """Embed packed sequences (N,) with the current model in the precision of validation; returns (N, D)."""
        with self.trainer.precision_plugin.forward_context(), precision_context(self.esm2, self.config.precision):
            return self.esm2.encode(tokens_N, Packed(num_tokens, self.device, bucketed=True))


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain a model, or resume if out_dir holds a checkpoint of the same run.

    Args:
        config: The run; all ranks must pass the same.

    Returns:
        The paths `best`, `last` (checkpoints) and `metrics` (metrics.csv), and the numbers `val_loss`,
        `val_perplexity`, `unigram_perplexity` and `step`. `<out_dir>/pretrain.json` holds them too, together with the
        model's shape. `files` lists all paths. Ranks other than the first return an empty dict.

    Raises:
        InputError: The dataset, model size, batch layout or checkpoint does not match the configuration, or a loss is
            not finite; then the message lists the update and its sequences.
    """
    check_type(config, PretrainConfig, "config")
    with lock_run_folder(Path(config.out_dir)):
        return _pretrain(config)


def _pretrain(config: PretrainConfig) -> dict[str, Any]:
    out_dir, requested = Path(config.out_dir), config.precision
    config.layout  # raises  # noqa: B018
    # every byte once per node: training would not notice a damaged sequence
    dataset = TrainingSet.open(config.data, every_byte=local_rank() == 0)
    unigram_perplexity = dataset.unigram.perplexity
    task = _downstream_task(config)
    config = resolve_hardware(config)
    manifest = build_provenance("pretrain", config, {"data": dataset.fingerprint})
    resumed = find_resume_point(out_dir, config, manifest)
    check_resumed_precision(requested, config.precision, resumed)
    esm2, weights = _initial_model(config, resumed)
    config = resolve_micro_batches(config, esm2.config)
    layout = config.layout
    data = PretrainingData(
        dataset,
        layout,
        config.seed,
        config.max_steps,
        resumed.step if resumed else 0,
        config.max_tokens - 2,
        config.tokens_per_validation_batch,
        config.num_workers,
        Masking(config.mask_prob),
        Masking(config.mask_prob, *VALIDATION_SHARES[config.validation_masking]),
    )
    downstream, metrics = None, ("val_loss", "val_perplexity")
    if task is not None:
        widths = esm2.config.embed_dim, config.max_tokens - 2, config.tokens_per_validation_batch
        downstream = DownstreamProbe(task, out_dir / "downstream", *widths)
        metrics += (f"downstream_{task.task.metric}", "downstream_peak_gib")
    logger.info(
        "ESM-2: %d layers x %d dimensions, %.2fM parameters; %s; perplexity of the unigram baseline %.2f",
        esm2.config.num_layers,
        esm2.config.embed_dim,
        esm2.config.num_parameters / 1e6,
        layout.equation,
        unigram_perplexity,
    )
    module = MaskedLM(config.resolved, esm2, dataset.train, resumed, downstream, weights)
    run = fit(module, data, manifest, metrics, unigram_perplexity)
    if not run.is_first_rank:
        return {}
    best, last = run.writer.best(), run.writer.last
    best_metadata = read_metadata(best)
    result = {
        "best": best,
        "last": last,
        "metrics": run.metrics,
        "unigram_perplexity": unigram_perplexity,
        "step": read_metadata(last)["step"],
        "val_loss": best_metadata.get("val_loss"),
        "val_perplexity": best_metadata.get("val_perplexity"),
    }
    write_sealed_json(out_dir / "pretrain.json", result | {"model": esm2.config, "provenance": manifest})
    return result | {"files": [best, last, run.metrics, out_dir / "pretrain.json"]}


def _downstream_task(config: PretrainConfig) -> TaskData | None:
    if config.downstream_task is None:
        return None
    data = load_task(
        config.downstream_task,
        config.downstream_split,
        Path(config.downstream_data),
        config.downstream_target_type,
        config.downstream_level,
        config.downstream_target,
    )
    return check_single_proteins(data, "a downstream task").limit_proteins(config.downstream_limit)


def _initial_model(
    config: PretrainConfig, resumed: ResumePoint | None
) -> tuple[ESM2, Iterable[tuple[str, Tensor]] | None]:
    """Build the initial or resumed model; for a sharded layout on the meta device, together with its weights."""
    if resumed or config.init_from is None:
        shape = ESM2Config(**resumed.metadata["model"]) if resumed else config.model_config
        esm2 = build_meta_model(shape)
        weights = resumed.model.items() if resumed else sample_weights(shape, config.seed)
        if is_sharded(config.strategy, config.layout):
            return esm2, weights
        materialise(esm2, weights, torch.device("cpu"))
        return esm2, None
    loaded, source = load_model(config.init_from)
    check_lm_head(loaded.config, source.name)
    if config.model is not None and loaded.config != config.model_config:
        raise InputError(
            f"init_from {config.init_from} has another shape ({loaded.config}) than model {config.model!r} "
            f"({config.model_config}). Omit --model.",
            code="model.other-shape",
            path=config.init_from,
            name=config.model,
        )
    if is_sharded(config.strategy, config.layout):
        return build_meta_model(loaded.config), loaded.state_dict().items()
    return loaded.train(), None
