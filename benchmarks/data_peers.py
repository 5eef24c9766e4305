"""The tools that benchmarks/data.py compares: the same preprocessing and random access with three libraries."""

import os
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from esm2kit.preprocessing.preprocess import PreprocessConfig, preprocess
from esm2kit.sequences.alphabet import RESIDUE_LETTERS
from esm2kit.sequences.fasta import FastaReader
from esm2kit.sequences.store import SequenceStore

MEMORY_GB = 2.0
Trio = dict[str, Path]


def by_esm2kit(trio: Trio, out_dir: Path) -> None:
    preprocess(PreprocessConfig(**trio, out_dir=out_dir, memory_limit_gb=MEMORY_GB, leakage_identity=0.0))


def _biopython(path: Path) -> Iterator[tuple[str, str]]:
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    with open(path, encoding="utf-8") as file:
        for title, sequence in SimpleFastaParser(file):
            yield title.split(None, 1)[0], sequence


def _pyfastx(path: Path) -> Iterator[tuple[str, str]]:
    import pyfastx

    for record in pyfastx.Fastx(str(path)):
        yield record[0], record[1]


def by_peer(parse: Callable[[Path], Iterator[tuple[str, str]]], trio: Trio, out_dir: Path) -> None:
    """Preprocess with a peer's parser and simple code: a dict of ids, one file of residues, arrays of offsets."""
    out_dir.mkdir(parents=True)
    letters = str.maketrans("", "", RESIDUE_LETTERS)
    rows: dict[str, int] = {}
    offsets = array("q", [0])
    with open(out_dir / "residues", "wb") as file:
        for name, sequence in parse(trio["sampler_fasta"]):
            sequence = sequence.upper()
            if sequence.translate(letters) or not sequence:
                raise ValueError(name)
            if name in rows:
                raise ValueError(name)
            rows[name] = len(rows)
            file.write(sequence.encode())
            offsets.append(offsets[-1] + len(sequence))
    heads = array("q")
    for name, sequence in parse(trio["train_fasta"]):
        if sequence.upper().translate(letters):
            raise ValueError(name)
        heads.append(rows[name])
    starts, members = array("q", [0]), array("q")
    with open(trio["mapping"], encoding="utf-8") as file:
        next(file)
        for line in file:
            members.extend(rows[name] for name in line.rstrip("\n").split("\t")[1].split(","))
            starts.append(len(members))
    for name, values in (("offsets", offsets), ("heads", heads), ("starts", starts), ("members", members)):
        np.save(out_dir / f"{name}.npy", np.frombuffer(values, dtype=np.int64))
    (out_dir / "ids").write_text("\n".join(rows), encoding="utf-8")
    for path in out_dir.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


PREPROCESS = {
    "esm2kit": by_esm2kit,
    "Biopython": lambda trio, out_dir: by_peer(_biopython, trio, out_dir),
    "pyfastx": lambda trio, out_dir: by_peer(_pyfastx, trio, out_dir),
}


def parse_alone(name: str, path: Path) -> None:
    """Parse a FASTA without further processing."""
    if name == "esm2kit":
        sum(len(block.ids) for block in FastaReader(path))
    else:
        sum(len(sequence) for _, sequence in {"Biopython": _biopython, "pyfastx": _pyfastx}[name](path))


def access_by_esm2kit(trio: Trio, out_dir: Path, rows: np.ndarray) -> float:
    store = SequenceStore.open(out_dir / "train.arrow")
    requested = rows.tolist()
    began = time.perf_counter()
    total = sum(store.residues(row).size for row in requested)
    assert total
    return time.perf_counter() - began


def access_by_biopython(trio: Trio, out_dir: Path, rows: np.ndarray) -> float:
    from Bio import SeqIO

    index = SeqIO.index(str(trio["sampler_fasta"]), "fasta")
    names = list(index)
    requested = [names[row] for row in rows]
    began = time.perf_counter()
    total = sum(len(index[name].seq) for name in requested)
    assert total
    return time.perf_counter() - began


def access_by_pyfastx(trio: Trio, out_dir: Path, rows: np.ndarray) -> float:
    import pyfastx

    index = pyfastx.Fasta(str(trio["sampler_fasta"]))
    requested = rows.tolist()
    began = time.perf_counter()
    total = sum(len(index[row].seq) for row in requested)
    assert total
    return time.perf_counter() - began


ACCESS = {"esm2kit": access_by_esm2kit, "Biopython": access_by_biopython, "pyfastx": access_by_pyfastx}
