"""FASTA and clusters in, a training set out: checked, split by cluster, joined, and one memory-mapped file a split.

The stages write into `<out_dir>/work`, each file whole or not at all, and a second call goes on from what it finds there.
The output appears at the end, `manifest.json` last.
"""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from esm2kit import clusters
from esm2kit.clusters import MANIFEST, permutation
from esm2kit.errors import InputError
from esm2kit.fasta import fasta_files
from esm2kit.ingest import Staged, StagedWriter, ingest
from esm2kit.join import Engine, Joined, NpyWriter, join_cluster_tsv, join_mapping, join_singletons, joined_files
from esm2kit.leakage import leakage_report
from esm2kit.provenance import fsync, provenance, sha256_file, to_json, write_json
from esm2kit.store import ROWS_PER_BATCH, SequenceStore, read_batches

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_INDEX = (clusters.OFFSETS, clusters.MEMBERS, clusters.REPRESENTATIVES)
_LEAKAGE = "leakage.json"
_OUTPUTS = (MANIFEST, *(f"{split}.arrow" for split in SPLITS), *_INDEX, _LEAKAGE)
_CLUSTERS_AT_ONCE = 1 << 20
# what decides the files' bytes, beside the inputs themselves
_DECIDING = ("val_size", "test_size", "seed", "leakage_identity")


@dataclass(frozen=True)
class PreprocessConfig:
    """Settings of `esm2kit preprocess`.

    Every FASTA may be one file, several, or a folder, plain or compressed (.gz, .zst).

    Args:
        train_fasta: the records to train on; with a mapping, the UniRef50 representatives of the train clusters.
        out_dir: folder of the dataset.
        sampler_fasta: with a mapping, the records drawn from: every UniRef90 member and every UniRef50 representative.
        mapping: esm2nv's mapping.tsv, a header line, then `UR50 id <TAB> UR90 id,UR90 id,...`.
        cluster_tsv: MMseqs2's `representative <TAB> member` lines for train_fasta; or two such files, finer level first.
        valid_fasta: records to validate on, as they are.
        test_fasta: records to test on, as they are.
        val_size: clusters to cut from train for validation, a number (int) or a share (float below 1).
        test_size: the same for the test set.
        seed: decides which clusters are cut.
        leakage_identity: report held-out records with a train record of this identity or more (by MMseqs2, if it is
            installed); 0 turns the search off, which takes hours for UniRef.
        memory_limit_gb: memory to stay under, in GB; at least 0.5.
        threads: for the join and MMseqs2; None takes every core.
        overwrite: replace a dataset made from other inputs or settings.
    """

    train_fasta: Path | list[Path]
    out_dir: Path
    sampler_fasta: Path | list[Path] | None = None
    mapping: Path | None = None
    cluster_tsv: Path | list[Path] | None = None
    valid_fasta: Path | list[Path] | None = None
    test_fasta: Path | list[Path] | None = None
    val_size: int | float = 0
    test_size: int | float = 0
    seed: int = 0
    leakage_identity: float = 0.5
    memory_limit_gb: float = 4.0
    threads: int | None = None
    overwrite: bool = False


def preprocess(config: PreprocessConfig) -> dict[str, Any]:
    """Make a dataset; go on with an unfinished one; say so if it is there.

    Args:
        config: inputs and settings.
    Returns: the manifest, as in `<out_dir>/manifest.json`: provenance, and under "dataset" what was made.
    Raises: InputError for input that cannot be used (nothing is left behind), and for an out_dir that holds a dataset
        made otherwise (which is left alone).
    """
    began = time.monotonic()
    inputs = _inputs(config)
    out_dir = Path(config.out_dir)
    existed = out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    with _lock(out_dir):
        manifest = _finished(config, inputs)
        if manifest:
            logger.info("%s: already done; nothing to do", out_dir)
            return manifest
        try:
            manifest = _make(config, inputs)
        except InputError:
            _clear(out_dir, existed)
            raise
        except (OSError, duckdb.Error) as error:
            problem = _storage_problem(error, config)
            if problem is None:
                raise
            _clear(out_dir, existed)
            raise problem from error
    made = manifest["dataset"]
    logger.info(
        "%s: %s in %.0f s", out_dir, "; ".join(
            f"{split}: " + ", ".join(f"{count:,} {name}" for name, count in made[split].items())
            for split in SPLITS if split in made
        ), time.monotonic() - began,
    )  # fmt: skip
    return manifest


def _inputs(config: PreprocessConfig) -> dict[str, list[Path]]:
    """The input files by role, once the settings are known to go together."""
    if (config.mapping is None) != (config.sampler_fasta is None):
        raise InputError("mapping and sampler_fasta go together: give both (the esm2nv trio) or neither")
    if config.mapping is not None and config.cluster_tsv is not None:
        raise InputError("mapping and cluster_tsv are two ways to say the same: give one of them")
    for size, fasta in (("val_size", "valid_fasta"), ("test_size", "test_fasta")):
        value = getattr(config, size)
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise InputError(f"{size} {value}: give a number of clusters (an integer) or a share from 0 to below 1")
        if value and getattr(config, fasta) is not None:
            raise InputError(f"{size} and {fasta} both name held-out records: give one of them")
    if config.memory_limit_gb < 0.5:
        raise InputError(f"memory_limit_gb {config.memory_limit_gb} is too little: give at least 0.5")
    if not 0 <= config.leakage_identity <= 1:
        raise InputError(f"leakage_identity {config.leakage_identity} is no share: give 0 to 1")
    roles = ("train_fasta", "sampler_fasta", "valid_fasta", "test_fasta")
    inputs = {role: fasta_files(paths) for role in roles if (paths := getattr(config, role)) is not None}
    for role in ("mapping", "cluster_tsv"):
        paths = getattr(config, role)
        if paths is None:
            continue
        inputs[role] = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
        for path in inputs[role]:
            if not path.is_file():
                raise InputError(f"{path}: no such file; correct {role}")
    if len(inputs.get("cluster_tsv", [])) > 2:
        raise InputError(
            f"cluster_tsv names {len(inputs['cluster_tsv'])} files: give one level, or the finer and the coarser"
        )
    return inputs


@contextmanager
def _lock(out_dir: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    handle = os.open(out_dir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(
            f"{out_dir}: another preprocess is writing here; wait for it or choose another out_dir"
        ) from None
    finally:
        os.close(handle)


def _finished(config: PreprocessConfig, inputs: dict[str, list[Path]]) -> dict[str, Any] | None:
    """The manifest of a dataset made from the same; None if there is none yet."""
    path = Path(config.out_dir) / MANIFEST
    if not path.exists():
        return None
    manifest = json.loads(path.read_text())
    difference = _difference(manifest, config, inputs)
    if difference is None:
        return manifest
    if not config.overwrite:
        raise InputError(
            f"{config.out_dir}: holds a dataset made otherwise: {difference}; choose another out_dir or overwrite"
        )
    _clear(Path(config.out_dir), existed=True)
    return None


def _difference(manifest: dict[str, Any], config: PreprocessConfig, inputs: dict[str, list[Path]]) -> str | None:
    for name in _DECIDING:
        then, now = manifest["config"][name], getattr(config, name)
        if then != now:
            return f"{name} was {then} and is {now}"
    for role in sorted(inputs.keys() | manifest["inputs"].keys()):
        then, now = manifest["inputs"].get(role, []), inputs.get(role, [])
        if len(then) != len(now):
            return f"{role} was {len(then)} files and is {len(now)}"
        for was, path in zip(then, now, strict=True):
            status = path.stat()
            if (was["bytes"], was["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
                continue
            if was["bytes"] != status.st_size or was["sha256"] != sha256_file(path):
                return f"{role} {path} is another file"
    return None


def _clear(out_dir: Path, existed: bool) -> None:
    """Remove what preprocess writes, the manifest first, and the folder if this call made it."""
    for name in _OUTPUTS:
        (out_dir / name).unlink(missing_ok=True)
    shutil.rmtree(out_dir / "work", ignore_errors=True)
    if not existed and not any(out_dir.iterdir()):
        out_dir.rmdir()


def _storage_problem(error: Exception, config: PreprocessConfig) -> InputError | None:
    """A full disk or too little memory, as the person can mend it."""
    is_full = isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG)
    if is_full or "No space left" in str(error) or "File too large" in str(error):
        free = shutil.disk_usage(config.out_dir).free
        return InputError(
            f"{config.out_dir}: the disk is full ({free / 1e9:.1f} GB free now); free some space or move out_dir"
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return InputError(f"memory_limit_gb {config.memory_limit_gb} does not hold the join; raise it or lower threads")
    return None


def _make(config: PreprocessConfig, inputs: dict[str, list[Path]]) -> dict[str, Any]:
    out_dir = Path(config.out_dir)
    work = out_dir / "work"
    _begin(config, inputs, work)
    if not (work / MANIFEST).exists():
        _stages(config, inputs, work)
    # from here on the dataset is whole; moving it again after a kill finds fewer files to move
    for name in _OUTPUTS[1:]:
        if (work / "final" / name).exists():
            os.replace(work / "final" / name, out_dir / name)
    fsync(out_dir)
    os.replace(work / MANIFEST, out_dir / MANIFEST)
    fsync(out_dir)
    shutil.rmtree(work)
    return json.loads((out_dir / MANIFEST).read_text())


def _begin(config: PreprocessConfig, inputs: dict[str, list[Path]], work: Path) -> None:
    """Keep the work folder if it was begun for the same, and start it afresh if not."""
    files = {
        role: [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        for role, paths in inputs.items()
    }
    plan = {name: getattr(config, name) for name in _DECIDING} | {"inputs": files, "boot": _boot_id()}
    if (work / "plan.json").exists() and json.loads((work / "plan.json").read_text()) == to_json(plan):
        logger.info("%s: going on with what an earlier call left", config.out_dir)
    else:
        _clear(Path(config.out_dir), existed=True)
        write_json(work / "plan.json", plan)
    for stale in work.rglob("*.part"):
        stale.unlink()
    (work / "final").mkdir(exist_ok=True)


def _boot_id() -> str | None:
    """Work files are not synced to the disk one by one, so after a power cut they cannot be trusted."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _stages(config: PreprocessConfig, inputs: dict[str, list[Path]], work: Path) -> None:
    final = work / "final"
    has_mapping = "mapping" in inputs
    train = ingest("train", inputs["train_fasta"], work, keep_sequences=not has_mapping)
    staged = {"train_fasta": train}
    records = train
    if has_mapping:
        records = staged["sampler_fasta"] = ingest("sampler", inputs["sampler_fasta"], work)
    for role in ("valid_fasta", "test_fasta"):
        if role in inputs:
            staged[role] = ingest(role.removesuffix("_fasta"), inputs[role], work)
    threads = config.threads or os.cpu_count() or 1
    # DuckDB's limit leaves out what it and Python need beside its buffers
    memory_gb = max(config.memory_limit_gb * 0.7 - 0.2, 0.15)
    with Engine(work, memory_gb, threads) as engine:
        left_out = _join(engine, config, inputs, records, train, work)
        made = _split(config, records, joined_files(work), work)
        for split in SPLITS[1:]:
            if f"{split}_fasta" in staged:
                made[split], left_out[f"repeated_{split}_records"] = _own_split(
                    engine, staged[f"{split}_fasta"], split, work
                )
        stores = {split: final / f"{split}.arrow" for split in SPLITS if split in made}
        keys = {split: work / f"final_{split}.parquet" for split in stores}
        report = leakage_report(engine, stores, keys, work, config.leakage_identity, threads)
    write_json(final / _LEAKAGE, report)
    if "valid" not in made:
        logger.info("no validation set: give valid_fasta or val_size to have one")
    manifest = provenance("preprocess", config)
    manifest["inputs"] = _input_stamps(inputs, staged, left_out)
    manifest["dataset"] = made | {"left_out": left_out}
    for path in final.iterdir():
        fsync(path)
    write_json(work / MANIFEST, manifest)


def _join(
    engine: Engine, config: PreprocessConfig, inputs: dict[str, list[Path]], records: Staged, train: Staged, work: Path
) -> dict[str, Any]:
    marker = work / "joined.json"
    if not marker.exists():
        if "mapping" in inputs:
            counts = join_mapping(engine, records, train, inputs["mapping"][0], work)
        elif "cluster_tsv" in inputs:
            counts = join_cluster_tsv(engine, records, inputs["cluster_tsv"], work)
        else:
            counts = join_singletons(engine, records, work)
        if counts["unclustered_records"]:
            logger.warning("%s records are in no cluster and are left out", f"{counts['unclustered_records']:,}")
        write_json(marker, counts)
    return json.loads(marker.read_text())


def _input_stamps(
    inputs: dict[str, list[Path]], staged: dict[str, Staged], left_out: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    stamps = {
        role: [{key: file[key] for key in ("path", "bytes", "mtime_ns", "sha256")} for file in records.files]
        for role, records in staged.items()
    }
    for role in ("mapping", "cluster_tsv"):
        for place, path in enumerate(inputs.get(role, [])):
            sha256 = left_out.pop("mapping_sha256" if role == "mapping" else f"cluster_tsv_{place}_sha256")
            status = path.stat()
            stamp = {"path": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256}
            stamps.setdefault(role, []).append(stamp)
    return stamps


def _count(name: str, size: int | float, num_clusters: int) -> int:
    return round(size * num_clusters) if isinstance(size, float) else size


def _split(config: PreprocessConfig, records: Staged, joined: Joined, work: Path) -> dict[str, dict[str, int]]:
    """Cut whole clusters off, write the splits, and renumber what stays."""
    offsets, members, representatives = (np.load(path, mmap_mode="r") for path in joined)
    num_clusters = representatives.size
    num_val = _count("val_size", config.val_size, num_clusters)
    num_test = _count("test_size", config.test_size, num_clusters)
    for name, value in (("val_size", num_val), ("test_size", num_test)):
        if not value and getattr(config, name):
            raise InputError(f"{name} {getattr(config, name)} of {num_clusters:,} clusters is none; raise it")
    if num_val + num_test >= num_clusters:
        raise InputError(
            f"val_size {config.val_size} and test_size {config.test_size} take {num_val + num_test:,} clusters, and "
            f"{records.files[0]['path']} has {num_clusters:,}: none is left to train on; lower them"
        )
    held_out = permutation(config.seed, 0, np.arange(num_val + num_test), num_clusters)
    made: dict[str, dict[str, int]] = {}
    # held-out splits first: the last step may move the staged store away
    for split, chosen in (("valid", held_out[:num_val]), ("test", held_out[num_val:])):
        if chosen.size:
            rows = np.asarray(representatives[np.sort(chosen)])
            made[split] = {"clusters": chosen.size} | _write_rows(records, rows, split, work)
    held_out.sort()
    kept = _write_index(held_out, offsets, members, representatives, records.num_records, work)
    train = {"clusters": num_clusters - held_out.size} | _write_kept(records, kept, "train", work)
    return {"train": train} | made


def _write_index(
    held_out: np.ndarray,
    offsets: np.ndarray,
    members: np.ndarray,
    representatives: np.ndarray,
    num_records: int,
    work: Path,
) -> np.ndarray:
    """The train clusters' index, over the rows that stay; returns which do, (P,) bool."""
    kept = np.zeros(num_records, dtype=bool)

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for first in range(0, representatives.size, _CLUSTERS_AT_ONCE):
            stop = min(first + _CLUSTERS_AT_ONCE, representatives.size)
            stays = np.ones(stop - first, dtype=bool)
            out = held_out[np.searchsorted(held_out, first) : np.searchsorted(held_out, stop)]
            stays[out - first] = False
            num_members = np.diff(offsets[first : stop + 1])
            rows = members[offsets[first] : offsets[stop]][np.repeat(stays, num_members)]
            yield num_members[stays], rows, representatives[first:stop][stays]

    for _, rows, heads in chunks():
        kept[rows] = kept[heads] = True
    rank = _Rank(kept)
    paths = [work / "final" / name for name in _INDEX]
    with NpyWriter(paths[0]) as offset_writer, NpyWriter(paths[1]) as member_writer, NpyWriter(paths[2]) as head_writer:
        offset_writer.append(np.zeros(1, np.int64))
        for num_members, rows, heads in chunks():
            offset_writer.append(member_writer.size + np.cumsum(num_members))
            member_writer.append(rank(rows))
            head_writer.append(rank(heads))
    return kept


class _Rank:
    """How many rows are kept before a row, from two bits a row."""

    def __init__(self, kept: np.ndarray) -> None:
        bits = np.packbits(kept, bitorder="little")
        self._words = np.append(bits, np.zeros(-bits.size % 8, np.uint8)).view(np.uint64)
        self._before = np.cumsum(np.bitwise_count(self._words), dtype=np.int64) - np.bitwise_count(self._words)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        words, bit = rows >> 6, (rows & 63).astype(np.uint64)
        below = self._words[words] & ((np.uint64(1) << bit) - np.uint64(1))
        return self._before[words] + np.bitwise_count(below)


def _write_rows(records: Staged, rows: np.ndarray, split: str, work: Path) -> dict[str, int]:
    store = SequenceStore.open(records.store)

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, rows.size, ROWS_PER_BATCH):
            yield store.take(rows[first : first + ROWS_PER_BATCH])

    return _write_split(batches(), split, work)


def _write_kept(records: Staged, kept: np.ndarray, split: str, work: Path) -> dict[str, int]:
    """The rows that stay, in order; if all do, the staged files themselves become the split's."""
    final_store, final_keys = work / "final" / f"{split}.arrow", work / f"final_{split}.parquet"
    if kept.all():
        counts = {"records": records.num_records, "residues": records.num_residues}
        if not final_store.exists():
            os.replace(records.store, final_store)
            os.replace(records.keys, final_keys)
        return counts

    def batches() -> Iterator[pa.RecordBatch]:
        first = 0
        for batch in read_batches(records.store):
            yield batch.filter(pa.array(kept[first : first + batch.num_rows]))
            first += batch.num_rows

    return _write_split(batches(), split, work)


def _write_split(batches: Iterator[pa.RecordBatch], split: str, work: Path) -> dict[str, int]:
    part = work / f"{split}.arrow.part"
    with StagedWriter(part, work / f"final_{split}.parquet") as writer:
        for batch in batches:
            writer.append(*batch.columns)
    os.replace(part, work / "final" / f"{split}.arrow")
    return {"records": writer.num_records, "residues": writer.num_residues}


def _own_split(engine: Engine, staged: Staged, split: str, work: Path) -> tuple[dict[str, int], int]:
    """A held-out set given as FASTA, repeats left out."""
    from esm2kit.join import unique_records

    repeats = unique_records(engine, split, staged)
    kept = np.zeros(staged.num_records, dtype=bool)
    for (rows,) in engine.arrays(f"SELECT row FROM {split}"):
        kept[rows] = True
    return _write_kept(staged, kept, split, work), repeats
