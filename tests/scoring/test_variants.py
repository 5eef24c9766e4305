"""Variants from texts, lists, tables, ProteinGym's files and FASTA files: read rightly, or refused in one line."""

import gzip
import logging
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from Bio.Align import substitution_matrices
from hypothesis import given
from hypothesis import strategies as st
from support.errors import refused

from esm2kit.scoring.mutations import compare_sequences, find_offset, format_variant, parse_mutation, parse_positions
from esm2kit.scoring.variants import Variant, list_substitutions, read_variants
from esm2kit.sequences.alphabet import STANDARD_RESIDUES
from esm2kit.sequences.fasta import Record, read_fasta

#          1234567890123456789012345
SEQUENCE = "MAGKWLRTSDEQAFGHIKLMNPVYC"
PROTEIN = Record("P1", "P1", SEQUENCE)
OTHER = Record("P2", "P2", "MKKLLVAGGEQWERTYPASDF")


def read_texts(mutations: str | Path | list[str], proteins: list[Record] | None = None, **options: object) -> list[str]:
    """Read variants of one source, and return their names."""
    _, (found,) = read_variants(mutations, [PROTEIN] if proteins is None else proteins, **options)
    return [variant.text for variant in found.variants]


def mutate(*names: str) -> str:
    """Apply mutations to SEQUENCE by their names."""
    letters = list(SEQUENCE)
    for name in names:
        letters[int(name[1:-1]) - 1] = name[-1]
    return "".join(letters)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A2G", "A2G"),
        ("A2G,K4R", "A2G K4R"),
        ("A2G:K4R", "A2G:K4R"),
        ("K4R:A2G", "A2G:K4R"),
        ("A2G; K4R\tW5F", "A2G K4R W5F"),
        ("A2G/K4R", "A2G:K4R"),
        ("a2g", "A2G"),
        ("Ala2Gly", "A2G"),
        ("p.Ala2Gly", "A2G"),
        ("p.(Ala2Gly)", "A2G"),
        ("p.A2G", "A2G"),
        ("p.[Ala2Gly;Lys4Arg],W5F", "A2G:K4R W5F"),
        ("A2G;K4R,W5F", "A2G:K4R W5F"),  # as in a cell of a table
        (";A2G; K4R;", "A2G K4R"),
    ],
)
def test_mutations_of_the_command_line(text: str, expected: str) -> None:
    assert read_texts(text) == expected.split()


def test_a_list_may_be_longer_than_the_name_of_a_file() -> None:
    names = [f"{letter}{number}{'G' if letter != 'G' else 'A'}" for number, letter in enumerate(SEQUENCE, 1)]
    assert read_texts(",".join(names)) == names
    assert len(",".join(names)) < 255
    everything = [variant.text for variant in list_substitutions(0, SEQUENCE)]
    assert read_texts(",".join(everything)) == everything
    assert len(",".join(everything)) > 255
    with refused("mutations.form", mutation="A2"):
        read_texts(",".join([*everything, "A2"]))


def test_a_first_line_that_is_not_read_is_no_name_of_a_column(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("substitutions\nA2G;K4R\nW5F\n")
    assert read_texts(path) == ["A2G:K4R", "W5F"]
    path.write_text("K4del\nA2G\n")
    with refused("mutations.not-substitution", mutation="K4del"):
        read_texts(path)
    path.write_text("42A\nA2G\n")
    with refused("mutations.form", mutation="42A"):
        read_texts(path)


def test_semicolons_between_columns_are_a_table(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("mutant;score\nA2G;2\nK4R;3\nW5F;1\n")
    _, (found,) = read_variants(path, [PROTEIN])
    assert [variant.text for variant in found.variants] == ["A2G", "K4R", "W5F"]
    assert found.measured_N is not None
    np.testing.assert_array_equal(found.measured_N, [2.0, 3.0, 1.0])


def test_a_column_of_what_is_no_table_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("A2G\nK4R\n")
    (tmp_path / "mutants.fasta").write_text(f">a\n{mutate('A2G')}\n")
    for source in ("A2G", tmp_path / "list.txt", tmp_path / "mutants.fasta"):
        with refused("mutations.no-table", found="activity"):
            read_texts(source, measured="activity")
    with refused("mutations.no-table", found="mutant"):
        read_texts("A2G", column="mutant")
    for name in ("none.docx", "none.tab", "none.csv.gz", "folder/none.xlsx"):
        with refused("mutations.absent"):
            read_texts(name)


def test_measured_values_of_some_records_of_a_fasta(tmp_path: Path) -> None:
    path = tmp_path / "mutants.fasta"
    path.write_text(f">a TARGET=1.5\n{mutate('A2G')}\n>b\n{mutate('K4R')}\n>c TARGET=2\n{mutate('W5F')}\n")
    _, (found,) = read_variants(path, [PROTEIN])
    assert found.measured_N is not None
    np.testing.assert_array_equal(found.measured_N, [1.5, np.nan, 2.0])


def test_a_variant_has_indices_from_0_and_its_protein() -> None:
    proteins, (found,) = read_variants("A2G:K4R", [PROTEIN])
    assert proteins == [PROTEIN]
    assert found.variants == [Variant(0, ((1, "A", "G"), (3, "K", "R")), None, "A2G:K4R")]
    assert found.measured_N is None
    assert found.is_fit_N is None
    assert found.name == ""


def test_the_offset_is_added_to_the_number_of_a_residue() -> None:
    assert read_variants("A27G", [PROTEIN], offset=25)[1][0].variants == [Variant(0, ((1, "A", "G"),), None, "A27G")]
    # a tag before the first residue has negative numbers
    assert read_variants("A-3G", [PROTEIN], offset=-5)[1][0].variants == [Variant(0, ((1, "A", "G"),), None, "A-3G")]


@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        ("A3G", "mutations.wild-type", {"position": 3, "found": "G", "expected": "A", "offset": 1}),
        ("A103G,K105R", "mutations.position", {"position": 103, "first": 1, "last": 25, "offset": 101}),
        ("A2G,W6R", "mutations.wild-type", {"position": 6, "found": "L", "expected": "W", "offset": None}),
        ("A0G", "mutations.position", {"position": 0, "first": 1, "last": 25}),
        ("C26G", "mutations.position", {"position": 26, "last": 25, "offset": 1}),
        ("A2A", "mutations.same", {"mutation": "A2A"}),
        ("A2*", "mutations.stop", {"mutation": "A2*"}),
        ("p.Ala2Ter", "mutations.stop", {"mutation": "p.Ala2Ter"}),
        ("A2X", "mutations.letter", {"found": "X"}),
        ("A2B", "mutations.letter", {"found": "B"}),
        ("Ala2Xyz", "mutations.letter", {"found": "Xyz"}),
        ("A2", "mutations.form", {"mutation": "A2"}),
        ("2G", "mutations.form", {"mutation": "2G"}),
        ("hello", "mutations.form", {"mutation": "hello"}),
        ("p.Ala2del", "mutations.not-substitution", {"mutation": "p.Ala2del"}),
        ("p.Ala2fs", "mutations.not-substitution", {"mutation": "p.Ala2fs"}),
        ("p.Ala2=", "mutations.not-substitution", {"mutation": "p.Ala2="}),
        ("A2G:A2T", "mutations.repeated-position", {"position": 2}),
        ("A0G:A0T", "mutations.repeated-position", {"position": 0}),
        (" , ", "mutations.none", {}),
        ("WT", "mutations.none", {}),
        ("mine.csv", "mutations.absent", {}),
    ],
)
def test_mutations_that_cannot_be_scored(text: str, code: str, values: dict[str, object]) -> None:
    with refused(code, **values):
        read_texts(text)


def test_the_nearest_offset_that_fits_all_mutations() -> None:
    residues = [(2, "A"), (4, "K"), (5, "W")]
    for offset in (-7, 0, 12):
        assert find_offset(SEQUENCE, [(number + offset, letter) for number, letter in residues]) == offset
    # K is at 4 and 18: of 86 and 100, the one that is nearer to what is set
    assert find_offset(SEQUENCE, [(104, "K")]) == 86
    assert find_offset(SEQUENCE, [(104, "K")], near=99) == 100
    assert find_offset(SEQUENCE, [(2, "A"), (3, "A")]) is None
    with refused("mutations.wild-type", offset=12) as caught:
        read_texts("A14G,K16R,W17F")
    assert "'A' at position 16, not 'K'" not in str(caught.value)
    assert "With --offset 12 all wild-type letters fit (3 positions)." in str(caught.value)


def test_several_proteins_need_a_column_that_names_them(tmp_path: Path) -> None:
    with refused("mutations.proteins", found=2):
        read_texts("A2G", [PROTEIN, OTHER])
    table = tmp_path / "two.csv"
    table.write_text("protein,mutant\nP2,K2R\nP1,A2G\nP2,L4V\n")
    _, (found,) = read_variants(table, [PROTEIN, OTHER])
    assert [(variant.protein, variant.text) for variant in found.variants] == [(1, "K2R"), (0, "A2G"), (1, "L4V")]
    # the same table with one of the proteins
    with refused("mutations.proteins", found=2):
        read_texts(table, [OTHER])
    table.write_text("protein,mutant\nP2,K2R\nP9,A2G\n")
    with refused("mutations.unknown-protein", found="P9"):
        read_texts(table, [PROTEIN, OTHER])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "A2G\n\nK4R:W5F\n"),
        ("commas.txt", "A2G, K4R:W5F\n"),
        ("comment.txt", "# of the first batch\nA2G\nK4R:W5F\n"),
        ("header.txt", "mutant\nA2G\nK4R:W5F\n"),
        ("table.csv", "mutant,note\nA2G,first\nK4R:W5F,second\n"),
        ("table.tsv", "note\tVariant\nfirst\tA2G\nsecond\tK4R:W5F\n"),
        ("german.csv", "\ufeffName;Messung\nA2G;1,5\nK4R:W5F;2,5\n"),
        ("hgvs.csv", "accession,hgvs_pro\nu#1,p.Ala2Gly\nu#2,p.[Lys4Arg;Trp5Phe]\n"),
        ("blanks.txt", "mutant score\nA2G 0.5\nK4R:W5F 1.5\n"),
        ("mutants.fasta", f">a\n{mutate('A2G')}\n>wild_type\n{SEQUENCE}\n>b\n{mutate('K4R', 'W5F')}\n"),
        ("sequences.csv", f"name,sequence\na,{mutate('A2G')}\nb,{mutate('K4R', 'W5F').lower()}*\n"),
    ],
)
def test_files_of_variants(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    if name == "hgvs.csv":  # an accession per row would be one protein per row
        (tmp_path / name).write_text(text.replace("accession", "id"))
    assert read_texts(tmp_path / name) == ["A2G", "K4R:W5F"]
    assert read_texts(str(tmp_path / name)) == ["A2G", "K4R:W5F"]


def test_compressed_files_and_workbooks(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "table.csv.gz", "wt") as file:
        file.write("mutant,fitness\nA2G,0.5\nK4R,1.5\nW5F,2\n")
    book = openpyxl.Workbook()
    for row in (("Mutation", "fitness"), ("A2G", 0.5), ("K4R", 1.5), ("W5F", 2)):
        book.active.append(row)
    book.save(tmp_path / "table.xlsx")
    for name in ("table.csv.gz", "table.xlsx"):
        _, (found,) = read_variants(tmp_path / name, [PROTEIN])
        assert [variant.text for variant in found.variants] == ["A2G", "K4R", "W5F"]
        assert found.measured_N.tolist() == [0.5, 1.5, 2.0]
        assert found.name == "table"


def write_dms(path: Path, rows: list[tuple[str, str, object, object]]) -> Path:
    lines = [",".join(map(str, row)) for row in (("mutant", "mutated_sequence", "DMS_score", "DMS_score_bin"), *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


ROWS = [("A2G", mutate("A2G"), 1.5, 1), ("K4R:W5F", mutate("K4R", "W5F"), -0.25, 0), ("D10E", mutate("D10E"), 3, 1)]


def test_a_file_of_proteingym_needs_no_wild_type(tmp_path: Path) -> None:
    path = write_dms(tmp_path / "ABC1_YEAST_Smith_2020.csv", ROWS)
    proteins, (found,) = read_variants(path)
    assert proteins == [Record("ABC1_YEAST", "ABC1_YEAST", SEQUENCE)]
    assert found.name == "ABC1_YEAST_Smith_2020"
    assert [variant.text for variant in found.variants] == ["A2G", "K4R:W5F", "D10E"]
    assert found.measured_N.tolist() == [1.5, -0.25, 3.0]
    assert found.is_fit_N.tolist() == [True, False, True]
    # with the wild type's FASTA the result is the same, also among other proteins
    assert read_variants(path, [PROTEIN])[1][0].variants == found.variants
    assert read_variants(path, [OTHER, PROTEIN])[1][0].variants == [
        variant._replace(protein=1) for variant in found.variants
    ]
    with refused("mutations.no-wild-type", found=2):
        read_variants(path, [OTHER, Record("P3", "P3", SEQUENCE + "A")])


def test_a_folder_of_assays_shares_equal_wild_types(tmp_path: Path) -> None:
    for name in ("ABC1_YEAST_Smith_2020", "ABC1_YEAST_Jones_2021"):
        write_dms(tmp_path / f"{name}.csv", ROWS)
    longer = [(name, sequence + "A", *rest) for name, sequence, *rest in ROWS]
    write_dms(tmp_path / "ABC1_YEAST_Zhou_2022.csv", longer)
    (tmp_path / "readme.txt").write_text("nothing")
    proteins, sets = read_variants(tmp_path)
    assert [(record.id, record.sequence) for record in proteins] == [
        ("ABC1_YEAST", SEQUENCE), ("ABC1_YEAST_Zhou_2022", SEQUENCE + "A"),
    ]  # fmt: skip
    assert [(found.name, found.variants[0].protein) for found in sets] == [
        ("ABC1_YEAST_Jones_2021", 0), ("ABC1_YEAST_Smith_2020", 0), ("ABC1_YEAST_Zhou_2022", 1),
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with refused("mutations.none"):
        read_variants(tmp_path / "empty")


def test_the_wild_type_in_a_column_and_fasta_files_of_named_mutants(tmp_path: Path) -> None:
    (tmp_path / "lab.csv").write_text(f"mutant,sequence,ddG\nA2G,{SEQUENCE},0.5\nK4R,{SEQUENCE},1\nW5F,{SEQUENCE},2\n")
    proteins, (found,) = read_variants(tmp_path / "lab.csv")
    assert proteins[0] == Record("lab", "lab", SEQUENCE)
    assert found.measured_N.tolist() == [0.5, 1.0, 2.0]
    (tmp_path / "named.fasta").write_text(f">A2G TARGET=0.5\n{mutate('A2G')}\n>K4R TARGET=-1e-3\n{mutate('K4R')}\n")
    proteins, (found,) = read_variants(tmp_path / "named.fasta")
    assert proteins[0].sequence == SEQUENCE
    assert found.measured_N.tolist() == [0.5, -0.001]
    (tmp_path / "unnamed.fasta").write_text(f">a\n{mutate('A2G')}\n")
    with refused("mutations.no-wild-type"):
        read_variants(tmp_path / "unnamed.fasta")
    with refused("mutations.no-wild-type"):
        read_variants("A2G")


@pytest.mark.parametrize(
    ("rows", "code", "values"),
    [
        ([("A2G", mutate("A2T"), 1, 1)], "mutations.sequence", {"position": 2, "found": "T"}),
        ([*ROWS, ("A99G", mutate("A2G"), 1, 1)], "mutations.sequence", {"position": 99, "found": "no residue"}),
        ([*ROWS, ("L6V", mutate("L6V", "C25S"), 1, 1)], "mutations.two-wild-types", {"found": 2}),
        ([*ROWS, ("K2R", "MRKLLVAGGEQWERTYPASDF", 1, 1)], "mutations.two-wild-types", {"found": 2}),
        ([*ROWS, ("A2T", mutate("A2T"), "high", 1)], "mutations.measured", {"found": "high", "column": "DMS_score"}),
        ([*ROWS, ("A2T", mutate("A2T"), "inf", 1)], "mutations.measured", {"found": "inf"}),
        ([*ROWS, ("A2T", mutate("A2T"), 1, 2)], "mutations.fit", {"found": "2"}),
        ([*ROWS, ("A2T", mutate("A2T"), 1, "")], "mutations.fit", {"found": ""}),
        ([*ROWS, ("A2G", mutate("A2G"), 1.5, 0)], "mutations.fit-differs", {"mutation": "A2G"}),
        ([*ROWS, ("A2*", mutate("A2G"), 1.5, 0)], "mutations.stop", {"mutation": "A2*"}),
        ([("A2G", mutate("A2G"), "", 1), ("K4R", mutate("K4R"), "NA", 1)], "mutations.no-measured", {}),
        ([], "table.no-rows", {}),
    ],
)
def test_assays_that_are_wrong(tmp_path: Path, rows: list, code: str, values: dict[str, object]) -> None:
    path = write_dms(tmp_path / "assay.csv", rows)
    with refused(code, **values) as caught:
        read_variants(path)
    assert "assay" in str(caught.value)


def test_a_mutated_sequence_is_compared_with_the_wild_type_that_is_given(tmp_path: Path) -> None:
    path = write_dms(tmp_path / "assay.csv", [*ROWS, ("L6V", mutate("L6V", "C25S"), 1, 1)])
    with refused("mutations.sequence", mutation="L6V", position=25, found="S") as caught:
        read_texts(path)
    assert str(caught.value).startswith("assay.csv: row 5: ")
    path = write_dms(tmp_path / "assay.csv", [*ROWS, ("L6V", mutate("L6V")[:-1], 1, 1)])
    with refused("mutations.sequence-length", found=24, expected=25):
        read_texts(path)


def test_tables_without_what_is_needed(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("name,value\na,1\nb,2\n")
    with refused("mutations.no-column"):
        read_texts(table)
    table.write_text("A2G,0.5\nK4R,1.5\n")
    with refused("mutations.no-header"):
        read_texts(table)
    table.write_text("first,second\nA2G,K4R\nK4R,A2G\n")
    with refused("mutations.which-column", found=("first", "second")):
        read_texts(table)
    assert read_texts(table, column="second") == ["K4R", "A2G"]
    with refused("table.no-column", column="third"):
        read_texts(table, column="third")
    table.write_text("mutant,fitness\nA2G,1\n,2\n")
    with refused("mutations.empty-cell"):
        read_texts(table)
    table.write_text("")
    with refused("mutations.none"):
        read_texts(table)


def test_repeated_variants_and_the_wild_type(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "esm2kit")
    table = tmp_path / "table.csv"
    table.write_text("mutant,fitness\nA2G,1\nWT,9\nK4R,0.1\nA2G,2\nW5F,\np.Ala2Gly,6\nW5F,0.3\n")
    _, (found,) = read_variants(table, [PROTEIN])
    assert [variant.text for variant in found.variants] == ["A2G", "K4R", "W5F"]
    assert found.measured_N.tolist() == [3.0, 0.1, 0.3]
    assert found.notes == (
        "measured values are in column 'fitness'",
        "1 row of the wild type omitted",
        "2 variants in several rows, scored once; their measured values are averaged",
    )
    assert "table: 1 row of the wild type omitted" in caplog.text


def test_the_column_of_measured_values(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("position,mutant,Tm,ddG\n2,A2G,51,0.5\n4,K4R,52,1.5\n")
    _, (found,) = read_variants(table, [PROTEIN])
    assert found.measured_N is None
    assert found.notes == ("several columns have numbers ('Tm', 'ddG'); name the measured values with --measured",)
    assert read_variants(table, [PROTEIN], measured="ddG")[1][0].measured_N.tolist() == [0.5, 1.5]
    table.write_text("position,mutant,ddG\n2,A2G,0.5\n4,K4R,n.d.\n5,W5F,1\n6,L6V,2\n")
    measured = read_variants(table, [PROTEIN])[1][0].measured_N
    assert measured[[0, 2, 3]].tolist() == [0.5, 1.0, 2.0]
    assert np.isnan(measured[1])
    # two numbers give no correlation: they are a note, unless the column is named
    table.write_text("mutant,ddG\nA2G,0.5\nK4R,1\n")
    _, (found,) = read_variants(table, [PROTEIN])
    assert found.measured_N is None
    assert found.notes == ("column 'ddG' has too few different numbers for measured values",)
    assert read_variants(table, [PROTEIN], measured="ddG")[1][0].measured_N.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("mutated", "name"),
    [
        (SEQUENCE[:3] + SEQUENCE[6:], "K4_L6del"),
        (SEQUENCE[:3] + SEQUENCE[4:], "K4del"),
        (SEQUENCE[:3] + "PP" + SEQUENCE[3:], "G3_K4insPP"),
        (SEQUENCE[:3] + "PPP" + SEQUENCE[4:], "K4delinsPPP"),
        (SEQUENCE[:3] + "P" + SEQUENCE[6:], "K4_L6delinsP"),
        ("PP" + SEQUENCE, "M1delinsPPM"),
        (SEQUENCE + "PP", "C25delinsCPP"),
        (SEQUENCE[1:], "M1del"),
        (SEQUENCE[:-1], "C25del"),
        # of equal residues the last is named, as in HGVS
        (SEQUENCE[:4] + "W" + SEQUENCE[4:], "W5_L6insW"),
    ],
)
def test_insertions_and_deletions_keep_their_sequence(tmp_path: Path, mutated: str, name: str) -> None:
    assert compare_sequences(SEQUENCE, mutated) == ((), name)
    (tmp_path / "mutants.fasta").write_text(f">a\n{mutated}\n")
    assert read_variants(tmp_path / "mutants.fasta", [PROTEIN])[1][0].variants == [Variant(0, (), mutated, name)]


def test_sequences_of_something_else() -> None:
    with refused("mutations.unrelated"):
        compare_sequences(SEQUENCE, SEQUENCE[::-1])
    with refused("mutations.unrelated"):
        compare_sequences(SEQUENCE, SEQUENCE + "A" * 40)
    with refused("mutations.sequence-letter", found="-", residue=1):
        compare_sequences(SEQUENCE, "-" + SEQUENCE[1:])
    with refused("mutations.letter", found="X", mutation="A2X"):
        compare_sequences(SEQUENCE, mutate("A2X"))
    # an inserted X has no likelihood; without it the sum would be higher than with any residue
    with refused("mutations.letter", found="X", mutation="A2_G3insWX"):
        compare_sequences(SEQUENCE, "MAWX" + SEQUENCE[2:])
    with_x = "MX" + SEQUENCE[2:]
    assert compare_sequences(with_x, with_x[:6] + with_x[8:]) == ((), "R7_T8del")
    assert compare_sequences(SEQUENCE, SEQUENCE) == ((), "")


@given(st.dictionaries(st.integers(0, len(SEQUENCE) - 1), st.sampled_from(STANDARD_RESIDUES), max_size=12))
def test_names_and_sequences_agree(changes: dict[int, str]) -> None:
    mutated = "".join(changes.get(index, letter) for index, letter in enumerate(SEQUENCE))
    substitutions, name = compare_sequences(SEQUENCE, mutated, offset=7)
    assert {position: mutant for position, _, mutant in substitutions} == {
        position: letter for position, letter in changes.items() if letter != SEQUENCE[position]
    }
    assert name == format_variant(substitutions, 7)
    if name:
        assert parse_mutation(name) == tuple((position + 8, wild, mutant) for position, wild, mutant in substitutions)


def test_positions() -> None:
    assert parse_positions("3", 25) == [2]
    assert parse_positions("20-22,3, 21", 25) == [2, 19, 20, 21]
    assert parse_positions("-2-1", 25, offset=-3) == [0, 1, 2, 3]
    assert parse_positions("26", 25, offset=25) == [0]
    for text, number in (("0", 0), ("20-26", 26), ("26", 26)):
        with refused("positions.outside", position=number, first=1, last=25):
            parse_positions(text, 25)
    with refused("positions.outside", position=26) as caught:
        parse_positions("26", 25, place="protein 'P1'")
    assert "position 26 is outside protein 'P1', whose residues are 1 to 25" in str(caught.value)
    for text, part in (("5-3", "5-3"), ("A2", "A2"), ("2..5", "2..5"), ("", "")):
        with refused("positions.form", found=part):
            parse_positions(text, 25)


def test_all_single_substitutions() -> None:
    found = list_substitutions(0, "MXA")
    assert len(found) == 38
    assert len({variant.text for variant in found}) == 38
    assert {variant.substitutions[0][:2] for variant in found} == {(0, "M"), (2, "A")}
    assert [variant.text for variant in list_substitutions(2, "MXA", [2], offset=10)][:2] == ["A13L", "A13G"]
    assert list_substitutions(2, "MXA", [1]) == []
    letters = set(substitution_matrices.load("BLOSUM62").alphabet) - set("BXZ*")
    assert {variant.substitutions[0].mutant for variant in found} == letters


@pytest.mark.shared
def test_a_real_assay_as_it_is(shared_data: Path) -> None:
    path = shared_data / "dms" / "B2L11_HUMAN_Dutta_2010_binding-Mcl-1.csv"
    (protein,), (found,) = read_variants(path)
    assert protein.id == "B2L11_HUMAN"
    assert len(protein.sequence) == 198
    assert len(found.variants) == 170
    assert found.is_fit_N.sum() == 77
    assert found.variants[0].text == "A149D"
    assert found.measured_N[0] == 15411506.23
    for variant in found.variants:
        ((position, wild, _),) = variant.substitutions
        assert protein.sequence[position] == wild
    # the numbers of a construct that begins at residue 141
    construct = Record("peptide", "peptide", protein.sequence[140:])
    with refused("mutations.position", position=149, offset=140, first=1, last=58):
        read_variants([variant.text for variant in found.variants], [construct])
    shifted = read_variants([variant.text for variant in found.variants], [construct], offset=140)[1][0].variants
    assert [variant.substitutions[0].position + 140 for variant in shifted] == [
        variant.substitutions[0].position for variant in found.variants
    ]


@pytest.mark.shared
def test_a_real_fasta_of_single_mutants(shared_data: Path) -> None:
    path = shared_data / "tem1" / "variants.fasta"
    (protein,), (found,) = read_variants(path)
    names = [record.id for record in read_fasta(path)]
    assert [variant.text for variant in found.variants] == names
    assert len(names) == 5009
    assert len(protein.sequence) == 286
    assert protein.sequence.startswith("MSIQHFRVALIPFFAAF")
    assert found.measured_N[0] == 0.9426838
    # compared with the wild type instead of read from the ids: the same variants
    assert read_variants(path, [protein])[1][0].variants == found.variants
