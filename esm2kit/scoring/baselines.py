"""Scores of variants without a model: BLOSUM62, hydrophobicity, volume, number of mutations, site frequencies.

A higher score is a more conservative change. The score of a variant is the sum over its substitutions.
"""

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from Bio import AlignIO
from Bio.Align import substitution_matrices
from Bio.SeqIO.FastaIO import SimpleFastaParser
from Bio.SeqUtils.ProtParamData import kd
from rapidfuzz.distance import Levenshtein

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.scoring.variants import Variant
from esm2kit.sequences.alphabet import NUM_STANDARD, STANDARD_RESIDUES
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.tables import decode_text

logger = logging.getLogger(__name__)

BASELINE_NAMES = {
    "blosum62": "BLOSUM62",
    "hydrophobicity": "hydrophobicity change",
    "volume": "volume change",
    "num_mutations": "number of mutations",
    "site_independent": "site-independent frequencies",
}
# Volumes of residues in cubic angstroms. Source: Zamyatnin 1972, 10.1016/0079-6107(72)90005-3.
VOLUMES = {
    "G": 60.1, "A": 88.6, "S": 89.0, "C": 108.5, "D": 111.1, "P": 112.7, "N": 114.1, "T": 116.1, "E": 138.4,
    "V": 140.0, "Q": 143.8, "H": 153.2, "M": 162.9, "I": 166.7, "L": 166.7, "K": 168.6, "R": 173.4, "F": 189.9,
    "Y": 193.6, "W": 227.8,
}  # fmt: skip
# Weight of the uniform distribution in the frequencies of a position, as `b` of PSI-BLAST.
PSEUDOCOUNT = 10.0
ALIGNMENT_SUFFIXES = (".a3m", ".sto", ".stockholm", ".fasta", ".fa", ".aln", ".afa")
_CODES = np.full(256, NUM_STANDARD, dtype=np.uint8)  # gaps and letters that are no amino acid
for _code, _letter in enumerate(STANDARD_RESIDUES):
    _CODES[ord(_letter)] = _CODES[ord(_letter.lower())] = _code


def build_substitution_tables() -> dict[str, np.ndarray]:
    """Build the (20, 20) scores of substitutions, [wild type, mutant], in the order of STANDARD_RESIDUES.

    Returns:
        `blosum62`, the matrix; `hydrophobicity` and `volume`, minus the absolute change on the scale of Kyte and
        Doolittle, and of the residue volumes of Zamyatnin.

    Source:
        Henikoff and Henikoff 1992, 10.1073/pnas.89.22.10915; Kyte and Doolittle 1982, 10.1016/0022-2836(82)90515-0;
        Zamyatnin 1972, 10.1016/0079-6107(72)90005-3. Biopython has the first two.
    """
    blosum62 = substitution_matrices.load("BLOSUM62")
    tables = {"blosum62": np.array([[blosum62[a][b] for b in STANDARD_RESIDUES] for a in STANDARD_RESIDUES])}
    for name, scale in (("hydrophobicity", kd), ("volume", VOLUMES)):
        values = np.array([scale[residue] for residue in STANDARD_RESIDUES])
        tables[name] = -np.abs(values[:, None] - values)
    return tables


def score_baselines(
    variants: Sequence[Variant],
    proteins: Sequence[Record],
    frequencies: Mapping[int, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Score variants by every baseline that applies to them.

    Args:
        variants: N variants.
        proteins: the wild types.
        frequencies: protein -> (T, 20) log frequencies, see `read_site_frequencies`.

    Returns:
        Key of BASELINE_NAMES -> (N,) scores. A baseline that gives all variants the same score is omitted, and with
        insertions or deletions all but the number of mutations, which is then the edit distance.
    """
    numbers = np.array(
        [
            -(
                len(variant.substitutions)
                if variant.sequence is None
                else Levenshtein.distance(proteins[variant.protein].sequence, variant.sequence)
            )
            for variant in variants
        ],
        dtype=float,
    )
    scores = {}
    if all(variant.sequence is None for variant in variants):
        counts = [len(variant.substitutions) for variant in variants]
        row_S = np.repeat(np.arange(len(variants)), counts)
        found = [
            (variant.protein, position, STANDARD_RESIDUES.index(wild), STANDARD_RESIDUES.index(mutant))
            for variant in variants
            for position, wild, mutant in variant.substitutions
        ]
        protein_S, _, wild_S, mutant_S = np.array(found, dtype=np.int64).reshape(-1, 4).T
        for name, table in build_substitution_tables().items():
            scores[name] = np.bincount(row_S, table[wild_S, mutant_S], len(variants))
        if frequencies and set(protein_S.tolist()) <= frequencies.keys():
            ratio_S = np.array(
                [
                    frequencies[protein][position, mutant] - frequencies[protein][position, wild]
                    for protein, position, wild, mutant in found
                ]
            )
            scores["site_independent"] = np.bincount(row_S, ratio_S, len(variants))
    scores["num_mutations"] = numbers
    return {name: scores[name] for name in BASELINE_NAMES if name in scores and np.ptp(scores[name]) > 0}


def read_site_frequencies(path: Path, proteins: Sequence[Record]) -> dict[int, np.ndarray]:
    """Compute the site-independent frequencies of proteins from alignments.

    Args:
        path: an alignment as A3M, Stockholm or aligned FASTA, or a folder of them. One row, usually the first, is the
            protein or a part of it.
        proteins: the wild types.

    Returns:
        protein -> (T, 20) log frequencies; uniform where the alignment does not cover the protein.

    Raises:
        InputError: a file cannot be read, or no row of it is a protein.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.lower().endswith(ALIGNMENT_SUFFIXES))
    if not files:
        raise InputError(
            f"{path}: no alignment in this folder. Names must end in {', '.join(ALIGNMENT_SUFFIXES)}.",
            code="alignment.none",
            path=path,
        )
    found: dict[int, np.ndarray] = {}
    for file in files:
        rows = read_alignment(file)
        protein, row, start = _find_query(file, rows, proteins)
        codes_MC = np.stack([_CODES[np.frombuffer(text.encode(), dtype=np.uint8)] for text in rows])
        is_residue_C = np.array([letter not in "-." for letter in rows[row]])
        log_frequencies = compute_site_frequencies(codes_MC[:, is_residue_C])
        table = np.full((len(proteins[protein].sequence), NUM_STANDARD), -np.log(NUM_STANDARD))
        table[start : start + len(log_frequencies)] = log_frequencies
        found[protein] = table
        logger.info(
            "%s: %s aligned to residues %d to %d of %s",
            file.name, format_count(len(rows), "sequence"), start + 1, start + len(log_frequencies),
            proteins[protein].id,
        )  # fmt: skip
    return found


def read_alignment(path: Path) -> list[str]:
    """Read the rows of an alignment.

    Args:
        path: A3M, Stockholm or aligned FASTA, plain or .gz. Insertions of A3M, in lower case, are removed.

    Returns:
        The rows, of equal length.

    Raises:
        InputError: the file does not exist or is not an alignment.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path.", code="alignment.absent", path=path)
    text, _ = decode_text(path)
    if text.startswith("# STOCKHOLM"):
        try:
            return [str(record.seq).upper() for record in AlignIO.read(io.StringIO(text), "stockholm")]
        except (ValueError, AssertionError) as error:
            raise InputError(
                f"{path} cannot be read as a Stockholm alignment ({error}).", code="alignment.format", path=path
            ) from None
    lines = [line for line in text.splitlines() if not line.startswith("#")]  # A3M of HH-suite and ColabFold
    rows = [row.replace(" ", "").rstrip("*") for _, row in SimpleFastaParser(io.StringIO("\n".join(lines)))]
    if not rows:
        raise InputError(
            f"{path} is not an alignment. Pass A3M, Stockholm or aligned FASTA.", code="alignment.format", path=path
        )
    if len({len(row) for row in rows}) > 1:
        rows = ["".join(letter for letter in row if not letter.islower() and letter != ".") for row in rows]
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        differing = next(row for row, length in enumerate(lengths) if length != lengths[0])
        raise InputError(
            f"{path}: row {differing + 1} has {lengths[differing]} columns, row 1 has {lengths[0]}. Align the "
            "sequences first.",
            code="alignment.columns",
            path=path,
            row=differing + 1,
            found=lengths[differing],
            expected=lengths[0],
        )
    return [row.upper() for row in rows]


def _find_query(path: Path, rows: Sequence[str], proteins: Sequence[Record]) -> tuple[int, int, int]:
    """Find the first row that is a protein or a part of one: the protein, the row and the first residue."""
    for row, text in enumerate(rows):
        residues = text.replace("-", "").replace(".", "")
        for protein, record in enumerate(proteins):
            start = record.sequence.find(residues) if residues else -1
            if start >= 0:
                return protein, row, start
    raise InputError(
        f"{path}: no row of the alignment is {proteins[0].id!r} or a part of it. Align its homologs to this sequence."
        if len(proteins) == 1
        else f"{path}: no row of the alignment is one of the {len(proteins)} proteins or a part of one.",
        code="alignment.query",
        path=path,
    )


def compute_site_frequencies(codes_MC: np.ndarray) -> np.ndarray:
    """Compute the log frequencies of the amino acids at each position of an alignment.

    A sequence has the weight of Henikoff and Henikoff: the mean over positions of 1 / (k n), where k is the number of
    different amino acids at the position, and n the number of sequences that have its own one. The weighted frequencies
    f of a position, without gaps, are mixed with the uniform distribution: (a f + b / 20) / (a + b), where a is the
    mean number of different amino acids per position minus 1, and b is PSEUDOCOUNT.

    Args:
        codes_MC: (M, C) indices in STANDARD_RESIDUES; 20 is a gap or an unknown residue.

    Returns:
        (C, 20) natural logarithms; uniform at a position of gaps only.

    Source:
        Henikoff and Henikoff 1994, 10.1016/0022-2836(94)90032-9; Altschul et al. 1997 (PSI-BLAST),
        10.1093/nar/25.17.3389, with the uniform distribution instead of BLOSUM62's frequencies.
    """
    num_columns = codes_MC.shape[1]
    count_CA = np.zeros((num_columns, NUM_STANDARD + 1))
    for code in range(NUM_STANDARD + 1):
        count_CA[:, code] = (codes_MC == code).sum(0)
    different_C = (count_CA[:, :NUM_STANDARD] > 0).sum(1)
    with np.errstate(divide="ignore"):
        share_CA = 1 / (different_C[:, None] * count_CA)
    share_CA[:, NUM_STANDARD] = 0.0
    share_CA[~np.isfinite(share_CA)] = 0.0
    weight_M = np.zeros(len(codes_MC))
    for column in range(num_columns):  # one column at a time, as (M, C) floats may not fit into memory
        weight_M += share_CA[column, codes_MC[:, column]]
    weighted_CA = np.stack(
        [np.bincount(codes_MC[:, column], weight_M, NUM_STANDARD + 1) for column in range(num_columns)]
    )[:, :NUM_STANDARD]
    total_C = weighted_CA.sum(1, keepdims=True)
    uniform = 1 / NUM_STANDARD
    frequency_CA = np.where(total_C > 0, weighted_CA / np.where(total_C > 0, total_C, 1), uniform)
    observed = max(float(different_C[different_C > 0].mean()) - 1, 0.0) if different_C.any() else 0.0
    return np.log((observed * frequency_CA + PSEUDOCOUNT * uniform) / (observed + PSEUDOCOUNT))
