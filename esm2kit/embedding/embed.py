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
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from esm2kit.core.errors import InputError
from esm2kit.core.files import fsync
from esm2kit.core.hardware import device_of
from esm2kit.core.process_group import Process, join, on_rank_0
from esm2kit.core.provenance import provenance
from esm2kit.embedding.batch import Output
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.hdf5 import Row, Skeleton, create
from esm2kit.embedding.plan import Table, read_plan, write_plan
from esm2kit.embedding.run import DISK_FULL, Run, only_one
from esm2kit.models.encoder import Encoder
from esm2kit.models.load import load_model
from esm2kit.sequences.alphabet import VOCAB_SIZE
from esm2kit.sequences.fasta import bare_name, fasta_files
from esm2kit.sequences.windows import Segments

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


def embed(config: EmbedConfig, replace: bool = False) -> EmbedResult:
    """Embed every protein of a FASTA; a file that is there from the same input, model and settings is left as it is.

    A run that asks for more kinds of file than one before it makes those that are missing, and no others.

    Args:
        config: every process is given the same.
        replace: what is there from other settings gives way, as with restart, but what is there from the same is kept:
            for a folder that the caller owns.
    Returns: the files written, by all processes the same.
    Raises: InputError in one line for bad input, files or an unfinished run of other settings, or a full disk.
    """
    process = join()
    files = fasta_files(config.fasta)
    device = _device(config, process)
    model, source = load_model(config.model, config.untrained_seed)
    encoder = Encoder(model, config.precision, device)
    outputs = _outputs(config, encoder)
    batch_tokens = config.batch_tokens or BATCH_TOKENS[device.type]
    name = config.name or bare_name(files[0])
    folder = Path(config.out_dir) / f"{name}_embed.part"
    targets = {output: Path(config.out_dir) / f"{name}_{output.file}.h5" for output in outputs}
    with only_one(folder, process):
        table_size = on_rank_0(process, lambda: _prepare(config, files, source, targets, folder, batch_tokens, replace))
        if table_size is None:
            table = Table(folder)
            segments = Segments(config.max_residues, config.window_overlap, batch_tokens)
            kept_P = _kept_residues(config, table)
            missing = _planned(read_plan(folder))
            Run(folder, files, kept_P, encoder, missing, segments, config.dtype, process, config.workers).work()
            table_size = len(table)
            on_rank_0(process, lambda: _publish(folder, targets))
    first = {output.pooling: target for output, target in reversed(targets.items())}
    return EmbedResult(first.get("mean"), first.get("none"), table_size, tuple(targets.values()))


def _device(config: EmbedConfig, process: Process) -> torch.device:
    if device_of(config.device) == "cpu":
        return torch.device("cpu")
    # srun may show each task a GPU of its own, which then is the first it sees
    return torch.device("cuda", process.local_rank % torch.cuda.device_count())


def _outputs(config: EmbedConfig, encoder: Encoder) -> list[Output]:
    """One file a layer and kind; a single layer's files carry no layer in their names."""
    layers, width = encoder.resolve(config.repr_layers), encoder.config.embed_dim
    if len(set(layers)) < len(layers):
        raise InputError(
            f"repr_layers {config.repr_layers} name a layer twice (of {encoder.config.num_layers}): once will do"
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
        outputs.append(Output("logits", encoder.config.num_layers, "logits", VOCAB_SIZE))
    return outputs


def _settings(
    config: EmbedConfig, manifest: dict[str, Any], outputs: list[Output], batch_tokens: int
) -> dict[str, Any]:
    """What the content depends on, and how the work is cut: two runs that agree in it may be one."""
    aside = ("fasta", "out_dir", "name", "model", "device", "workers", "restart", "repr_layers", "batch_tokens")
    chosen = {item.name: getattr(config, item.name) for item in fields(config) if item.name not in aside}
    hashes = {name: entry["sha256"] for name, entry in manifest["inputs"].items()}
    return {**chosen, **hashes, "outputs": [list(output) for output in outputs], "batch_tokens": batch_tokens}


def _prepare(
    config: EmbedConfig, files: list[Path], source: dict[str, Any], targets: dict[Output, Path], folder: Path,
    batch_tokens: int, replace: bool,
) -> int | None:  # fmt: skip
    """Take up an unfinished run, or begin one: read the FASTA, make the table and the skeletons.

    Returns: the number of proteins if the files are there already, else None.
    """
    names = ["fasta"] if len(files) == 1 else [f"fasta_{number}" for number in range(len(files))]
    inputs = dict(zip(names, files, strict=True)) | {"model": source["sha256"]}
    manifest = provenance("embed", config, inputs) | {"model": source}
    settings = json.dumps(_settings(config, manifest, list(targets), batch_tokens), sort_keys=True, default=str)
    fingerprint = hashlib.sha256(settings.encode()).hexdigest()
    plan = None if config.restart else read_plan(folder)
    if plan and (differing := _differing(json.loads(settings), plan["settings"])):
        if not replace:
            raise InputError(
                f"{folder} holds an unfinished run with another {', '.join(differing)}: --restart throws it away, "
                "another --name keeps both"
            )
        plan = None
    if plan:
        rest = {output: target for output, target in targets.items() if output not in _planned(plan)}
        if len(_there(rest, settings, replace)) == len(rest):  # else a file that was there then is there no more
            if plan["published"]:  # killed while the files moved to their places
                _publish(folder, targets)
                return plan["num_proteins"]
            logger.info("going on with the unfinished run in %s", folder)
            return None
    there = {} if config.restart else _there(targets, settings, replace)
    missing = [output for output in targets if output not in there]
    for output in there:
        logger.info("%s is there already, from the same input, model and settings", targets[output])
    if not missing:
        return next(iter(there.values()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        table = Table.make(files, folder)
        if config.long_proteins == "error":
            table.refuse_long(config.max_residues)
        if config.key == "id" and (slashed := next((name for name in table.ids() if "/" in name or name == "."), None)):
            raise InputError(f"id {slashed!r} cannot name an HDF5 dataset: choose key index or hash")
        attributes = {
            "model_name": source["name"],
            "input_sha256": " ".join(manifest["inputs"][name]["sha256"] for name in names),
            "precision": config.precision,
            "long_proteins": config.long_proteins,
            "max_residues": config.max_residues,
            "versions": json.dumps(manifest["versions"]),
            "provenance": json.dumps(manifest),
            "settings": settings,
            "fingerprint": fingerprint,
        }
        _make_files(config, table, missing, folder, attributes)
        # on the disk before the plan is: a run that is taken up after a power cut trusts what the plan stands for
        for path in folder.iterdir():
            fsync(path)
        plan = {"settings": json.loads(settings), "num_proteins": len(table), "published": False}
        write_plan(folder, plan | {"outputs": [list(output) for output in missing]})
    except InputError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if error.errno in DISK_FULL:
            raise InputError(f"{folder.parent}: the disk is full; free some space and run it again") from None
        raise
    return None


def _planned(plan: dict[str, Any]) -> list[Output]:
    """What an unfinished run makes: what it was asked for, less what was there."""
    return [Output(*each) for each in plan.get("outputs", plan["settings"]["outputs"])]


def _differing(ours: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the settings in which two runs differ; the outputs follow from others, or else from repr_layers."""
    names = sorted(key for key in ours.keys() | other.keys() if ours.get(key) != other.get(key))
    return ["repr_layers"] if names == ["outputs"] else [name for name in names if name != "outputs"]


def _of_one(settings: str, output: Output) -> dict[str, Any]:
    """What one file's content depends on: not on what else its run made."""
    own = {name: value for name, value in json.loads(settings).items() if name not in KINDS}
    return own | {"outputs": [each for each in own["outputs"] if each == list(output)]}


def _there(targets: dict[Output, Path], settings: str, replace: bool) -> dict[Output, int]:
    """The number of proteins of each target that is there and came from these very settings.

    Raises: InputError for a target of other settings, unless it may be replaced.
    """
    there = {}
    for output, target in targets.items():
        if not target.exists():
            continue
        attributes: dict[str, Any] = {}
        if h5py.is_hdf5(target):
            with h5py.File(target, "r") as file:
                told = ("num_proteins", "settings")  # and not the ids, which are attributes too
                attributes = {name: file.attrs[name] for name in told if name in file.attrs}
        made_with = attributes.get("settings")
        differing = _differing(_of_one(settings, output), _of_one(made_with, output)) if made_with else []
        if made_with and not differing:
            there[output] = int(attributes["num_proteins"])
        elif not replace:
            made = f"with another {', '.join(differing)}" if differing else "from something else"
            remedy = "--restart replaces it, another --name keeps both"
            raise InputError(f"{target} is there already, made {made}: {remedy}")
    return there


def _make_files(
    config: EmbedConfig, table: Table, outputs: list[Output], folder: Path, attributes: dict[str, Any]
) -> None:
    kept_P = _kept_residues(config, table)
    total = int(kept_P.sum(dtype=np.int64))
    width_bytes = np.dtype(config.dtype).itemsize
    needed = sum(output.width * width_bytes * (len(table) if output.pooled else total) for output in outputs)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder.parent} has {free / 1e6:,.0f} MB free, the result needs {needed / 1e6:,.0f} MB: make room first"
        )
    if config.long_proteins == "truncate" and (cut := int((table.rows["num_residues"] > config.max_residues).sum())):
        logger.warning("%d of %d proteins are truncated to %d residues", cut, len(table), config.max_residues)
    for output in outputs:
        level = "protein" if output.pooled else "residue"
        skeleton = Skeleton(level, config.layout, output.width, config.dtype, config.key)
        starts_P = np.lib.format.open_memmap(folder / f"{output.file}.starts.npy", "w+", np.int64, (len(table),))
        rows = (Row(*row) for row in zip(table.ids(), table.keys(config.key), map(int, kept_P), strict=True))
        own = {"layer": output.layer, "pooling": output.pooling}
        create(folder / f"{output.file}.h5", skeleton, rows, len(table), total, attributes | own, starts_P)
        starts_P.flush()


def _kept_residues(config: EmbedConfig, table: Table) -> np.ndarray:
    num_residues_P = table.rows["num_residues"]
    return np.minimum(num_residues_P, config.max_residues) if config.long_proteins == "truncate" else num_residues_P


def _publish(folder: Path, targets: dict[Output, Path]) -> None:
    """Move the whole files to their places, and remove the rest."""
    plan = read_plan(folder)
    write_plan(folder, plan | {"published": True})
    made = _planned(plan)
    for output in made:
        part = folder / f"{output.file}.h5"
        if part.is_file():
            os.replace(part, targets[output])
    fsync(folder.parent)
    shutil.rmtree(folder)
    logger.info("wrote %s", ", ".join(str(targets[output]) for output in made))
