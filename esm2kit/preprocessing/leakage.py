"""Leakage between splits: equal sequences, shared ids and, if MMseqs2 is installed, similar sequences."""

import logging
import shutil
import subprocess
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

from esm2kit.preprocessing.join import Engine, escape_sql
from esm2kit.sequences.store import read_batches

logger = logging.getLogger(__name__)

_EXAMPLES = 5


def build_leakage_report(
    engine: Engine,
    stores: dict[str, Path],
    keys: dict[str, Path],
    work: Path,
    identity: float,
    memory_gb: float,
    threads: int,
) -> dict[str, Any]:
    """Compare all pairs of splits.

    Args:
        engine: The database.
        stores: Split -> store; the first split is the train set.
        keys: Split -> keys of the same rows.
        work: Folder for MMseqs2's files.
        identity: Sequence identity from which a held-out record counts as close to a train record; 0 skips MMseqs2.
        memory_gb: Memory limit of MMseqs2 in GB.
        threads: Threads of MMseqs2.

    Returns:
        `pairs`: per pair of splits, the number of records in the second split whose sequence or id is also in the
        first, with examples. `identity`: per held-out split, the number of records that are close to the train set, or
        the reason why they were not searched.
    """
    for split, path in keys.items():
        engine.run(f"CREATE VIEW split_{split} AS FROM read_parquet('{escape_sql(path)}')")
    pairs = []
    for first, second in combinations(keys, 2):
        found = {"first": first, "second": second}
        for name, columns in (("equal_sequences", "hash, residues"), ("shared_ids", "id")):
            shared = f"split_{second} b SEMI JOIN (SELECT DISTINCT {columns} FROM split_{first}) a USING ({columns})"
            found[name] = engine.fetch_value(f"SELECT count(*) FROM {shared}")
            examples = engine.fetch_rows(f"SELECT b.id FROM {shared} ORDER BY b.id LIMIT {_EXAMPLES}")
            found[f"{name}_examples"] = [name for (name,) in examples]
        pairs.append(found)
        logger.info(
            "leakage: %s records of the %s set share their sequence and %s their id with the %s set",
            f"{found['equal_sequences']:,}", second, f"{found['shared_ids']:,}", first,
        )  # fmt: skip
    return {"pairs": pairs, "identity": _find_close_records(stores, work, identity, memory_gb, threads)}


def _find_close_records(
    stores: dict[str, Path], work: Path, identity: float, memory_gb: float, threads: int
) -> dict[str, Any]:
    train, *held_out = stores
    if not held_out or not identity:
        reason = "nothing held out" if not held_out else "turned off by leakage_identity 0"
        return {"checked": False, "reason": reason}
    if not shutil.which("mmseqs"):
        reason = (
            "MMseqs2 is not installed, so similar but unequal sequences were not searched. "
            "To search them: conda install -c conda-forge -c bioconda mmseqs2"
        )
        logger.warning("leakage: %s", reason)
        return {"checked": False, "reason": reason}
    folder = Path(tempfile.mkdtemp(prefix="mmseqs.", dir=work))
    _write_fasta(stores[train], folder / "train.fasta")
    found: dict[str, Any] = {"checked": True, "min_identity": identity, "min_coverage_of_either": 0.8, "splits": {}}
    for split in held_out:
        num_records = _write_fasta(stores[split], folder / f"{split}.fasta")
        try:
            close = _count_close_records(folder, split, train, identity, memory_gb, threads)
        except subprocess.CalledProcessError as error:
            output = (error.stderr + error.stdout).strip().splitlines()
            reason = f"MMseqs2 failed ({output[0] if output else 'no message'}); a higher memory_limit_gb may help"
            logger.warning("leakage: %s", reason)
            return {"checked": False, "reason": reason}
        found["splits"][split] = {"records": num_records, "close_to_train": close}
        logger.info(
            "leakage: %s of %s records of the %s set have a sequence identity of at least %.0f%% to a train record",
            f"{close:,}", f"{num_records:,}", split, identity * 100,
        )  # fmt: skip
    shutil.rmtree(folder)
    return found


def _count_close_records(folder: Path, split: str, train: str, identity: float, memory_gb: float, threads: int) -> int:
    hits = folder / f"{split}.tsv"
    command = ["mmseqs", "easy-search", folder / f"{split}.fasta", folder / f"{train}.fasta", hits, folder / "tmp"]
    command += ["--min-seq-id", identity, "--alignment-mode", 3, "--max-seqs", 300, "--threads", threads, "-v", 1]
    command += ["--format-output", "query,qcov,tcov"]
    command += ["--split-memory-limit", f"{int(memory_gb * 1000)}M"]
    subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, encoding="utf-8")
    rows = (line.split("\t") for line in hits.read_text(encoding="utf-8").splitlines())
    return len({query for query, qcov, tcov in rows if max(float(qcov), float(tcov)) >= 0.8})


def _write_fasta(store: Path, path: Path) -> int:
    num_records = 0
    with open(path, "w", encoding="utf-8") as file:
        for batch in read_batches(store):
            # row numbers as ids, because MMseqs2 shortens some ids
            sequences = batch.column("sequence").to_pylist()
            file.writelines(f">{num_records + place}\n{sequence}\n" for place, sequence in enumerate(sequences))
            num_records += batch.num_rows
    return num_records
