"""FASTA and clusters in, a training set out: checked, joined, split by cluster, and one memory-mapped file a split.

The stages write into `<out_dir>/preprocess.unfinished`, and a second call goes on from the last stage that ended. The
output appears at the end, `manifest.json` last: where that is, the dataset is whole.
"""

import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Any

import duckdb

from esm2kit.core.checksums import FileChecksums, read_sealed_json, write_sealed_json
from esm2kit.core.errors import InputError, check_range
from esm2kit.core.files import fsync, hold_lock, sha256_file, to_json, write_json
from esm2kit.core.processes import count_cores
from esm2kit.core.provenance import build_provenance
from esm2kit.preprocessing.ingest import StagedFasta
from esm2kit.preprocessing.join import Engine, join_cluster_tsv, join_mapping, join_singletons, joined_paths
from esm2kit.preprocessing.leakage import build_leakage_report
from esm2kit.preprocessing.split import INDEX_FILES, Splitter
from esm2kit.preprocessing.staging import build_input_stamps, read_inputs
from esm2kit.sequences.dataset import MANIFEST, check_dataset, read_manifest
from esm2kit.sequences.fasta import find_fasta_files

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_LEAKAGE, _UNFINISHED = "leakage.json", "preprocess.unfinished"
_OUTPUTS = (MANIFEST, *(f"{split}.arrow" for split in SPLITS), *INDEX_FILES, _LEAKAGE)
# what decides the files' bytes, beside the inputs themselves
_DATA_SETTINGS = ("val_size", "test_size", "seed", "leakage_identity")


@dataclass(frozen=True)
class PreprocessConfig:
    """FASTA, and clusters if there are any, into a dataset to train on.

    Every FASTA may be one file, several, or a folder, plain or compressed (.gz, .zst).

    Args:
        train_fasta: the records to train on; with a mapping, the UniRef50 representatives of the train clusters.
        out_dir: folder of the dataset.
        sampler_fasta: with a mapping, the records drawn from: every UniRef90 member and every UniRef50 representative.
        mapping: esm2nv's mapping.tsv, a header line, then `UR50 id <TAB> UR90 id,UR90 id,...`.
        cluster_tsv: MMseqs2's `representative <TAB> member` lines for train_fasta; or two such files, the finer first.
        valid_fasta: records to validate on, as they are.
        test_fasta: records to test on, as they are.
        val_size: clusters to cut from train for validation, a number (int) or a share (float below 1).
        test_size: the same for the test set.
        seed: decides which clusters are cut.
        leakage_identity: report held-out records with a train record of this identity or more (by MMseqs2, if it is
            installed); 0 turns the search off, which takes hours for UniRef.
        memory_limit_gb: memory to stay under, in GB; at least 0.5.
        threads: for the join and MMseqs2; every core that this process may use if not given.
        overwrite: replace a dataset made from other inputs or settings.
    """

    train_fasta: Path | list[Path]
    out_dir: Path = Path("dataset")
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
    inputs = _find_inputs(config)
    out_dir = Path(config.out_dir)
    existed = out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    with hold_lock(out_dir, f"{out_dir}: another preprocess is writing here; wait for it or choose another --out_dir"):
        manifest = _read_finished(config, inputs)
        if manifest:
            shutil.rmtree(out_dir / _UNFINISHED, ignore_errors=True)  # of a call killed while it tidied up
            logger.info("%s: already done; nothing to do", out_dir)
            return manifest
        try:
            manifest = _build_dataset(config, inputs)
        except InputError:
            _remove_outputs(out_dir, existed)
            raise
        except (OSError, duckdb.Error) as error:
            problem = _storage_error(error, config)
            if problem is None:
                raise
            _remove_outputs(out_dir, existed)
            raise problem from error
    made = manifest["dataset"]
    logger.info(
        "%s: %s in %.0f s", out_dir, "; ".join(
            f"{split}: " + ", ".join(f"{count:,} {name}" for name, count in made[split].items())
            for split in SPLITS if split in made
        ), time.monotonic() - began,
    )  # fmt: skip
    return manifest


def _find_inputs(config: PreprocessConfig) -> dict[str, list[Path]]:
    """The input files by role, once the settings are known to go together."""
    if (config.mapping is None) != (config.sampler_fasta is None):
        raise InputError(
            "mapping and sampler_fasta go together: give both (the esm2nv trio) or neither", code="preprocess.trio"
        )
    if config.mapping is not None and config.cluster_tsv is not None:
        raise InputError(
            "mapping and cluster_tsv are two ways to say the same: give one of them", code="preprocess.two-mappings"
        )
    for size, fasta in (("val_size", "valid_fasta"), ("test_size", "test_fasta")):
        value = getattr(config, size)
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise InputError(
                f"{size} {value}: give a number of clusters (an integer) or a share from 0 to below 1",
                code="option.range",
                name=size,
                found=value,
            )
        if value and getattr(config, fasta) is not None:
            raise InputError(
                f"{size} and {fasta} both name held-out records: give one of them",
                code="preprocess.two-held-out",
                name=size,
            )
    check_range(config, "memory_limit_gb", at_least=0.5)
    check_range(config, "threads", at_least=1, hint="leave it out for every core")
    check_range(config, "leakage_identity", at_least=0, at_most=1)
    roles = ("train_fasta", "sampler_fasta", "valid_fasta", "test_fasta")
    inputs = {role: find_fasta_files(paths) for role in roles if (paths := getattr(config, role)) is not None}
    for role in ("mapping", "cluster_tsv"):
        paths = getattr(config, role)
        if paths is None:
            continue
        inputs[role] = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
        for path in inputs[role]:
            if not path.is_file():
                raise InputError(f"{path}: no such file; correct {role}", code="fasta.absent", path=path)
    if len(inputs.get("cluster_tsv", [])) > 2:
        raise InputError(
            f"cluster_tsv names {len(inputs['cluster_tsv'])} files: give one level, or the finer and the coarser",
            code="preprocess.levels",
            found=len(inputs["cluster_tsv"]),
        )
    return inputs


def _read_finished(config: PreprocessConfig, inputs: dict[str, list[Path]]) -> dict[str, Any] | None:
    """The manifest of a dataset made from the same; None if there is none yet."""
    out_dir = Path(config.out_dir)
    path = out_dir / MANIFEST
    if not path.exists():
        strangers = [name for name in _OUTPUTS if (out_dir / name).exists()]
        if strangers and not (out_dir / _UNFINISHED).exists():
            raise InputError(
                f"{out_dir}: holds {strangers[0]} without a {MANIFEST}; move it or give another --out_dir",
                code="output.strangers",
                path=out_dir,
                name=strangers[0],
            )
        return None
    try:
        has_stage = json.loads(path.read_bytes())["stage"] == "preprocess"
    except (ValueError, KeyError, TypeError):
        has_stage = False
    if not has_stage:
        raise InputError(
            f"{path}: not a manifest of `esm2kit preprocess`; choose another --out_dir",
            code="output.strangers",
            path=path,
        )
    if config.overwrite:  # the same input and settings, or not: a damaged dataset is replaced like any other
        try:
            manifest = check_dataset(out_dir)
        except InputError as error:
            logger.warning("%s", error)
            _remove_outputs(out_dir, existed=True)
            return None
    else:
        manifest = check_dataset(out_dir)
    difference = _find_difference(manifest, config, inputs)
    if difference is None:
        return manifest
    if not config.overwrite:
        found = f"holds a dataset made otherwise: {difference}"
        raise InputError(
            f"{out_dir}: {found}; choose another --out_dir, or --overwrite", code="output.another-run", path=out_dir
        )
    _remove_outputs(out_dir, existed=True)
    return None


def _find_difference(manifest: dict[str, Any], config: PreprocessConfig, inputs: dict[str, list[Path]]) -> str | None:
    for name in _DATA_SETTINGS:
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


def _remove_outputs(out_dir: Path, existed: bool) -> None:
    """Remove what preprocess writes, the manifest first, and the folder if this call made it."""
    # the unfinished folder goes last: it says that what lies around it is ours to remove
    (out_dir / _UNFINISHED).mkdir(exist_ok=True)
    for name in _OUTPUTS:
        (out_dir / name).unlink(missing_ok=True)
    shutil.rmtree(out_dir / _UNFINISHED, ignore_errors=True)
    if not existed and not any(out_dir.iterdir()):
        out_dir.rmdir()


def _storage_error(error: Exception, config: PreprocessConfig) -> InputError | None:
    """A full disk or too little memory, as the person can mend it."""
    is_full = isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG)
    # duckdb's errors carry the system's reason as text alone
    if is_full or "No space left" in str(error) or "File too large" in str(error):
        free = shutil.disk_usage(config.out_dir).free
        return InputError(
            f"{config.out_dir}: the disk is full ({free / 1e9:.1f} GB free now); free some space or move out_dir",
            code="disk.full",
            path=config.out_dir,
            free=free,
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return InputError(
            f"memory_limit_gb {config.memory_limit_gb} does not hold the join; raise it or lower threads",
            code="preprocess.memory",
            found=config.memory_limit_gb,
        )
    return None


def _build_dataset(config: PreprocessConfig, inputs: dict[str, list[Path]]) -> dict[str, Any]:
    out_dir = Path(config.out_dir)
    work = out_dir / _UNFINISHED
    _prepare_work_folder(config, inputs, work)
    if not (work / MANIFEST).exists():
        _run_stages(config, inputs, work)
    # from here on the dataset is whole; moving it again after a kill finds fewer files to move
    for name in _OUTPUTS[1:]:
        if (work / "final" / name).exists():
            os.replace(work / "final" / name, out_dir / name)
    fsync(out_dir)
    os.replace(work / MANIFEST, out_dir / MANIFEST)
    fsync(out_dir)
    shutil.rmtree(work)
    return read_manifest(out_dir)


def _prepare_work_folder(config: PreprocessConfig, inputs: dict[str, list[Path]], work: Path) -> None:
    """Keep the work folder if it was begun for the same, and start it afresh if not."""
    files = {
        role: [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        for role, paths in inputs.items()
    }
    plan = {name: getattr(config, name) for name in _DATA_SETTINGS} | {"inputs": files, "boot": _read_boot_id()}
    if _read_plan(work) == to_json(plan):
        logger.info("%s: going on with what an earlier call left", config.out_dir)
    else:
        _remove_outputs(Path(config.out_dir), existed=True)
        write_sealed_json(work / "plan.json", plan)
    for stale in work.rglob("*.part"):
        stale.unlink()
    (work / "final").mkdir(exist_ok=True)


def _read_plan(work: Path) -> dict[str, Any] | None:
    """The plan of an unfinished call; None if there is none, or a damaged one: then the work starts again."""
    try:
        return read_sealed_json(work / "plan.json", "")
    except InputError:
        return None


def _read_boot_id() -> str | None:
    """Work files are not synced to the disk one by one, so after a power cut they cannot be trusted."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _run_stages(config: PreprocessConfig, inputs: dict[str, list[Path]], work: Path) -> None:
    threads = config.threads or count_cores()
    staged, sha256 = read_inputs(inputs, work, threads)
    train = staged["train_fasta"]
    records = staged.get("sampler_fasta", train)
    # DuckDB's limit counts its buffers; the rest is for Python, Arrow and what DuckDB does not count
    memory_gb = config.memory_limit_gb * 0.75 - 0.25
    splitter = Splitter(work)
    with Engine(work, memory_gb, threads) as engine:
        left_out = _join_clusters(engine, inputs, records, train, work)
        made = splitter.split_clusters(records, joined_paths(work), config.val_size, config.test_size, config.seed)
        for split in SPLITS[1:]:
            if own := staged.get(f"{split}_fasta"):
                made[split], left_out[f"repeated_{split}_records"] = splitter.add_held_out(engine, own, split)
        stores = {split: splitter.store(split) for split in SPLITS if split in made}
        keys = {split: splitter.keys(split) for split in stores}
        report = build_leakage_report(
            engine, stores, keys, work, config.leakage_identity, config.memory_limit_gb, threads
        )
    write_json(splitter.final / _LEAKAGE, report)
    if "valid" not in made:
        logger.warning("no validation set: give valid_fasta or val_size to have one")
    manifest = build_provenance("preprocess", config)
    manifest["inputs"] = build_input_stamps(inputs, staged, sha256)
    manifest["dataset"] = made | {"left_out": left_out}
    manifest["files"] = {path.name: FileChecksums.compute(path) for path in sorted(splitter.final.iterdir())}
    for path in splitter.final.iterdir():
        fsync(path)
    write_sealed_json(work / MANIFEST, manifest)


def _join_clusters(
    engine: Engine, inputs: dict[str, list[Path]], records: StagedFasta, train: StagedFasta, work: Path
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
        write_sealed_json(marker, counts)
    return read_sealed_json(marker, f"delete {work} and run the command again")
