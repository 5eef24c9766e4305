"""Embed the proteins of a FASTA into HDF5 files, in bounded memory and on any number of processes.

The folder `<out_dir>/<name>_embed.part/` of an unfinished run contains the table of proteins, the HDF5 files with space
for all values, and a journal of the batches that were written. An interrupted run resumes from there. The files are
moved to out_dir at the end. Under torchrun, each process embeds a share of the batches and writes to the same files.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from contextlib import AbstractContextManager
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import torch

from esm2kit.core.checksums import FileChecksums, raise_damaged
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import check_output_folder, fsync
from esm2kit.core.hardware import choose_device
from esm2kit.core.launch import run_in_workers, starts_workers
from esm2kit.core.paths import portable_name
from esm2kit.core.process_group import Process, join_process_group, run_on_rank_0
from esm2kit.core.processes import count_cores, read_launch
from esm2kit.core.provenance import build_provenance
from esm2kit.core.seal import Seal, checksum_skeleton, has_seal
from esm2kit.embedding.batch import Output, count_columns
from esm2kit.embedding.config import POOLINGS, EmbedConfig
from esm2kit.embedding.hdf5 import EmbeddingReader, Entry, Skeleton, create_file, seal_file
from esm2kit.embedding.plan import REMEDY, Table, read_plan, write_plan
from esm2kit.embedding.run import DISK_FULL, EmbeddingRun, lock_run
from esm2kit.models.compiled import compile_layers, explain_compiler_errors, is_repaid
from esm2kit.models.config import ESM2Config, check_lm_head
from esm2kit.models.encoder import TOKENS_PER_BATCH, Encoder, Precision, log_precision, resolve_precision
from esm2kit.models.layerwise import load_encoder
from esm2kit.models.load import find_model
from esm2kit.models.memory import InferenceSettings
from esm2kit.models.memory_guard import OPTIONS, explain_inference_memory
from esm2kit.models.sharded import choose_sharding
from esm2kit.sequences.alphabet import VOCAB_SIZE
from esm2kit.sequences.fasta import find_fasta_files, strip_fasta_suffix
from esm2kit.sequences.pipes import copy_pipes
from esm2kit.sequences.windows import Windowing

logger = logging.getLogger(__name__)
KINDS = ("per_protein", "per_residue", "bos", "logits")


class EmbedResult(NamedTuple):
    """Files of a run.

    Args:
        embeddings: file with one vector per protein of the first of repr_layers and pooling. None if it was not
            requested.
        hiddens: file with the vectors per residue of the first of repr_layers. None if it was not requested.
        num_proteins: number of proteins.
        files: all files.
    """

    embeddings: Path | None
    hiddens: Path | None
    num_proteins: int
    files: tuple[Path, ...]


class RunStage(Enum):
    """Progress of a job."""

    FINISHED = "all files exist"
    COMPUTED = "all files are complete but not all are moved to out_dir"
    INTERRUPTED = "an unfinished run with these settings exists"
    NEW = "files are missing"


class RunState(NamedTuple):
    """State of a job when `embed` is called.

    Args:
        stage: its progress.
        outputs: the files that the run creates; the others exist.
        precision: precision of the model.
        num_proteins: number of proteins. None before the FASTA is read.
    """

    stage: RunStage
    outputs: list[Output]
    precision: Precision
    num_proteins: int | None = None


def embed(config: EmbedConfig, replace: bool = False) -> EmbedResult:
    """Embed all proteins of a FASTA.

    Files that exist from the same input, model and settings are not written again, and the model is loaded only if a
    file is missing. An interrupted run resumes when `embed` is called again.

    Args:
        config: input, model, outputs and settings; the same on all processes.
        replace: replace files and unfinished runs with other settings, as `restart` does, but keep those with the same
            settings (with several devices, replace these too).

    Returns:
        The files, the same on all processes.

    Raises:
        InputError: the input is invalid, a file or an unfinished run with other settings exists, or the disk is full.
    """
    check_type(config, EmbedConfig, "config")
    if starts_workers(config.devices):
        return _embed_in_workers(config, replace)
    process = join_process_group()
    check_output_folder(config.out_dir)
    job = Job(config, _choose_device(config, process), replace)
    check_compile(config.compile, job.device.type)
    copied = copy_pipes(job.files, Path(config.out_dir), f"{job.name}_input.fasta", process.world_size)
    with copied as job.files, lock_run(job.folder, process):
        state = run_on_rank_0(process, job.find_state)
        if state.stage in (RunStage.NEW, RunStage.INTERRUPTED):
            log_precision(config.precision, state.precision, job.device)
            sharded = choose_sharding(
                *(config.shard, job.model.config, job.model.name, state.precision, job.device),
                *(job.batch_tokens, config.layer_by_layer),
            )
            ranks = read_launch().local_world_size if sharded else 1
            with explain_compiler_errors(), job.explain_memory(state, ranks):
                encoder = load_encoder(
                    *(job.model, state.precision, job.device),
                    *(config.layer_by_layer, job.batch_tokens, config.workers),
                    shard=sharded,
                )
                if state.stage is RunStage.NEW:
                    state = run_on_rank_0(process, lambda: job.start(state.outputs))
                overlap = config.window_overlap if config.long_proteins == "window" else 0
                windowing = Windowing(config.max_residues, overlap, job.batch_tokens)
                num_embedded_P = _count_embedded_residues(config, Table(job.folder))
                residues = int(num_embedded_P.sum(dtype=np.int64)) // process.world_size
                compile_if_repaid(config.compile, encoder, residues)
                run = (job.folder, job.files, num_embedded_P, encoder, state.outputs, windowing, config.dtype)
                EmbeddingRun(*run, process, config.workers).work(job.model.name)
        if state.stage is not RunStage.FINISHED:
            run_on_rank_0(process, job.publish)
    first = {output.pooling: target for output, target in reversed(job.targets.items())}
    pooled = first.get(config.pooling[0]) if config.per_protein else None
    return EmbedResult(pooled, first.get("none"), state.num_proteins, tuple(job.targets.values()))


def check_compile(requested: bool | Literal["auto"], kind: str) -> None:
    """Raise InputError if compiling was requested where it is not supported: `kind` is how the model runs."""
    if requested is True and kind != "cuda":
        raise InputError(
            f"--compile true compiles the complete model on a CUDA GPU, but this run computes on '{kind}'. "
            "Use --compile auto.",
            code="embed.compile-device",
            device=kind,
        )


def compile_if_repaid(requested: bool | Literal["auto"], encoder: Encoder, num_residues: int) -> None:
    """Compile the layers of an encoder if that was requested, or if the run is long enough to repay it.

    Args:
        requested: the option `compile`.
        encoder: the model.
        num_residues: residues that this process embeds.

    Raises:
        InputError: compiling was requested for a model that is read layer by layer, or that is not on a CUDA GPU.
    """
    kind = "layer by layer" if encoder.group_tokens else "sharded" if encoder.shards > 1 else encoder.device.type
    check_compile(requested, kind)
    if requested is False or kind != "cuda":
        return
    num_parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    if requested is True or is_repaid(num_residues, num_parameters):
        logger.info("compiling the layers, which delays the first batch; --compile false runs them as they are")
        compile_layers(encoder.model)


def _embed_in_workers(config: EmbedConfig, replace: bool) -> EmbedResult:
    """Embed in one process per device, which torchrun starts."""
    if replace:
        config = dataclasses.replace(config, restart=True)
    found = run_in_workers("embed", config, logger)
    paths = [found[name] and Path(found[name]) for name in ("embeddings", "hiddens")]
    return EmbedResult(*paths, found["num_proteins"], tuple(map(Path, found["files"])))


def _choose_device(config: EmbedConfig, process: Process) -> torch.device:
    return choose_device(config.device, process.local_rank)


class Job:
    """One call of `embed`: its input, model, files and working folder.

    Args:
        config: options of the call.
        device: device of the model.
        replace: as in `embed`.

    Raises:
        InputError: the input, the model or a layer does not exist, or the device does not support the precision.
    """

    def __init__(self, config: EmbedConfig, device: torch.device, replace: bool) -> None:
        self.config, self.device, self.replace = config, device, replace
        self.precision = resolve_precision(config.precision, device)
        self.files = find_fasta_files(config.fasta)
        self.model = find_model(config.model, config.untrained_seed)
        self.batch_tokens = config.batch_tokens or TOKENS_PER_BATCH[device.type]
        out_dir, name = Path(config.out_dir), config.name or portable_name(strip_fasta_suffix(self.files[0]))
        self.name = name
        self.folder = out_dir / f"{name}_embed.part"
        outputs = _list_outputs(config, self.model.config)
        self.targets = {output: out_dir / f"{name}_{output.file}.h5" for output in outputs}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Provenance of the files, with the digests of the input and of the model."""
        names = ["fasta"] if len(self.files) == 1 else [f"fasta_{number}" for number in range(len(self.files))]
        inputs = dict(zip(names, self.files, strict=True)) | {"model": self.model.sha256}
        config = dataclasses.replace(self.config, precision=self.precision)
        return build_provenance("embed", config, inputs) | {"model": self.model.record()}

    @cached_property
    def settings(self) -> str:
        """JSON of all settings that determine the values and the batches; a run resumes only if they are equal."""
        ignored = ("fasta", "out_dir", "name", "model", "device", "devices", "workers", "restart", "repr_layers")
        ignored += ("pooling", "batch_tokens", "compile", "layer_by_layer", "shard")
        settings = {item.name: getattr(self.config, item.name) for item in dataclasses.fields(self.config)}
        settings = {name: value for name, value in settings.items() if name not in ignored}
        settings["precision"] = self.precision
        settings |= {name: entry["sha256"] for name, entry in self.manifest["inputs"].items()}
        settings |= {"outputs": [list(output) for output in self.targets], "batch_tokens": self.batch_tokens}
        return json.dumps(settings, sort_keys=True, default=str)

    def explain_memory(self, state: RunState, shards: int) -> AbstractContextManager[None]:
        """Return the context in which exhausted memory is an error that names the settings that help."""
        settings = InferenceSettings(
            tokens=self.batch_tokens,
            precision=state.precision,
            device=self.device.type,
            workers=(self.config.workers or count_cores()) if self.device.type == "cpu" else 1,
            layers=len({output.layer for output in state.outputs}),
            shards=shards,
        )

        def note() -> str:
            return " --restart" if _has_finished_batches(self.folder) else ""

        options = OPTIONS if self.config.layer_by_layer else (*OPTIONS, "layer_by_layer")
        return explain_inference_memory(self.model.config, settings, options, note)

    def find_state(self) -> RunState:
        """Find finished files and an unfinished run.

        Returns:
            The state of this job.

        Raises:
            InputError: a file or a run has other settings and must not be replaced.
        """
        plan = None if self.config.restart else read_plan(self.folder)
        self._adopt_precision(plan)
        if plan and (differing := _find_differences(json.loads(self.settings), plan["settings"])):
            # after exhausted memory, a run with smaller batches has nothing to lose
            loses = differing != ["batch_tokens"] or _has_finished_batches(self.folder)
            if not self.replace and loses:
                raise InputError(
                    f"{self.folder} contains an unfinished run with different settings ({', '.join(differing)}). "
                    "Use --restart to delete it, or another --name to keep both.",
                    code="embed.run-exists",
                    path=self.folder,
                    differing=differing or [],
                )
            plan = None
        if plan:
            planned = _planned_outputs(plan)
            rest = {output: target for output, target in self.targets.items() if output not in planned}
            if len(self._find_existing(rest)) == len(rest):  # otherwise a file was deleted in the meantime
                if not plan["published"]:
                    self._check_run(plan)
                    logger.info("resuming the unfinished run in %s", self.folder)
                stage = RunStage.COMPUTED if plan["published"] else RunStage.INTERRUPTED
                return RunState(stage, planned, self.precision, plan["num_proteins"])
        existing = {} if self.config.restart else self._find_existing(self.targets)
        for output in existing:
            logger.info("%s already exists, from the same input, model and settings", self.targets[output])
        if missing := [output for output in self.targets if output not in existing]:
            return RunState(RunStage.NEW, missing, self.precision)
        return RunState(RunStage.FINISHED, [], self.precision, next(iter(existing.values())))

    def _adopt_precision(self, plan: dict[str, Any] | None) -> None:
        """Keep the float32 of an unfinished run or of existing files, if `auto` would compute in less than that."""
        if self.config.precision != "auto" or self.precision == "float32" or self.config.restart:
            return
        recorded = [plan["settings"]] if plan else [_read_settings(path) for path in self.targets.values()]
        if any(settings.get("precision") == "float32" for settings in recorded):
            self.precision = "float32"

    def _find_existing(self, targets: dict[Output, Path]) -> dict[Output, int]:
        """Find the targets that exist with the same settings.

        Returns:
            output -> number of proteins.

        Raises:
            InputError: a target has other settings and must not be replaced.
        """
        existing = {}
        for output, target in targets.items():
            if not target.exists():
                continue
            try:
                differing, num_proteins = self._compare_settings(target, output)
                if differing == []:
                    with EmbeddingReader(target) as reader:
                        reader.check()
            except InputError as error:
                if not self.replace:
                    raise
                logger.warning("%s", error)
                continue
            if differing == []:
                existing[output] = num_proteins
            elif not self.replace:
                origin = f"with different settings ({', '.join(differing)})" if differing else "with other content"
                raise InputError(
                    f"{target} already exists {origin}. Use --restart to replace it, or another --name to keep both.",
                    code="embed.file-exists",
                    path=target,
                    differing=differing or [],
                )
        return existing

    def _compare_settings(self, target: Path, output: Output) -> tuple[list[str] | None, int]:
        """Compare the settings recorded in a file with the requested ones.

        Returns:
            The names of the settings that differ, or None for a file of another program; and the number of proteins.

        Raises:
            InputError: the file is damaged.
        """
        if has_seal(target):
            seal = Seal(target, REMEDY)
            try:
                seal.check_metadata()
            finally:
                seal.close()
        elif not h5py.is_hdf5(target):
            return None, 0
        try:
            with h5py.File(target, "r") as file:  # only these two: the ids are attributes too
                if "settings" not in file.attrs:
                    return None, 0
                recorded, num_proteins = file.attrs["settings"], int(file.attrs["num_proteins"])
            recorded = _settings_of_file(recorded, output)
        except Exception as error:  # h5py and json raise errors of many kinds for damaged content
            raise_damaged(target, " ".join(str(error).split()), REMEDY)
        return _find_differences(_settings_of_file(self.settings, output), recorded), num_proteins

    def start(self, outputs: list[Output]) -> RunState:
        """Start a run: read the FASTA, write the table, create the files and write the plan.

        Args:
            outputs: the files to create.

        Returns:
            The state of the started run.

        Raises:
            InputError: the input is invalid or the disk is full; the run's folder is deleted.
            OSError: any other failure of the file system.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            table = Table.build(self.files, self.folder)
            if self.config.long_proteins == "error":
                table.check_lengths(self.config.max_residues)
            slashed = (name for name in table.ids() if "/" in name or name == ".")
            if self.config.key == "id" and (name := next(slashed, None)):
                raise InputError(
                    f"id {name!r} is not valid as the name of an HDF5 dataset. Choose key index or hash.",
                    code="embed.id",
                    id=name,
                )
            _create_files(self.config, table, outputs, self.folder, self._file_attributes())
            # synced before the plan is written, because after a power failure a run with a plan is resumed
            for path in self.folder.iterdir():
                fsync(path)
            plan = {"settings": json.loads(self.settings), "num_proteins": len(table), "published": False}
            plan |= self._checksum_files(table, outputs)
            write_plan(self.folder, plan | {"outputs": [list(output) for output in outputs]})
        except InputError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if error.errno in DISK_FULL:
                raise InputError(
                    f"{self.folder.parent}: the disk is full. Free some space and rerun the command.",
                    code="disk.full",
                    path=self.folder.parent,
                ) from None
            raise
        return RunState(RunStage.INTERRUPTED, outputs, self.precision, len(table))

    def _checksum_files(self, table: Table, outputs: list[Output]) -> dict[str, Any]:
        """Checksums of what does not change while the run works: its tables, and all but the values of its files."""
        fixed = [path for path in sorted(self.folder.iterdir()) if path.suffix in (".npy", ".bin", ".txt")]
        fixed = [path for path in fixed if not path.name.startswith("done.")]
        return {
            "files": {path.name: FileChecksums.compute(path) for path in fixed},
            "skeletons": {output.file: self._checksum_skeleton(table, output) for output in outputs},
        }

    def _checksum_skeleton(self, table: Table, output: Output) -> list[int]:
        """Size of a file, and CRC-32 of all but its values."""
        path = self.folder / f"{output.file}.h5"
        num_embedded_P = _count_embedded_residues(self.config, table).astype(np.int64)
        vectors_P = num_embedded_P if output.reads == "residues" else np.ones_like(num_embedded_P)
        bytes_P = vectors_P * (output.width * np.dtype(self.config.dtype).itemsize)
        starts_P = np.load(self.folder / f"{output.file}.starts.npy", mmap_mode="r")
        return [path.stat().st_size, checksum_skeleton(path, starts_P, bytes_P)]

    def _check_run(self, plan: dict[str, Any]) -> None:
        """Check the files of an unfinished run against the plan's checksums.

        Raises:
            InputError: one is missing or damaged.
        """
        for name, recorded in plan["files"].items():
            FileChecksums(**recorded).check(self.folder / name, REMEDY)
        table = Table(self.folder)
        for output in _planned_outputs(plan):
            path = self.folder / f"{output.file}.h5"
            if not path.is_file():
                raise InputError(f"{path} is missing. Remedy: {REMEDY}.", code="file.missing", path=path)
            size, _ = plan["skeletons"][output.file]
            if path.stat().st_size != size or self._checksum_skeleton(table, output) != plan["skeletons"][output.file]:
                raise_damaged(path, "its structure differs from its checksum", REMEDY)

    def _file_attributes(self) -> dict[str, Any]:
        inputs = [entry["sha256"] for name, entry in self.manifest["inputs"].items() if name != "model"]
        return {
            "model_name": self.model.name,
            "input_sha256": " ".join(inputs),
            "precision": self.precision,
            "long_proteins": self.config.long_proteins,
            "max_residues": self.config.max_residues,
            "versions": json.dumps(self.manifest["versions"]),
            "provenance": json.dumps(self.manifest),
            "settings": self.settings,
            "fingerprint": hashlib.sha256(self.settings.encode()).hexdigest(),
        }

    def publish(self) -> None:
        """Move the complete files to out_dir and delete the working folder."""
        plan = read_plan(self.folder)
        outputs = _planned_outputs(plan)
        parts = {output: self.folder / f"{output.file}.h5" for output in outputs}
        if not plan["published"]:
            for part in parts.values():
                seal_file(part)
            write_plan(self.folder, plan | {"published": True})
        for output, part in parts.items():
            if part.is_file():
                if plan["published"]:  # a run that ended between the checksums and here
                    with EmbeddingReader(part) as reader:
                        reader.check()
                os.replace(part, self.targets[output])
        fsync(self.folder.parent)
        shutil.rmtree(self.folder)
        logger.debug("wrote %s", ", ".join(str(self.targets[output]) for output in outputs))


def _list_outputs(config: EmbedConfig, model: ESM2Config) -> list[Output]:
    """List the output files: one per layer and kind, with the layer in the name if there are several layers."""
    layers, width = model.resolve_layers(config.repr_layers), model.embed_dim
    if len(set(layers)) < len(layers):
        raise InputError(
            f"repr_layers {config.repr_layers} contains a layer twice: the model has {model.num_layers}. Remove one.",
            code="embed.layer-twice",
            found=config.repr_layers,
        )
    outputs = []
    for layer in layers:
        prefix = f"layer{layer}_" if len(layers) > 1 else ""
        poolings = [*config.pooling] if config.per_protein else []
        poolings += ["bos"] if config.bos and "bos" not in poolings else []
        for pooling in poolings:
            columns = count_columns(pooling, width)
            outputs.append(Output(f"{prefix}{POOLINGS[pooling]}embeddings", layer, pooling, columns))
        if config.per_residue:
            outputs.append(Output(f"{prefix}hiddens", layer, "none", width))
    if config.logits:
        check_lm_head(model, config.model)
        outputs.append(Output("logits", model.num_layers, "logits", VOCAB_SIZE))
    return outputs


def _planned_outputs(plan: dict[str, Any]) -> list[Output]:
    """Return the outputs that an unfinished run creates, without those that existed when it started."""
    return [Output(*each) for each in plan.get("outputs", plan["settings"]["outputs"])]


def _find_differences(settings: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the settings in which two runs differ; a difference in outputs only is one of repr_layers."""
    names = sorted(key for key in settings.keys() | other.keys() if settings.get(key) != other.get(key))
    return ["repr_layers"] if names == ["outputs"] else [name for name in names if name != "outputs"]


def _read_settings(path: Path) -> dict[str, Any]:
    """Read the settings recorded in a file; none if it does not exist or is not a file of `embed`, checked or not."""
    try:
        with h5py.File(path, "r") as file:
            return json.loads(file.attrs["settings"])
    except Exception:  # h5py and json raise errors of many kinds; `_compare_settings` reports what is damaged
        return {}


def _settings_of_file(settings: str, output: Output) -> dict[str, Any]:
    """Return the settings that determine one file, without those of the other outputs."""
    content = {name: value for name, value in json.loads(settings).items() if name not in KINDS}
    return content | {"outputs": [each for each in content.get("outputs", []) if each == list(output)]}


def _has_finished_batches(folder: Path) -> bool:
    """Check whether an unfinished run has results to keep."""
    return any(path.stat().st_size for path in folder.glob("done.*"))


def _create_files(
    config: EmbedConfig, table: Table, outputs: list[Output], folder: Path, attributes: dict[str, Any]
) -> None:
    num_embedded_P = _count_embedded_residues(config, table)
    total = int(num_embedded_P.sum(dtype=np.int64))
    width_bytes = np.dtype(config.dtype).itemsize
    vectors = {"residues": total}  # number of vectors in a file
    needed = sum(output.width * width_bytes * vectors.get(output.reads, len(table)) for output in outputs)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder.parent} has {free / 1e6:,.0f} MB free, but the output needs {needed / 1e6:,.0f} MB. "
            "Free some space.",
            code="disk.full",
            path=folder.parent,
            needed=needed,
            free=free,
        )
    if config.long_proteins == "truncate" and (cut := int((table.rows["num_residues"] > config.max_residues).sum())):
        logger.warning("%d of %d proteins are truncated to %d residues", cut, len(table), config.max_residues)
    for output in outputs:
        level = "residue" if output.reads == "residues" else "protein"
        skeleton = Skeleton(level, config.layout, output.width, config.dtype, config.key)
        starts_P = np.lib.format.open_memmap(folder / f"{output.file}.starts.npy", "w+", np.int64, (len(table),))
        columns = (table.ids(), table.keys(config.key), map(int, num_embedded_P), table.digests())
        rows = (Entry(*row) for row in zip(*columns, strict=True))
        content = {"layer": output.layer, "pooling": output.pooling}
        create_file(folder / f"{output.file}.h5", skeleton, rows, len(table), total, attributes | content, starts_P)
        starts_P.flush()


def _count_embedded_residues(config: EmbedConfig, table: Table) -> np.ndarray:
    num_residues_P = table.rows["num_residues"]
    return np.minimum(num_residues_P, config.max_residues) if config.long_proteins == "truncate" else num_residues_P
