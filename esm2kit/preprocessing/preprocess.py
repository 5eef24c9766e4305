"""Build a training dataset from FASTA files and clusters.

Records are checked, joined with their clusters, split by cluster and written to one memory-mapped file per split. The
steps write to `<out_dir>/preprocess.unfinished`, and a second call resumes after the last finished step. The output
files are moved to `out_dir` at the end, `manifest.json` last, so a folder with a manifest holds a complete dataset.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Any

import duckdb

from esm2kit.core.checksums import FileChecksums, read_sealed_json, write_sealed_json
from esm2kit.core.errors import InputError, check_range, check_type
from esm2kit.core.files import check_output_folder, fsync, hold_lock, sha256_file, to_json, write_json
from esm2kit.core.processes import count_cores
from esm2kit.core.provenance import build_provenance
from esm2kit.preprocessing.config import PreprocessConfig
from esm2kit.preprocessing.ingest import StagedFasta
from esm2kit.preprocessing.join import Engine, join_cluster_tsv, join_mapping, join_singletons, joined_paths
from esm2kit.preprocessing.leakage import build_leakage_report
from esm2kit.preprocessing.split import INDEX_FILES, Splitter
from esm2kit.preprocessing.staging import build_input_stamps, read_inputs
from esm2kit.sequences.dataset import MANIFEST, check_dataset, read_manifest
from esm2kit.sequences.fasta import find_fasta_files
from esm2kit.sequences.pipes import copy_pipes, is_pipe

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_LEAKAGE, _UNFINISHED = "leakage.json", "preprocess.unfinished"
_OUTPUTS = (MANIFEST, *(f"{split}.arrow" for split in SPLITS), *INDEX_FILES, _LEAKAGE)
# settings that determine the content of the output files, together with the inputs
_DATA_SETTINGS = ("val_size", "test_size", "seed", "leakage_identity")


def preprocess(config: PreprocessConfig) -> dict[str, Any]:
    """Build a dataset, resume an unfinished one, or return the manifest of a finished one.

    Args:
        config: Inputs and settings.

    Returns:
        The manifest in `<out_dir>/manifest.json`: the provenance and, under "dataset", the counts of all splits.

    Raises:
        InputError: The input is invalid, in which case nothing is left in out_dir. Or out_dir holds a dataset from
            other inputs or settings, which is not changed.
        OSError: A file cannot be read or written for another reason than a full disk.
        duckdb.Error: The join failed for another reason than too little memory or a full disk.
    """
    check_type(config, PreprocessConfig, "config")
    started = time.monotonic()
    inputs = _find_inputs(config)
    out_dir = Path(config.out_dir)
    existed = out_dir.exists()
    check_output_folder(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    busy = f"{out_dir}: another preprocess is writing here; wait for it or choose another --out_dir"
    with _remove_if_empty(out_dir, existed), hold_lock(out_dir, busy), ExitStack() as copies:
        for role, paths in inputs.items():
            name = f"{role}_input.{'fasta' if 'fasta' in role else 'tsv'}"
            inputs[role] = copies.enter_context(copy_pipes(paths, out_dir, name))
        manifest = _read_finished(config, inputs)
        if manifest:
            shutil.rmtree(out_dir / _UNFINISHED, ignore_errors=True)  # left by a call that was killed at its end
            logger.info("%s: the dataset already exists; nothing to do", out_dir)
            return manifest
        try:
            manifest = _build_dataset(config, inputs)
        except InputError:
            _remove_outputs(out_dir)
            raise
        except (OSError, duckdb.Error) as error:
            problem = _storage_error(error, config)
            if problem is None:
                raise
            _remove_outputs(out_dir)
            raise problem from error
    counts = manifest["dataset"]
    logger.info(
        "%s: %s in %.0f s", out_dir, "; ".join(
            f"{split}: " + ", ".join(f"{count:,} {name}" for name, count in counts[split].items())
            for split in SPLITS if split in counts
        ), time.monotonic() - started,
    )  # fmt: skip
    return manifest


def _find_inputs(config: PreprocessConfig) -> dict[str, list[Path]]:
    """Check the settings and list the input files by role."""
    if (config.mapping is None) != (config.sampler_fasta is None):
        raise InputError("mapping and sampler_fasta require each other. Pass both or neither.", code="preprocess.trio")
    if config.mapping is not None and config.cluster_tsv is not None:
        raise InputError(
            "mapping and cluster_tsv both define the clusters. Pass only one of them.", code="preprocess.two-mappings"
        )
    for size, fasta in (("val_size", "valid_fasta"), ("test_size", "test_fasta")):
        value = getattr(config, size)
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise InputError(
                f"{size} must be a number of clusters (an integer) or a share from 0 to below 1, found {value}",
                code="option.range",
                name=size,
                found=value,
            )
        if value and getattr(config, fasta) is not None:
            raise InputError(
                f"{size} and {fasta} both define held-out records. Pass only one of them.",
                code="preprocess.two-held-out",
                name=size,
            )
    check_range(config, "memory_limit_gb", at_least=0.5)
    check_range(config, "threads", at_least=1, hint="omit it to use all cores")
    check_range(config, "leakage_identity", at_least=0, at_most=1)
    roles = ("train_fasta", "sampler_fasta", "valid_fasta", "test_fasta")
    inputs = {role: find_fasta_files(paths) for role in roles if (paths := getattr(config, role)) is not None}
    for role in ("mapping", "cluster_tsv"):
        paths = getattr(config, role)
        if paths is None:
            continue
        inputs[role] = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
        for path in inputs[role]:
            if not path.is_file() and not is_pipe(path):
                raise InputError(f"{path} does not exist. Check {role}.", code="fasta.absent", path=path)
    if len(inputs.get("cluster_tsv", [])) > 2:
        raise InputError(
            f"cluster_tsv has {len(inputs['cluster_tsv'])} files. Pass one level, or the finer and the coarser level.",
            code="preprocess.levels",
            found=len(inputs["cluster_tsv"]),
        )
    return inputs


def _read_finished(config: PreprocessConfig, inputs: dict[str, list[Path]]) -> dict[str, Any] | None:
    """Read the manifest of a finished dataset from the same inputs and settings; None if there is no dataset."""
    out_dir = Path(config.out_dir)
    path = out_dir / MANIFEST
    if not path.exists():
        unknown = [name for name in _OUTPUTS if (out_dir / name).exists()]
        if unknown and not (out_dir / _UNFINISHED).exists():
            raise InputError(
                f"{out_dir} holds {unknown[0]}, but no {MANIFEST}. Move the file, or choose another --out_dir.",
                code="output.other-files",
                path=out_dir,
                name=unknown[0],
            )
        return None
    try:
        has_stage = json.loads(path.read_bytes())["stage"] == "preprocess"
    except (ValueError, KeyError, TypeError):
        has_stage = False
    if not has_stage:
        raise InputError(
            f"{path} is not a manifest of `esm2kit preprocess`. Choose another --out_dir.",
            code="output.other-files",
            path=path,
        )
    try:
        manifest = check_dataset(out_dir)
    except InputError as error:
        if not config.overwrite:
            raise
        logger.warning("%s", error)
        _remove_outputs(out_dir)
        return None
    difference = _find_difference(manifest, config, inputs)
    if difference is None:
        return manifest
    if not config.overwrite:
        raise InputError(
            f"{out_dir} holds a dataset from other inputs or settings: {difference}. Choose another --out_dir, or pass "
            "--overwrite true.",
            code="output.another-run",
            path=out_dir,
        )
    _remove_outputs(out_dir)
    return None


def _find_difference(manifest: dict[str, Any], config: PreprocessConfig, inputs: dict[str, list[Path]]) -> str | None:
    """Describe the first difference between a finished dataset and this call; None if there is none."""
    for name in _DATA_SETTINGS:
        then, now = manifest["config"][name], getattr(config, name)
        if then != now:
            return f"{name} was {then} and is now {now}"
    for role in sorted(inputs.keys() | manifest["inputs"].keys()):
        then, now = manifest["inputs"].get(role, []), inputs.get(role, [])
        if len(then) != len(now):
            return f"{role} had {len(then)} files and has now {len(now)}"
        for recorded, path in zip(then, now, strict=True):
            status = path.stat()
            if (recorded["bytes"], recorded["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
                continue
            if recorded["bytes"] != status.st_size or recorded["sha256"] != sha256_file(path):
                return f"{role} {path} has changed"
    return None


def _remove_outputs(out_dir: Path) -> None:
    """Delete all output files, the manifest first."""
    # the unfinished folder is deleted last, because it marks the other files as deletable
    (out_dir / _UNFINISHED).mkdir(exist_ok=True)
    for name in _OUTPUTS:
        (out_dir / name).unlink(missing_ok=True)
    shutil.rmtree(out_dir / _UNFINISHED, ignore_errors=True)


@contextmanager
def _remove_if_empty(out_dir: Path, existed: bool) -> Iterator[None]:
    """Remove the folder if the block raises an error, unless it existed before or holds files."""
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):
                out_dir.rmdir()
        raise


def _storage_error(error: Exception, config: PreprocessConfig) -> InputError | None:
    """Convert the error of a full disk or too little memory to an InputError; None for other errors."""
    is_full = isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG)
    # DuckDB's errors hold the reason of the system only as text
    if is_full or "No space left" in str(error) or "File too large" in str(error):
        free = shutil.disk_usage(config.out_dir).free
        return InputError(
            f"{config.out_dir}: the disk is full ({free / 1e9:.1f} GB are free now). Free disk space, or choose "
            "another --out_dir.",
            code="disk.full",
            path=config.out_dir,
            free=free,
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return InputError(
            f"memory_limit_gb {config.memory_limit_gb} is too small for the join. Raise it, or lower threads.",
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
    # The dataset is complete. If a kill interrupts the moves, the next call moves the remaining files.
    for name in _OUTPUTS[1:]:
        if (work / "final" / name).exists():
            os.replace(work / "final" / name, out_dir / name)
    fsync(out_dir)
    os.replace(work / MANIFEST, out_dir / MANIFEST)
    fsync(out_dir)
    shutil.rmtree(work)
    return read_manifest(out_dir)


def _prepare_work_folder(config: PreprocessConfig, inputs: dict[str, list[Path]], work: Path) -> None:
    """Keep the work folder if it is from the same inputs and settings; otherwise start with an empty one."""
    files = {
        role: [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        for role, paths in inputs.items()
    }
    plan = {name: getattr(config, name) for name in _DATA_SETTINGS} | {"inputs": files, "boot": _read_boot_id()}
    if _read_plan(work) == to_json(plan):
        logger.info("%s: resuming an unfinished call", config.out_dir)
    else:
        _remove_outputs(Path(config.out_dir))
        write_sealed_json(work / "plan.json", plan)
    for stale in work.rglob("*.part"):
        stale.unlink()
    (work / "final").mkdir(exist_ok=True)


def _read_plan(work: Path) -> dict[str, Any] | None:
    """Read the plan of an unfinished call; None if it is missing or damaged, so that the work restarts."""
    try:
        return read_sealed_json(work / "plan.json", "")
    except InputError:
        return None


def _read_boot_id() -> str | None:
    """Read the boot id: work files are not synced individually, so they are invalid after a power cut."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _run_stages(config: PreprocessConfig, inputs: dict[str, list[Path]], work: Path) -> None:
    threads = config.threads or count_cores()
    staged, sha256 = read_inputs(inputs, work, threads)
    train = staged["train_fasta"]
    records = staged.get("sampler_fasta", train)
    # DuckDB's limit covers only its buffers; the rest is for Python, Arrow and DuckDB's other memory
    memory_gb = config.memory_limit_gb * 0.75 - 0.25
    splitter = Splitter(work)
    with Engine(work, memory_gb, threads) as engine:
        left_out = _join_clusters(engine, inputs, records, train, work)
        counts = splitter.split_clusters(records, joined_paths(work), config.val_size, config.test_size, config.seed)
        for split in SPLITS[1:]:
            if own := staged.get(f"{split}_fasta"):
                counts[split], left_out[f"repeated_{split}_records"] = splitter.add_held_out(engine, own, split)
        stores = {split: splitter.store(split) for split in SPLITS if split in counts}
        keys = {split: splitter.keys(split) for split in stores}
        report = build_leakage_report(
            engine, stores, keys, work, config.leakage_identity, config.memory_limit_gb, threads
        )
    write_json(splitter.final / _LEAKAGE, report)
    if "valid" not in counts:
        logger.warning("no validation set: training requires one, pass --valid_fasta or --val_size")
    manifest = build_provenance("preprocess", config)
    manifest["inputs"] = build_input_stamps(inputs, staged, sha256)
    manifest["dataset"] = counts | {"left_out": left_out}
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
            has_clusters = "mapping" in inputs or "cluster_tsv" in inputs
            reason = "are not in any cluster" if has_clusters else "repeat the id and sequence of another record"
            logger.warning("%s records %s and are omitted", f"{counts['unclustered_records']:,}", reason)
        write_sealed_json(marker, counts)
    return read_sealed_json(marker, f"delete {work} and run the command again")
