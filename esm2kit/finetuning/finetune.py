"""Fine-tune an ESM-2 and a head on labels. The loss curve does not depend on the layout of devices."""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from esm2kit.benchmarking.probes.features import compute_column_moments
from esm2kit.benchmarking.saved_probe import describe_labels
from esm2kit.benchmarking.verdict import log_verdict
from esm2kit.core.checksums import write_sealed_json
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import hold_lock
from esm2kit.core.hardware import choose_device
from esm2kit.core.processes import local_rank
from esm2kit.core.provenance import build_provenance
from esm2kit.finetuning.config import FinetuneConfig, resolve_defaults
from esm2kit.finetuning.data import FinetuneData
from esm2kit.finetuning.heads import HeadSpec, LabelModel, check_head
from esm2kit.finetuning.hf_export import UNSCALED_REMEDY, save_hf_classifier
from esm2kit.finetuning.model_file import FILE, load_finetuned, load_head, save_merged
from esm2kit.finetuning.module import LabelTrainer
from esm2kit.finetuning.report import explain_scoring_memory, write_finetune_report
from esm2kit.models.checkpoint import load_tensors, read_checkpoint, read_metadata, write_checkpoint
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2
from esm2kit.models.initialise import build_meta_model
from esm2kit.models.layerwise import LayerwiseEncoder
from esm2kit.models.load import find_model, load_model
from esm2kit.models.lora import add_lora, check_adapters, load_adapters, sample_adapters, weights_sha256
from esm2kit.models.pooling import pool_rows
from esm2kit.models.weights import Weights
from esm2kit.tasks.data import check_single_proteins, load_task_of
from esm2kit.tasks.download import download_flip
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.packing import LabelledProteins, batch_windows, build_labels
from esm2kit.tasks.scaling import check_float32
from esm2kit.tasks.split_file import write_split
from esm2kit.tasks.task import describe_task
from esm2kit.tasks.task_data import TaskData
from esm2kit.training.defaults import check_resumed_precision, resolve_hardware, resolve_micro_batches
from esm2kit.training.layout import is_sharded
from esm2kit.training.loop import fit
from esm2kit.training.metrics_log import read_metrics
from esm2kit.training.precision import encoder_precision
from esm2kit.training.resume import CheckpointWriter, ResumePoint, find_resume_point, lock_run_folder
from esm2kit.training.trainer import resolve_accelerator

logger = logging.getLogger(__name__)

__all__ = ["FinetuneConfig", "finetune"]

PROTEINS_FOR_MOMENTS = 2000


class SeedRun(NamedTuple):
    """The training of one seed.

    Args:
        config: Configuration with resolved defaults, one seed and the folder of the seed.
        finished: False if the run was stopped before its end.
        step: Number of finished updates.
        writer: Writer of the checkpoints.
        log: Path of metrics.csv.
    """

    config: FinetuneConfig
    finished: bool
    step: int
    writer: CheckpointWriter
    log: Path


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune one model per seed, score the test set, and write the models, the predictions and the report.

    A run that was stopped or killed resumes from its last checkpoint.

    Args:
        config: The same configuration on every rank.

    Returns:
        {"finished", "runs": [{"seed", "step", "max_steps", "best_step", "val_loss", "model", "metrics"}], "test":
        {metric: as in a report's row}, "uncertainty": as in a report's row, "predictions", "report", "html",
        "verdict", "warnings"}, which is also written to `<out_dir>/finetune.json`; and "files", the paths of all of
        them. A stopped run has "finished": False and no "test". Ranks other than the first return {}.

    Raises:
        InputError: The task, model, head, layout and checkpoint do not match, another run trains in the same folder,
            or the loss is not finite. The message then contains the update and the sequences.
    """
    check_type(config, FinetuneConfig, "config")
    with lock_run_folder(Path(config.out_dir)):
        return _finetune(config)


def _finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune in a locked folder; see `finetune`."""
    out_dir = Path(config.out_dir)
    config.layout  # checks the layout before reading data  # noqa: B018
    if config.labels is None and config.download and config.task in TASKS:
        out_dir.mkdir(parents=True, exist_ok=True)
        with hold_lock(out_dir / ".download.lock", None):  # one rank downloads while the others wait
            download_flip(config.task, Path(config.data_dir), config.split)
    data = check_single_proteins(load_task_of(config), "fine-tuning")
    if config.limit is not None:
        data = data.limit_proteins(config.limit)
    requested = config.precision
    config = resolve_hardware(config)
    runs: list[SeedRun] = []
    for seed in config.seeds:
        folder = out_dir if len(config.seeds) == 1 else out_dir / f"seed={seed}"
        resolved = resolve_defaults(replace(config, seeds=[seed], out_dir=folder), data.task, len(data.rows("train")))
        run, is_first_rank = _train(resolved, data, requested)
        runs.append(run)
        if not run.finished:
            break
    if not is_first_rank:
        return {}
    result: dict[str, Any] = {"finished": all(run.finished for run in runs) and len(runs) == len(config.seeds)}
    result["runs"] = [_describe_run(run) for run in runs]
    split_file = write_split(data, out_dir)
    files = {f"task/{name}": path for name, path in data.files.items()}
    manifest = build_provenance("finetune", config, {"data": data.sha256} | files)
    if result["finished"]:
        models = [_publish(run) for run in runs]
        histories = [read_metrics(run.log) for run in runs]
        result |= write_finetune_report(config, runs[0].config, data, models, histories, manifest)
        for run in runs:
            folder = Path(run.config.out_dir)
            if config.mode == "lora" and config.merge:
                save_merged(load_finetuned(folder, layer_by_layer=False), folder / "merged.safetensors")
            if config.export_hf:
                save_hf_classifier(load_finetuned(folder, layer_by_layer=False), folder / "huggingface")
        log_verdict(result["verdict"], result["warnings"])
    else:
        logger.info("stopped at update %d of %d; rerun the command to resume", runs[-1].step, runs[-1].config.max_steps)
    files = [
        *result.pop("files", []),
        *_list_files(config, runs, result["finished"]),
        *([split_file] if split_file else []),
    ]
    write_sealed_json(out_dir / "finetune.json", result | {"provenance": manifest})
    return result | {"files": list(dict.fromkeys(map(str, files)))}


def _list_files(config: FinetuneConfig, runs: list[SeedRun], is_finished: bool) -> list[Path]:
    """List the models and metrics of all seeds, with the folders of Hugging Face exports, and finetune.json."""
    folders = [Path(run.config.out_dir) for run in runs]
    names = [FILE] if is_finished else []
    names += ["merged.safetensors"] if names and config.mode == "lora" and config.merge else []
    names += ["huggingface"] if names and config.export_hf else []
    paths = [folder / name for folder in folders for name in names] + [run.log for run in runs]
    return [*paths, Path(config.out_dir) / "finetune.json"]


def _describe_run(run: SeedRun) -> dict[str, Any]:
    """Return the entry of a run in finetune.json."""
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


def _publish(run: SeedRun) -> Path:
    """Write the best checkpoint without the optimizer state, and return its path."""
    path = Path(run.config.out_dir) / FILE
    tensors, metadata = read_checkpoint(run.writer.best())
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    write_checkpoint(path, kept, metadata)
    return path


def _train(config: FinetuneConfig, data: TaskData, requested_precision: str) -> tuple[SeedRun, bool]:
    """Train one seed or resume it from its last checkpoint; also return whether this is the first rank."""
    out_dir, seed = Path(config.out_dir), config.seeds[0]
    check_head(config.head, data.task)
    if config.class_weights and data.task.target == "value":
        raise InputError(
            f"class_weights requires a task of classes; {data.task.name} has values. Leave class_weights out.",
            code="finetune.class-weights",
            task=data.task.name,
        )
    if config.export_hf and config.head != "hf":
        raise InputError(
            f"export_hf requires head hf: transformers has no class for head {config.head}",
            code="head.no-hf-class",
            head=config.head,
        )
    encoder = InitialEncoder.load(config)
    base = {
        "model": str(config.model),
        "untrained_seed": config.untrained_seed,
        "name": encoder.name,
        "sha256": encoder.sha256,
    }
    manifest = build_provenance("finetune", config, {"data": data.sha256, "model": base["sha256"]})
    resumed = find_resume_point(out_dir, config, manifest)
    check_resumed_precision(requested_precision, config.precision, resumed)
    config = resolve_micro_batches(config, encoder.esm2.config)
    labels = build_labels(data, config.scale_targets, config.class_weights)
    if config.export_hf:
        check_float32(labels.scale, UNSCALED_REMEDY)
    proteins = LabelledProteins(data, labels, out_dir / "cache", config.max_tokens - 2)
    model = _build_model(config, encoder, data, proteins, resumed)
    facts = {
        "mode": config.mode,
        "head": model.spec._asdict(),
        "task": describe_task(data.task),
        "split": data.split,
        "max_tokens": config.max_tokens,
        "target_centre": labels.scale.centre,
        "target_spread": labels.scale.spread,
        "training_labels": describe_labels(data),
        "base": base,
        "lora": {
            "rank": config.lora_rank,
            "alpha": config.lora_alpha,
            "targets": config.lora_targets,
            "biases": config.lora_biases,
        },
    }
    module = LabelTrainer(config, model, proteins, resumed, facts, encoder.list_tensors(config, resumed))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(
        "%s, split %s, seed %d: mode %s, head %s, %s of %s parameters trained, %d updates, validation every %d, %s",
        *(data.task.name, data.split, seed, config.mode, config.head, f"{trained:,}"),
        f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        *(config.max_steps, config.val_check_interval, config.layout.equation),
    )
    batches = FinetuneData(
        proteins,
        config.layout,
        seed,
        config.max_steps,
        module.step,
        config.tokens_per_validation_batch,
        config.num_workers,
    )
    run = fit(module, batches, manifest, ("val_loss", f"val_{data.task.metric}"))
    return SeedRun(config, module.finished, module.step, run.writer, run.metrics), run.is_first_rank


class InitialEncoder(NamedTuple):
    """The encoder before training. For a sharded layout it is on the meta device, and no rank reads all its weights.

    Args:
        name: Name of the model.
        esm2: The encoder.
        sha256: Digest of its weights.
        weights: The weights of an encoder on the meta device, otherwise None.
    """

    name: str
    esm2: ESM2
    sha256: str
    weights: Weights | None

    @classmethod
    def load(cls, config: FinetuneConfig) -> "InitialEncoder":
        """Load the model of a configuration, or open it if the layout is sharded."""
        if not is_sharded(config.strategy, config.layout):
            esm2, source = load_model(config.model, config.untrained_seed)
            return cls(source.name, esm2, weights_sha256(esm2), None)
        source = find_model(config.model, config.untrained_seed)
        weights = source.open()
        return cls(source.name, build_meta_model(weights.config), weights.sha256(), weights)

    def list_tensors(self, config: FinetuneConfig, resumed: ResumePoint | None) -> Iterator[tuple[str, Tensor]] | None:
        """Iterate over the tensors of an encoder on the meta device, with adapters in mode lora; None for others."""
        if self.weights is None:
            return None
        if config.mode != "lora":
            return iter(resumed.model.items()) if resumed else self.weights.items()
        adapters = resumed.parts["adapter"] if resumed else dict(sample_adapters(self.esm2, config.seeds[0]))
        kept = (
            (name, tensor) for name, tensor in self.weights.items() if name not in adapters
        )  # biases can be trained
        return chain(kept, adapters.items())


def _build_model(
    config: FinetuneConfig,
    encoder: InitialEncoder,
    data: TaskData,
    proteins: LabelledProteins,
    resumed: ResumePoint | None,
) -> LabelModel:
    """Build the encoder and head of a new run, or load them from its last checkpoint."""
    seed, esm2 = config.seeds[0], encoder.esm2
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
        if encoder.weights is not None:  # loaded after it is sharded
            if config.mode == "lora":
                check_adapters(esm2, resumed.parts["adapter"], str(resumed.path))
        elif config.mode == "lora":
            load_adapters(esm2, resumed.parts["adapter"], str(resumed.path))
        else:
            load_tensors(esm2, resumed.model, resumed.path)
    else:
        if spec.standardize:
            with explain_scoring_memory(esm2.config, config):
                mean_D, scale_D = compute_column_moments(_encode_train_rows(encoder, proteins, config, spec))
            model.head.mean_D.copy_(mean_D)
            model.head.scale_D.copy_(scale_D)
        if config.head_from is not None:
            path = Path(config.head_from)
            path = path / FILE if path.is_dir() else path
            tensors, metadata = read_checkpoint(path, "head.")
            if "finetune" not in metadata:
                raise InputError(
                    f"{path} has no head: head_from requires a file of `esm2kit finetune`",
                    code="finetuned.no-head",
                    path=path,
                )
            load_head(model, {name.removeprefix("head."): tensor for name, tensor in tensors.items()}, path)
    return model.train()


def _encode_train_rows(
    initial: InitialEncoder, proteins: LabelledProteins, config: FinetuneConfig, spec: HeadSpec
) -> Iterator[Tensor]:
    """Yield the inputs of the head for the training proteins, (N, D) per batch."""
    device = choose_device(resolve_accelerator(config), local_rank())
    precision = encoder_precision(config.precision, device)
    budget, last = config.tokens_per_validation_batch, initial.esm2.config.num_layers
    if initial.weights is not None:
        encoder: Encoder = LayerwiseEncoder(initial.weights, precision, device, budget)
    else:
        encoder = Encoder(initial.esm2.eval(), precision, device)
    rows = proteins.data.rows("train")
    if config.mode != "frozen":  # the encoder changes during training, so the moments of a part are exact enough
        rows = rows[:: math.ceil(len(rows) / PROTEINS_FOR_MOMENTS)]
    for windows in batch_windows(proteins.windows(rows), max(budget, encoder.group_tokens)):
        tokens_N, num_tokens = proteins.pack(windows)
        hidden_ND = encoder.encode(tokens_N, num_tokens, [last])[last]
        yield pool_rows(hidden_ND, num_tokens, spec.reads)[0]
    encoder.close()
