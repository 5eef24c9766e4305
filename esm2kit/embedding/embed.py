"""FASTA in, HDF5 out: embeddings of any number of proteins in bounded memory, on any number of processes.

A run lives in `<out_dir>/<name>_embed.part/` until it is whole: the table of proteins, the HDF5 files as skeletons into
which finished batches are poured, and a journal of them. Killed and started again, it goes on; the files move to their
place at the end. Under torchrun every process takes its share of the batches and pours into the same files.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import fields
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from esm2kit.core.errors import InputError
from esm2kit.core.files import fsync
from esm2kit.core.hardware import resolve_device
from esm2kit.core.process_group import Process, join_process_group, run_on_rank_0
from esm2kit.core.provenance import build_provenance
from esm2kit.embedding.batch import Output
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.hdf5 import ProteinEntry, Skeleton, create_file
from esm2kit.embedding.plan import Table, read_plan, write_plan
from esm2kit.embedding.run import DISK_FULL, EmbeddingRun, lock_run
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.models.load import find_model
from esm2kit.sequences.alphabet import VOCAB_SIZE
from esm2kit.sequences.fasta import find_fasta_files, strip_fasta_suffix
from esm2kit.sequences.windows import Windowing

logger = logging.getLogger(__name__)
# Rows that go through the linear layers together: on a CPU what its caches hold, on a GPU what fills it.
BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}
KINDS = ("per_protein", "per_residue", "bos", "logits")


class EmbedResult(NamedTuple):
    """What a run wrote.

    Args:
        embeddings: the per-protein means of the first of repr_layers, None if not asked for.
        hiddens: the per-residue vectors of the first of repr_layers, None if not asked for.
        num_proteins: proteins embedded.
        files: every file written.
    """

    embeddings: Path | None
    hiddens: Path | None
    num_proteins: int
    files: tuple[Path, ...]


class RunStage(Enum):
    """How far a job has come."""

    FINISHED = "every file is in its place"
    COMPUTED = "the files are whole and move to their places"
    INTERRUPTED = "a run of these settings goes on"
    NEW = "files are missing"


class RunState(NamedTuple):
    """What a job finds when it is asked for.

    Args:
        stage: how far it has come.
        outputs: the files that its run makes; the others are there.
        num_proteins: known of what has begun.
    """

    stage: RunStage
    outputs: list[Output]
    num_proteins: int | None = None


def embed(config: EmbedConfig, replace: bool = False) -> EmbedResult:
    """Embed every protein of a FASTA; a file that is there from the same input, model and settings is left as it is.

    A run that asks for more kinds of file than one before it makes those that are missing, and no others. The model's
    weights are read only if there is something to compute.

    Args:
        config: every process is given the same.
        replace: what is there from other settings gives way, as with restart, but what is there from the same is kept:
            for a folder that the caller owns.

    Returns:
        The files written, by all processes the same.

    Raises:
        InputError: bad input, files or an unfinished run of other settings, or a full disk; one line.
    """
    process = join_process_group()
    job = Job(config, _choose_device(config, process), replace)
    with lock_run(job.folder, process):
        state = run_on_rank_0(process, job.find_state)
        if state.stage in (RunStage.NEW, RunStage.INTERRUPTED):
            encoder = Encoder(job.model.load(), config.precision, job.device)
            if state.stage is RunStage.NEW:
                state = run_on_rank_0(process, lambda: job.start(state.outputs))
            segments = Windowing(config.max_residues, config.window_overlap, job.batch_tokens)
            num_embedded_P = _count_embedded_residues(config, Table(job.folder))
            run = (job.folder, job.files, num_embedded_P, encoder, state.outputs, segments, config.dtype)
            EmbeddingRun(*run, process, config.workers).work()
        if state.stage is not RunStage.FINISHED:
            run_on_rank_0(process, job.publish)
    first = {output.pooling: target for output, target in reversed(job.targets.items())}
    return EmbedResult(first.get("mean"), first.get("none"), state.num_proteins, tuple(job.targets.values()))


def _choose_device(config: EmbedConfig, process: Process) -> torch.device:
    if resolve_device(config.device) == "cpu":
        return torch.device("cpu")
    # srun may show each task a GPU of its own, which then is the first it sees
    return torch.device("cuda", process.local_rank % torch.cuda.device_count())


class Job:
    """One call of `embed`: its input, model and files, and the folder in which it is worked on.

    Args:
        config: what is asked for.
        device: where the model runs.
        replace: as `embed`.

    Raises:
        InputError: there is no such input, model or layer.
    """

    def __init__(self, config: EmbedConfig, device: torch.device, replace: bool) -> None:
        self.config, self.device, self.replace = config, device, replace
        self.files = find_fasta_files(config.fasta)
        self.model = find_model(config.model, config.untrained_seed)
        self.batch_tokens = config.batch_tokens or BATCH_TOKENS[device.type]
        out_dir, name = Path(config.out_dir), config.name or strip_fasta_suffix(self.files[0])
        self.folder = out_dir / f"{name}_embed.part"
        outputs = _list_outputs(config, self.model.config)
        self.targets = {output: out_dir / f"{name}_{output.file}.h5" for output in outputs}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Where the files come from; the input is hashed, and the model where its format does not declare a digest."""
        names = ["fasta"] if len(self.files) == 1 else [f"fasta_{number}" for number in range(len(self.files))]
        inputs = dict(zip(names, self.files, strict=True)) | {"model": self.model.sha256}
        return build_provenance("embed", self.config, inputs) | {"model": self.model.record()}

    @cached_property
    def settings(self) -> str:
        """JSON of what the content depends on, and how the work is cut: two runs that agree in it may be one."""
        ignored = ("fasta", "out_dir", "name", "model", "device", "workers", "restart", "repr_layers", "batch_tokens")
        settings = {item.name: getattr(self.config, item.name) for item in fields(self.config)}
        settings = {name: value for name, value in settings.items() if name not in ignored}
        settings |= {name: entry["sha256"] for name, entry in self.manifest["inputs"].items()}
        settings |= {"outputs": [list(output) for output in self.targets], "batch_tokens": self.batch_tokens}
        return json.dumps(settings, sort_keys=True, default=str)

    def find_state(self) -> RunState:
        """Look for finished files and an unfinished run.

        Raises:
            InputError: one of them has other settings, and may not be replaced.
        """
        plan = None if self.config.restart else read_plan(self.folder)
        if plan and (differing := _find_differences(json.loads(self.settings), plan["settings"])):
            if not self.replace:
                raise InputError(
                    f"{self.folder} holds an unfinished run with another {', '.join(differing)}: --restart throws it "
                    "away, another --name keeps both",
                    code="embed.another-run",
                    path=self.folder,
                    differing=differing,
                )
            plan = None
        if plan:
            planned = _planned_outputs(plan)
            rest = {output: target for output, target in self.targets.items() if output not in planned}
            if len(self._find_existing(rest)) == len(rest):  # else a file that was there then is there no more
                if not plan["published"]:
                    logger.info("going on with the unfinished run in %s", self.folder)
                stage = RunStage.COMPUTED if plan["published"] else RunStage.INTERRUPTED
                return RunState(stage, planned, plan["num_proteins"])
        there = {} if self.config.restart else self._find_existing(self.targets)
        for output in there:
            logger.info("%s is there already, from the same input, model and settings", self.targets[output])
        if missing := [output for output in self.targets if output not in there]:
            return RunState(RunStage.NEW, missing)
        return RunState(RunStage.FINISHED, [], next(iter(there.values())))

    def _find_existing(self, targets: dict[Output, Path]) -> dict[Output, int]:
        """The number of proteins of each target that is there and came from these very settings.

        Raises:
            InputError: a target has other settings, and may not be replaced.
        """
        there = {}
        for output, target in targets.items():
            if not target.exists():
                continue
            attributes: dict[str, Any] = {}
            if h5py.is_hdf5(target):
                with h5py.File(target, "r") as file:
                    names = ("num_proteins", "settings")  # and not the ids, which are attributes too
                    attributes = {name: file.attrs[name] for name in names if name in file.attrs}
            made_with = attributes.get("settings")
            differing = (
                _find_differences(_settings_of_file(self.settings, output), _settings_of_file(made_with, output))
                if made_with
                else []
            )
            if made_with and not differing:
                there[output] = int(attributes["num_proteins"])
            elif not self.replace:
                made = f"with another {', '.join(differing)}" if differing else "from something else"
                remedy = "--restart replaces it, another --name keeps both"
                raise InputError(
                    f"{target} is there already, made {made}: {remedy}",
                    code="embed.file-there",
                    path=target,
                    differing=differing,
                )
        return there

    def start(self, outputs: list[Output]) -> RunState:
        """Begin a run: read the FASTA, make the table, the skeletons of its files, and last the plan.

        Raises:
            InputError: bad input, or a disk without room; nothing is left then.
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
                    f"id {name!r} cannot name an HDF5 dataset: choose key index or hash", code="embed.id", id=name
                )
            _create_files(self.config, table, outputs, self.folder, self._file_attributes())
            # on the disk before the plan is: a run that is taken up after a power cut trusts what the plan stands for
            for path in self.folder.iterdir():
                fsync(path)
            plan = {"settings": json.loads(self.settings), "num_proteins": len(table), "published": False}
            write_plan(self.folder, plan | {"outputs": [list(output) for output in outputs]})
        except InputError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if error.errno in DISK_FULL:
                raise InputError(
                    f"{self.folder.parent}: the disk is full; free some space and run it again",
                    code="disk.full",
                    path=self.folder.parent,
                ) from None
            raise
        return RunState(RunStage.INTERRUPTED, outputs, len(table))

    def _file_attributes(self) -> dict[str, Any]:
        inputs = [entry["sha256"] for name, entry in self.manifest["inputs"].items() if name != "model"]
        return {
            "model_name": self.model.name,
            "input_sha256": " ".join(inputs),
            "precision": self.config.precision,
            "long_proteins": self.config.long_proteins,
            "max_residues": self.config.max_residues,
            "versions": json.dumps(self.manifest["versions"]),
            "provenance": json.dumps(self.manifest),
            "settings": self.settings,
            "fingerprint": hashlib.sha256(self.settings.encode()).hexdigest(),
        }

    def publish(self) -> None:
        """Move the whole files to their places, and remove the rest."""
        plan = read_plan(self.folder)
        write_plan(self.folder, plan | {"published": True})
        made = _planned_outputs(plan)
        for output in made:
            part = self.folder / f"{output.file}.h5"
            if part.is_file():
                os.replace(part, self.targets[output])
        fsync(self.folder.parent)
        shutil.rmtree(self.folder)
        logger.info("wrote %s", ", ".join(str(self.targets[output]) for output in made))


def _list_outputs(config: EmbedConfig, model: ESM2Config) -> list[Output]:
    """One file a layer and kind; a single layer's files carry no layer in their names."""
    layers, width = model.resolve_layers(config.repr_layers), model.embed_dim
    if len(set(layers)) < len(layers):
        raise InputError(
            f"repr_layers {config.repr_layers} name a layer twice (of {model.num_layers}): once will do",
            code="embed.layer-twice",
            found=config.repr_layers,
        )
    outputs = []
    for layer in layers:
        prefix = f"layer{layer}_" if len(layers) > 1 else ""
        if config.per_protein:
            outputs.append(Output(f"{prefix}embeddings", layer, "mean", width))
        if config.bos:
            outputs.append(Output(f"{prefix}bos_embeddings", layer, "bos", width))
        if config.per_residue:
            outputs.append(Output(f"{prefix}hiddens", layer, "none", width))
    if config.logits:
        outputs.append(Output("logits", model.num_layers, "logits", VOCAB_SIZE))
    return outputs


def _planned_outputs(plan: dict[str, Any]) -> list[Output]:
    """What an unfinished run makes: what it was asked for, less what was there."""
    return [Output(*each) for each in plan.get("outputs", plan["settings"]["outputs"])]


def _find_differences(ours: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the settings in which two runs differ; the outputs follow from others, or else from repr_layers."""
    names = sorted(key for key in ours.keys() | other.keys() if ours.get(key) != other.get(key))
    return ["repr_layers"] if names == ["outputs"] else [name for name in names if name != "outputs"]


def _settings_of_file(settings: str, output: Output) -> dict[str, Any]:
    """What one file's content depends on: not on what else its run made."""
    own = {name: value for name, value in json.loads(settings).items() if name not in KINDS}
    return own | {"outputs": [each for each in own["outputs"] if each == list(output)]}


def _create_files(
    config: EmbedConfig, table: Table, outputs: list[Output], folder: Path, attributes: dict[str, Any]
) -> None:
    num_embedded_P = _count_embedded_residues(config, table)
    total = int(num_embedded_P.sum(dtype=np.int64))
    width_bytes = np.dtype(config.dtype).itemsize
    vectors = {"residues": total}  # of each file, one a protein or one a residue
    needed = sum(output.width * width_bytes * vectors.get(output.reads, len(table)) for output in outputs)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder.parent} has {free / 1e6:,.0f} MB free, the result needs {needed / 1e6:,.0f} MB: make room first",
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
        rows = (
            ProteinEntry(*row)
            for row in zip(table.ids(), table.keys(config.key), map(int, num_embedded_P), strict=True)
        )
        own = {"layer": output.layer, "pooling": output.pooling}
        create_file(folder / f"{output.file}.h5", skeleton, rows, len(table), total, attributes | own, starts_P)
        starts_P.flush()


def _count_embedded_residues(config: EmbedConfig, table: Table) -> np.ndarray:
    num_residues_P = table.rows["num_residues"]
    return np.minimum(num_residues_P, config.max_residues) if config.long_proteins == "truncate" else num_residues_P
