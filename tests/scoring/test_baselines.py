"""Baselines of variants against values by hand and other implementations; alignments in three formats."""

from pathlib import Path

import numpy as np
import pytest
from Bio.Align import substitution_matrices
from Bio.SeqUtils.ProtParam import ProteinAnalysis
from support.errors import refused

from esm2kit.scoring.baselines import (
    PSEUDOCOUNT,
    build_substitution_tables,
    compute_site_frequencies,
    read_alignment,
    read_site_frequencies,
    score_baselines,
)
from esm2kit.scoring.variants import read_variants
from esm2kit.sequences.alphabet import STANDARD_RESIDUES
from esm2kit.sequences.fasta import Record

PROTEIN = Record("P1", "P1", "MAGKWLRTSD")
OTHER = Record("P2", "P2", "CCCCHHHHEE")
ROWS = ["MAGKWLRTSD", "MSGKW-RTSE", "MAGRWLKTSD", "-AGRWVKT-D", "MAGKWLRTSD"]


def score(mutations: str | list[str], **options: object) -> dict[str, np.ndarray]:
    proteins, (found,) = read_variants(mutations, [PROTEIN])
    return score_baselines(found.variants, proteins, **options)


def test_scores_of_substitutions() -> None:
    found = score(["A2G", "W5F", "R7D"])
    assert list(found) == ["blosum62", "hydrophobicity", "volume"]  # one mutation each: their number says nothing
    assert found["blosum62"].tolist() == [0, 1, -2]
    assert found["hydrophobicity"] == pytest.approx([-2.2, -3.7, -1.0])  # 1.8 to -0.4, -0.9 to 2.8, -4.5 to -3.5
    assert found["volume"] == pytest.approx([-28.5, -37.9, -62.3])  # 88.6 to 60.1, 227.8 to 189.9, 173.4 to 111.1


def test_several_substitutions_add_up() -> None:
    single, multiple = score(["A2G", "W5F", "R7D"]), score(["A2G:R7D", "W5F", "A2G:W5F:R7D"])
    for name in ("blosum62", "hydrophobicity", "volume"):
        first, second, third = single[name]
        assert multiple[name] == pytest.approx([first + third, second, first + second + third])
    assert multiple["num_mutations"].tolist() == [-2, -1, -3]


def test_tables_against_biopython() -> None:
    tables = build_substitution_tables()
    matrix = substitution_matrices.load("BLOSUM62")
    for row, wild in enumerate(STANDARD_RESIDUES):
        for column, mutant in enumerate(STANDARD_RESIDUES):
            assert tables["blosum62"][row, column] == matrix[wild, mutant]
            gravy = [ProteinAnalysis(residue).gravy() for residue in (wild, mutant)]
            assert tables["hydrophobicity"][row, column] == pytest.approx(-abs(gravy[0] - gravy[1]))
    assert np.array_equal(tables["volume"], tables["volume"].T)
    assert tables["volume"].min() == pytest.approx(60.1 - 227.8)  # glycine and tryptophan
    assert tables["volume"][STANDARD_RESIDUES.index("I"), STANDARD_RESIDUES.index("L")] == 0


def test_insertions_and_deletions_have_only_their_number(tmp_path: Path) -> None:
    (tmp_path / "mutants.fasta").write_text(">a\nMAGKWLRTS\n>b\nMAGPPPKWLRTSD\n>c\nMGGKWLRTSD\n")
    proteins, (found,) = read_variants(tmp_path / "mutants.fasta", [PROTEIN])
    scores = score_baselines(found.variants, proteins)
    assert {name: values.tolist() for name, values in scores.items()} == {"num_mutations": [-1, -3, -1]}


def compute_slowly(rows: list[str]) -> list[dict[str, float]]:
    """Frequencies of each column, by loops over the definition."""
    columns = list(zip(*rows, strict=True))
    weights = [0.0] * len(rows)
    for column in columns:
        different = set(column) & set(STANDARD_RESIDUES)
        for row, letter in enumerate(column):
            if letter in different:
                weights[row] += 1 / (len(different) * column.count(letter))
    numbers = [len(set(column) & set(STANDARD_RESIDUES)) for column in columns]
    observed = sum(numbers) / len(numbers) - 1
    found = []
    for column in columns:
        total = sum(weight for weight, letter in zip(weights, column, strict=True) if letter in STANDARD_RESIDUES)
        shares = {
            residue: sum(weight for weight, letter in zip(weights, column, strict=True) if letter == residue) / total
            for residue in STANDARD_RESIDUES
        }
        found.append(
            {
                residue: (observed * share + PSEUDOCOUNT / 20) / (observed + PSEUDOCOUNT)
                for residue, share in shares.items()
            }
        )
    return found


def encode(rows: list[str]) -> np.ndarray:
    return np.array([[STANDARD_RESIDUES.find(letter) % 21 for letter in row] for row in rows], dtype=np.uint8)


def test_site_frequencies_against_loops() -> None:
    assert encode(["-X"]).tolist() == [[20, 20]]
    found = np.exp(compute_site_frequencies(encode(ROWS)))
    for column, expected in enumerate(compute_slowly(ROWS)):
        for code, residue in enumerate(STANDARD_RESIDUES):
            assert found[column, code] == pytest.approx(expected[residue], abs=1e-12)
    assert found.sum(1) == pytest.approx(np.ones(10))


def test_copies_of_a_sequence_share_its_weight() -> None:
    """98 copies of one sequence and another one that differs everywhere are as frequent as one each."""
    copies, single = (compute_site_frequencies(encode(rows)) for rows in (["MAGK"] * 98 + ["WSTY"], ["MAGK", "WSTY"]))
    assert copies == pytest.approx(single)
    of_m, of_w = (copies[0, STANDARD_RESIDUES.index(letter)] for letter in "MW")
    assert of_m == pytest.approx(of_w)


ALIGNMENTS = {
    "p.a3m": "#10\t1\n>P1\nMAGKWLRTSD\n>b\nMSGKW-RTSE\n>c\nMAGRWLppKTSD\n>d\n-AGRWVKT-D\n>e\nMAGKWLRTSD\n",
    "p.sto": "# STOCKHOLM 1.0\nP1 MAGKWLRTSD\nb MSGKW-RTSE\nc MAGRWLKTSD\nd .AGRWVKT.D\ne MAGKWLRTSD\n//\n",
    "p.fasta": ">P1\nMAG-KWLRTSD\n>b\nMSGPKW-RTSE\n>c\nMAG-RWLKTSD\n>d\n-AG-RWVKT-D\n>e\nMAG-KWLRTSD\n",
}


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_alignments(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(ALIGNMENTS[name])
    found = read_site_frequencies(tmp_path / name, [OTHER, PROTEIN])
    assert list(found) == [1]
    assert np.array_equal(found[1], compute_site_frequencies(encode(ROWS)))
    proteins, (variants,) = read_variants(["A2S", "W5F", "K4R:R7K"], [PROTEIN])
    scores = score_baselines(variants.variants, proteins, {0: found[1]})["site_independent"]
    log_frequencies = [{residue: np.log(share) for residue, share in column.items()} for column in compute_slowly(ROWS)]
    assert scores[0] == pytest.approx(log_frequencies[1]["S"] - log_frequencies[1]["A"])
    assert scores[1] == pytest.approx(log_frequencies[4]["F"] - log_frequencies[4]["W"])
    assert scores[2] == pytest.approx(
        log_frequencies[3]["R"] - log_frequencies[3]["K"] + log_frequencies[6]["K"] - log_frequencies[6]["R"]
    )


def test_an_alignment_of_a_part_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "part.a3m").write_text(">part\nGKWLR\n>b\nGRWLK\n")
    (tmp_path / "other.a3m").write_text(">P2\nCCCCHHHHEE\n>b\nCCCSHHHHEE\n")
    found = read_site_frequencies(tmp_path, [PROTEIN, OTHER])
    assert sorted(found) == [0, 1]
    assert found[0][2:7] == pytest.approx(compute_site_frequencies(encode(["GKWLR", "GRWLK"])))
    assert found[0][:2] == pytest.approx(np.full((2, 20), np.log(1 / 20)))
    # without an alignment of every protein, there is no such baseline
    _, (variants,) = read_variants(["A2S", "W5F"], [PROTEIN])
    assert "site_independent" not in score_baselines(variants.variants, [PROTEIN], {1: found[1]})


@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        (">x\nMAGRRLRTSD\n>b\nMAGKWLRTSE\n", "alignment.query", {}),
        (">P1\nMAGKWLRTSD\n>b\nMAGKWLRTS\n", "alignment.columns", {"row": 2, "found": 9, "expected": 10}),
        ("nothing\n", "alignment.format", {}),
        ("# STOCKHOLM 1.0\nP1 MAGK\nb MA\n//\n", "alignment.format", {}),
    ],
)
def test_files_that_are_no_alignment_of_the_protein(
    tmp_path: Path, text: str, code: str, values: dict[str, object]
) -> None:
    (tmp_path / "alignment.a3m").write_text(text)
    with refused(code, **values):
        read_site_frequencies(tmp_path / "alignment.a3m", [PROTEIN])


def test_alignments_that_do_not_exist(tmp_path: Path) -> None:
    with refused("alignment.absent"):
        read_alignment(tmp_path / "nothing.a3m")
    with refused("alignment.none"):
        read_site_frequencies(tmp_path, [PROTEIN])
