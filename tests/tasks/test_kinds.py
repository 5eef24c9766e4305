"""Files as other projects publish them are recognised and read with their own ids, sequences, targets and sets.

The files are written here after the public descriptions that `esm2kit.tasks.kinds` names; nothing is copied.
"""

import gzip
import logging
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from support.errors import refused

from esm2kit.tasks.config import TaskConfig
from esm2kit.tasks.data import load_labels, load_pooled_task, load_task
from esm2kit.tasks.grouping import plan_folds
from esm2kit.tasks.kinds import KINDS, find_kind, list_splits, peek_kind
from esm2kit.tasks.proteins import read_proteins
from esm2kit.tasks.tables import read_table
from esm2kit.tasks.wild_types import mutate as mutate_wild_type

WILD = "MKTAYIAKQRQISFVKSHFSRQ"
# Ten different proteins of 22 residues, no two of which are variants of each other.
PROTEINS = [
    "MKTAYIAKQRQISFVKSHFSRQ", "GSHMASLVDEWPNCTKFYRIQG", "ACDEFGHIKLMNPQRSTVWYAC", "WYVTSRQPNMLKIHGFEDCAWY",
    "PPGKRNDEHSTVAIMLCWFYQG", "QERTYIPASDFGHKLCVNMWWE", "LKJHGFDSAPIYTREWQMNVCC".replace("J", "K"),
    "NQWRDEVKYHTGSAPLIFMCNQ", "HISTAGFREEPEPTIDEWCVMK", "DVLSKINGMYFACEWRQTPHHD",
]  # fmt: skip
VALUES = [0.5, 1.25, -2.0, 3.0, 0.125, 7.5, -0.75, 2.5, 4.0, 9.0]
SETS = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def check(data, ids=None, sequences=PROTEINS, targets=VALUES, sets=SETS) -> None:
    assert data.ids == (ids or [f"Sequence{place}" for place in range(len(sequences))])
    assert data.sequences == list(sequences)
    assert data.targets.tolist() == list(targets)
    assert data.sets.tolist() == list(sets)


def mutate(position: int, letter: str) -> tuple[str, str]:
    return f"{WILD[position - 1]}{position}{letter}", WILD[: position - 1] + letter + WILD[position:]


def write_gym(path: Path, folds: dict[str, list[int]] | None = None) -> tuple[Path, list[str], list[str]]:
    mutants = [mutate(place + 2, letter) for place, letter in enumerate("ACDEFGHIWL")]
    mutants[4] = (f"{mutants[4][0]}:{WILD[19]}20W", mutants[4][1][:19] + "W" + mutants[4][1][20:])
    folds = folds or {}
    header = ",".join(["mutant", "mutated_sequence", "DMS_score", "DMS_score_bin", *folds])
    rows = [
        ",".join([name, sequence, str(value), str(int(value > 1)), *(str(fold[place]) for fold in folds.values())])
        for place, ((name, sequence), value) in enumerate(zip(mutants, VALUES, strict=True))
    ]
    return write(path, header, *rows), [name for name, _ in mutants], [sequence for _, sequence in mutants]


def test_a_flip2_table_is_read_with_its_further_columns_and_its_validation(tmp_path, caplog):
    """FLIP2: <data set>/splits/<split>.csv, written by pandas with or without its index, validation True or False."""
    rows = [
        f'{place},"A{place}C,D{place}E",{sequence},{value},{"test" if name == "test" else "train"},'
        f"{-place / 3},{name == 'validation'}"
        for place, (sequence, value, name) in enumerate(zip(PROTEINS, VALUES, SETS, strict=True))
    ]
    write(
        tmp_path / "NucB/splits/two_to_many.csv", ",variant_info,sequence,target,set,esm2_650M_scores,validation", *rows
    )
    with caplog.at_level(logging.INFO):
        data = load_task("NucB", None, tmp_path)
    check(data)
    assert (data.task.name, data.split, data.official) == ("NucB", "two_to_many", False)
    assert "two_to_many.csv: read as a FLIP table: sequences from sequence, targets from target" in caplog.text
    assert "columns that are not read: variant_info, esm2_650m_scores" in data.notes
    write(tmp_path / "NucB/splits/hard.csv", "sequence,target,set,validation", *[row.split(",", 3)[3] for row in []],
          *(f"{s},{v},{'test' if n == 'test' else 'train'},{n == 'validation'}" for s, v, n in
            zip(PROTEINS[::-1], VALUES, SETS, strict=True)))  # fmt: skip
    with refused("task.which-split", allowed=("hard", "two_to_many")):
        load_task("NucB", None, tmp_path)
    check(load_task("NucB", "hard", tmp_path), sequences=PROTEINS[::-1])
    check(load_task(str(tmp_path / "NucB/splits/hard.csv")), sequences=PROTEINS[::-1])


def test_a_proteingym_assay_is_read_and_divided(tmp_path):
    path, names, sequences = write_gym(tmp_path / "BLAT_Test_2020.csv")
    line = "BLAT_Test_2020.csv: read as a ProteinGym assay: sequences from mutated_sequence, targets from DMS_score"
    for data in (load_task(str(path), split_by="random"), load_labels(path, split_by="random")):
        assert (data.ids, data.sequences, data.targets.tolist()) == (names, sequences, VALUES)
        assert data.sizes == {"train": 6, "validation": 2, "test": 2}
        assert (data.notes[0], data.task.variants, data.task.target) == (line, True, "value")
    binary = load_labels(path, target="DMS_score_bin", split_by="random")
    assert binary.targets.tolist() == [int(value > 1) for value in VALUES]
    assert binary.notes[0].endswith("targets from DMS_score_bin")


FOLDS = {
    "fold_random_5": [4, 0, 1, 2, 3, 3, 2, 1, 0, 4],
    "fold_modulo_5": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],
    "fold_contiguous_5": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4],
}


@pytest.mark.parametrize("column", FOLDS)
def test_one_option_picks_the_folds_of_a_proteingym_assay(column, tmp_path):
    path, names, sequences = write_gym(tmp_path / "gym" / "ASSAY.csv", FOLDS)
    sets = [{3: "validation", 4: "test"}.get(fold, "train") for fold in FOLDS[column]]
    for data in (
        load_task(str(path), column), load_task("gym", column, tmp_path), load_labels(path, set=column),
    ):  # fmt: skip
        check(data, names, sequences, VALUES, sets)
        assert data.split == column
        assert any(f"sets from {column}: fold 4 is test, fold 3 validation" in note for note in data.notes)


def test_several_columns_of_folds_are_not_chosen_among(tmp_path):
    path, *_ = write_gym(tmp_path / "ASSAY.csv", FOLDS)
    for read in (load_task, load_labels):
        with refused("task.which-split", allowed=tuple(FOLDS)):
            read(str(path))
    with refused("task.one-split", split="fold_modul_5", allowed=tuple(FOLDS)):
        load_task(str(path), "fold_modul_5")
    one, names, sequences = write_gym(tmp_path / "INDELS.csv", {"fold_random_5": FOLDS["fold_random_5"]})
    sets = [{3: "validation", 4: "test"}.get(fold, "train") for fold in FOLDS["fold_random_5"]]
    check(load_task(str(one)), names, sequences, VALUES, sets)
    two, *_ = write_gym(tmp_path / "FEW.csv", {"fold_random_2": [0, 1] * 5})
    with refused("task.few-folds", found=2):
        load_task(str(two))


@pytest.mark.parametrize("column", FOLDS)
def test_the_folds_of_a_proteingym_assay_are_those_of_a_cross_validation(column, tmp_path):
    path, names, sequences = write_gym(tmp_path / "ASSAY.csv", FOLDS)
    for config in (TaskConfig(task=str(path)), TaskConfig(labels=path)):
        data = load_pooled_task(config, others=[column])
        check(data, names, sequences, VALUES, ["train"] * 10)
        plan = plan_folds(data, column)
        assert plan.fold_RP.tolist() == [FOLDS[column]]
        assert plan.names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("reference", ["gym", "."])
def test_the_reference_file_gives_the_wild_type_of_an_assay_without_sequences(reference, tmp_path):
    path, names, sequences = write_gym(tmp_path / "gym" / "BLAT_2020.csv")
    rows = path.read_text().splitlines()
    write(path, *(",".join(cell for place, cell in enumerate(row.split(",")) if place != 1) for row in rows))
    for read in (load_task, load_labels):
        with refused("task.unread-kind", kind="a ProteinGym assay without sequences"):
            read(str(path))
    header = "DMS_id,DMS_filename,target_seq"
    other = f"OTHER_2019,OTHER_2019.csv,{PROTEINS[3]}"
    write(tmp_path / reference / "DMS_substitutions.csv", header, other, f"BLAT_2020,BLAT_2020.csv,{WILD}")
    for read in (load_task, load_labels):
        data = read(str(path), split_by="random")
        assert (data.ids, data.sequences, data.targets.tolist()) == (names, sequences, VALUES)
        assert any("sequences from the wild type in DMS_substitutions.csv" in note for note in data.notes)
    write(tmp_path / reference / "DMS_substitutions.csv", header, other)
    with refused("task.no-wild-type", path=path):
        load_labels(path)


@pytest.mark.parametrize("mutant", ["A1P", "M1", "M0A", "M23A", "M1A:K2", "m1a"])
def test_a_mutation_that_does_not_fit_the_wild_type_is_refused(mutant, tmp_path):
    assert mutate_wild_type(WILD, "M1A:Q22W", tmp_path) == "A" + WILD[1:-1] + "W"
    with refused("task.mutation", path=tmp_path):
        mutate_wild_type(WILD, mutant, tmp_path)


def test_an_assay_in_a_zip_archive_is_refused_and_flips_tables_are_read(tmp_path):
    path, *_ = write_gym(tmp_path / "BLAT_2020.csv")
    rows = [f"{s},{v},{n}" for s, v, n in zip(PROTEINS, VALUES, SETS, strict=True)]
    for name, text in (("gym", path.read_text()), ("flip", "\n".join(["sequence,target,set", *rows]))):
        (tmp_path / name).mkdir()
        with zipfile.ZipFile(tmp_path / name / "splits.zip", "w") as archive:
            archive.writestr("splits/one.csv", text)
    with refused("task.zipped", kind="a ProteinGym assay"):
        load_task("gym", None, tmp_path)
    check(load_task("flip", None, tmp_path))


def test_split_reads_the_proteins_of_these_tables(tmp_path):
    path, names, sequences = write_gym(tmp_path / "ASSAY.csv", FOLDS)
    found = read_proteins(None, path)
    assert (found.ids, found.sequences) == (names, sequences)
    assert [float(cell) for cell in found.columns["DMS_score"]] == VALUES
    assert found.notes == ["ASSAY.csv: read as a ProteinGym assay: sequences from mutated_sequence"]
    rows = [f"d{place},CCO,t,{sequence},{place}" for place, sequence in enumerate(PROTEINS)]
    with refused("task.unread-kind", kind="a TDC table of Drug"):
        read_proteins(None, write(tmp_path / "dti.csv", "Drug_ID,Drug,Target_ID,Target,Y", *rows))


def test_files_of_proteingym_that_are_no_assay(tmp_path):
    reference = write(
        tmp_path / "DMS_substitutions.csv",
        "DMS_index,DMS_id,DMS_filename,UniProt_ID,taxon,target_seq,seq_len",
        f"DMS_sub_0,BLAT_2020,BLAT_2020.csv,BLAT_ECOLX,Prokaryote,{WILD},22",
    )
    for read in (load_task, load_labels):
        with refused("task.unread-kind", kind="ProteinGym's reference file"):
            read(str(reference))
    rows = [f"{sequence},{place % 2}" for place, sequence in enumerate(PROTEINS)]
    clinical = write(tmp_path / "NP_1.csv", "mutated_sequence,DMS_bin_score", *rows)
    data = load_labels(clinical, split_by="random")
    assert (data.task.target, data.targets.tolist()) == ("class", [0, 1] * 5)
    assert data.notes[0].startswith("NP_1.csv: read as ProteinGym's clinical variants")


BIOTRAINER = {
    "sequence_to_class": (["Nucleus", "Cell membrane", "Nucleus"], [1, 0, 1]),
    "sequence_to_value": (["37.5", "-1", "2e1"], [37.5, -1.0, 20.0]),
}


@pytest.mark.parametrize("protocol", BIOTRAINER)
def test_biotrainers_protein_protocols(protocol, tmp_path):
    targets, expected = BIOTRAINER[protocol]
    headers = [
        f">Seq1 TARGET={targets[0]} SET=train", f">Seq2 SET=val TARGET={targets[1]}",
        f">Seq3 TARGET={targets[2]} SET=test", ">Seq4 SET=pred",
    ]  # fmt: skip
    lines = [line for pair in zip(headers, PROTEINS, strict=False) for line in pair]
    if protocol == "sequence_to_class":  # a class of the test set must be in train
        lines = [*lines, ">Seq5 TARGET=Cell membrane SET=train", PROTEINS[5]]
        expected = [*expected, 0]
    data = load_task(str(write(tmp_path / "input.fasta", *lines)))
    proteins = [*PROTEINS[:3], *PROTEINS[5:6]][: len(expected)]
    check(data, ["Seq1", "Seq2", "Seq3", "Seq5"][: len(expected)], proteins, expected,
          ["train", "validation", "test", "train"][: len(expected)])  # fmt: skip


def test_biotrainers_residue_protocols_with_masks(tmp_path):
    lines = [
        ">a TARGET=HECH MASK=1011 SET=train", "MKTA", ">b SET=val TARGET=CCE", "GSH",
        ">c TARGET=EH SET=test MASK=01", "WY",
    ]  # fmt: skip
    data = load_task(str(write(tmp_path / "classes.fasta", *lines)))
    assert (data.task.level, data.task.labels) == ("residue", ("C", "E", "H"))
    assert "".join(data.task.labels[label] for label in data.targets) == "HECHCCEEH"
    assert data.scored.tolist() == [True, False, True, True, True, True, True, False, True]
    assert data.sets.tolist() == ["train", "validation", "test"]


def write_pbc(folder: Path) -> Path:
    """supervised/disorder of PBC: CheZOD scores separated by semicolons, 999.0 with mask 0 for unresolved residues."""
    return write(
        folder / "supervised/disorder/disorder.fasta",
        ">26672 SET=train TARGET=999.0;-0.5;2.73 MASK=011", "MAS", ">9 SET=val TARGET=1.5;8.25 MASK=11", "GT",
        ">7 SET=test TARGET=0.0;-3.5;999.0;12.0 MASK=1101", "WYVT",
    ).parent  # fmt: skip


def test_pbcs_disorder_is_read_from_its_folder(tmp_path, caplog):
    folder = write_pbc(tmp_path)
    write(folder / "dataset_compilation/training.fasta", ">x", "MKV")
    write(folder / "README.md", "# Disorder")
    with caplog.at_level(logging.INFO):
        data = load_task(str(folder))
    assert "disorder.fasta: read as a biotrainer FASTA: targets from TARGET, sets from SET" in caplog.text
    assert (data.task.name, data.task.level, data.task.target) == ("disorder", "residue", "value")
    assert data.ids == ["26672", "9", "7"]
    assert data.targets[data.scored].tolist() == [-0.5, 2.73, 1.5, 8.25, 0.0, -3.5, 12.0]
    assert data.scored.tolist() == [False, True, True, True, True, True, True, False, True]


def write_test_sets(path: Path) -> Path:
    """Several test sets in one file, as in PBC's secondary structure and biotrainer's example."""
    sets = ["train", "train", "train", "val", "newPISCES364", "casp12", "casp12", "test2", "test"]
    lines = [
        line
        for place, (name, sequence) in enumerate(zip(sets, PROTEINS, strict=False))
        for line in (f">p{place} SET={name} TARGET={'ab'[place % 2]}", sequence)
    ]
    return write(path, *lines, ">unknown SET=pred", "MKV")


@pytest.mark.parametrize(
    ("split", "tested"), [("newPISCES364", ["p4"]), ("casp12", ["p5", "p6"]), ("test2", ["p7"]), ("test", ["p8"])]
)
def test_a_split_is_one_of_several_test_sets(split, tested, tmp_path):
    path = write_test_sets(tmp_path / "secondary_structure" / "secondary_structure.fasta")
    for task in (path, path.parent):
        data = load_task(str(task), split)
        assert [data.ids[row] for row in data.rows("test")] == tested
        assert [data.ids[row] for row in data.rows("train")] == ["p0", "p1", "p2"]
        assert [data.ids[row] for row in data.rows("validation")] == ["p3"]
        assert (data.split, data.official) == (split, False)
        assert f"the test set is {split}; those of other names are left out" in data.notes


def test_without_a_split_several_test_sets_are_refused(tmp_path):
    path = write_test_sets(tmp_path / "multi.fasta")
    with refused("task.set", found="newPISCES364") as caught:
        load_task(str(path))
    assert "--split newPISCES364" in str(caught.value)
    with refused("task.one-split", allowed=("newPISCES364", "casp12", "test2", "test")):
        load_task(str(path), "casp13")


def test_what_follows_a_set_in_a_header_is_a_comment(tmp_path):
    """As in biotrainer's example of several test sets."""
    lines = [
        ">a TARGET=1.5 SET=train # of the first batch", PROTEINS[0], ">b TARGET=2.5 SET=val the second", PROTEINS[1],
        ">c SET=test TARGET=3.5", PROTEINS[2], ">d TARGET=4.5 SET=pred # TARGET is ignored during inference", "MKV",
    ]  # fmt: skip
    data = load_task(str(write(tmp_path / "input.fasta", *lines)))
    check(data, ["a", "b", "c"], PROTEINS[:3], [1.5, 2.5, 3.5], ["train", "validation", "test"])
    write(tmp_path / "input.fasta", *lines[:-2], ">d TARGET=4.5 SET=trian # a typing error", "MKV")
    with refused("task.set", found="trian"):
        load_task(str(tmp_path / "input.fasta"))


def test_a_flip_table_with_tabs(tmp_path):
    rows = [f"{s}\t{v}\t{n}" for s, v, n in zip(PROTEINS, VALUES, SETS, strict=True)]
    for name in ("mine.tsv", "mine.tab", "mine.tsv.gz"):
        check(load_task(str(write(tmp_path / name, "sequence\ttarget\tset", *rows))))


def test_folds_of_any_table_of_labels_are_sets(tmp_path):
    rows = [f"p{place},{s},{v},{place % 3}" for place, (s, v) in enumerate(zip(PROTEINS, VALUES, strict=True))]
    path = write(tmp_path / "mine.csv", "name,sequence,Tm,fold", *rows)
    sets = [("train", "validation", "test")[place % 3] for place in range(10)]
    check(load_labels(path, set="fold"), [f"p{place}" for place in range(10)], sets=sets)


def test_a_message_lists_only_the_first_of_many_splits(tmp_path):
    for number in range(30):
        write_gym(tmp_path / "gym" / f"ASSAY_{number:02d}.csv")
    with refused("task.which-split") as caught:
        load_task("gym", None, tmp_path)
    assert len(caught.value.values["allowed"]) == 30
    assert "ASSAY_19, ...)" in str(caught.value)


@pytest.mark.parametrize("wrong", ["tset", "trian", "vaildation", "Tran"])
def test_a_misspelt_set_is_not_a_test_set(wrong, tmp_path):
    path = write_test_sets(tmp_path / "multi.fasta")
    path.write_text(path.read_text().replace("SET=test\n", f"SET={wrong}\n").replace("SET=test ", f"SET={wrong} "))
    with refused("task.set", found=wrong):
        load_task(str(path), "casp12")


def test_several_test_sets_of_a_flip_table(tmp_path):
    names = ["train", "train", "val", "test", "hard", "hard"]
    rows = [f"{sequence},{value},{name}" for sequence, value, name in zip(PROTEINS, VALUES, names, strict=False)]
    path = write(tmp_path / "mine.csv", "sequence,target,set", *rows)
    data = load_task(str(path), "hard")
    assert data.targets[data.rows("test")].tolist() == VALUES[4:6]
    assert len(data.ids) == 5


TDC = [
    "Antibody_ID\tAntibody\tY",
    *(f"ab{place}\t{s}\t{v}" for place, (s, v) in enumerate(zip(PROTEINS, VALUES, strict=True))),
]


@pytest.mark.parametrize("name", ["SAbDab.tab", "SAbDab.tsv", "SAbDab.csv", "SAbDab.csv.gz", "SAbDab.tab.gz"])
def test_a_tdc_table_is_read_whatever_separates_its_cells(name, tmp_path):
    lines = TDC if ".csv" not in name else [line.replace("\t", ",") for line in TDC]
    path = write(tmp_path / name, *lines)
    data = load_task(str(path), split_by="random")
    assert data.ids == [f"ab{place}" for place in range(10)]
    assert (data.sequences, data.targets.tolist()) == (PROTEINS, VALUES)
    assert data.notes[0] == f"{name}: read as a TDC table: sequences from Antibody, targets from Y"


@pytest.mark.parametrize("last", ["valid", "val", "validation"])
def test_the_sets_of_a_tdc_split_are_its_files(last, tmp_path):
    lines = [line.replace("\t", ",") for line in TDC]
    for name, start, stop in (("train", 0, 6), (last, 6, 8), ("test", 8, 10)):
        write(tmp_path / "dev" / f"{name}.csv", lines[0], *lines[1 + start : 1 + stop])
    for data in (load_task("dev", None, tmp_path), load_labels(tmp_path / "dev")):
        check(data, [f"ab{place}" for place in range(10)])
        assert any(f"sets from train.csv, {last}.csv, test.csv" in note for note in data.notes)
        assert {path.name for path in data.files.values()} == {"train.csv", f"{last}.csv", "test.csv"}
    write(tmp_path / "dev/test.csv", "Antibody_ID,Antibody,Score", *lines[9:])
    with refused("task.other-columns"):
        load_task("dev", None, tmp_path)


def test_tdcs_benchmark_groups_have_train_and_validation_in_one_file(tmp_path):
    rows = [
        f"p{place},{sequence},{value}" for place, (sequence, value) in enumerate(zip(PROTEINS, VALUES, strict=True))
    ]
    write(tmp_path / "group/train_val.csv", "Peptide_ID,Peptide,Y", *rows[:8])
    write(tmp_path / "group/test.csv", "Peptide_ID,Peptide,Y", *rows[8:])
    data = load_task("group", None, tmp_path, split_by="random")
    assert (data.sizes["test"], data.sizes["train"] + data.sizes["validation"]) == (2, 8)
    assert [data.ids[row] for row in data.rows("test")] == ["p8", "p9"]
    assert data.targets.tolist() == VALUES


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("Drug_ID,Drug,Y", "d{},CC(=O)OC1=CC=CC=C1C(=O)O,{}"),
        ("Drug_ID,Drug,Target_ID,Target,Y", "d{},CCO,t1," + WILD + ",{}"),
        ("Antibody,Antigen,Y", WILD + "," + PROTEINS[1] + ",{}{}"),
        ("Sequence_ID,Sequence,Protein Target_ID,Protein Target,Y", "a{}," + WILD + ",b,MDM2,{}"),
        ("miRNA_ID,miRNA,Target_ID,Target,Y", "m{},UUAAUGCUAAUCGUGAUAGGGGU,t," + WILD + ",{}"),
    ],
)  # fmt: skip
def test_tdc_tables_that_are_not_of_single_proteins_are_refused(header, row, tmp_path):
    path = write(tmp_path / "tdc.csv", header, *(row.format(place, place / 2) for place in range(8)))
    for read in (load_task, load_labels):
        with refused("task.unread-kind"):
            read(str(path))


@pytest.mark.parametrize("others", ["Drug", "Antibody,Antigen"])
def test_a_table_with_sequences_next_to_a_molecule_is_not_of_tdc(others, tmp_path):
    cells = ",".join(["CCO"] * len(others.split(",")))
    path = write(
        tmp_path / "my.csv", f"id,sequence,{others},Y", *(f"p{n},{WILD[n:]},{cells},{n / 2}" for n in range(15))
    )
    data = load_labels(path, target="Y")
    assert data.sequences == [WILD[n:] for n in range(15)]
    assert data.targets.tolist() == [n / 2 for n in range(15)]


@pytest.mark.parametrize(("first", "second"), [("Antibody", "Antigen"), ("Protein1", "Protein2"), ("Peptide", "MHC")])
def test_tdc_tables_of_pairs_are_read_as_pairs(first, second, tmp_path):
    header = f"{first}_ID,{first},{second}_ID,{second},Y"
    partners = PROTEINS[::-1]
    rows = [f"a{place},{PROTEINS[place]},b{9 - place},{partners[place]},{VALUES[place]}" for place in range(10)]
    data = load_task(str(write(tmp_path / "pairs.csv", header, *rows)), split_by="random")
    assert (data.sequences, data.pairs.second, data.targets.tolist()) == (PROTEINS, partners, VALUES)
    assert data.pairs.first_ids == [f"a{place}" for place in range(10)]
    assert data.pairs.second_ids == [f"b{9 - place}" for place in range(10)]
    line = f"pairs.csv: read as a TDC table: pairs of proteins from '{first}' and '{second}', target Y"
    assert data.notes[0] == line
    for name, start, stop in (("train", 0, 6), ("valid", 6, 8), ("test", 8, 10)):
        write(tmp_path / "sets" / f"{name}.csv", header, *rows[start:stop])
    for data in (load_task("sets", None, tmp_path), load_labels(tmp_path / "sets")):
        assert (data.sequences, data.pairs.second, data.sets.tolist()) == (PROTEINS, partners, SETS)
        assert {path.name for path in data.files.values()} == {"train.csv", "valid.csv", "test.csv"}
        assert data.notes[0].endswith("target Y; sets from train.csv, valid.csv, test.csv")


def test_several_chains_in_a_cell_are_refused(tmp_path):
    rows = [f"ab{place},\"['{PROTEINS[place]}', '{WILD}']\",{value}" for place, value in enumerate(VALUES)]
    path = write(tmp_path / "tap.csv", "Antibody_ID,Antibody,Y", *rows)
    with refused("task.several-chains", kind="a TDC table"):
        load_task(str(path))


def test_other_tables_of_the_field(tmp_path):
    stage = {"validation": "valid"}
    rows = [f"{s},{v},{stage.get(n, n)}" for s, v, n in zip(PROTEINS, VALUES, SETS, strict=True)]
    check(load_task(str(write(tmp_path / "saprot.csv", "protein,label,stage", *rows))))
    plain = load_task(str(write(tmp_path / "plain.csv", "X,Y", *(row.rpartition(",")[0] for row in rows))))
    check(plain, sets=plain.sets)
    for name in ("train", "valid", "test"):
        chosen = [row.rpartition(",")[0] for row in rows if row.endswith(f",{name}")]
        write(tmp_path / "fold" / f"{name}.csv", "seq,label", *chosen)
    check(load_task("fold", None, tmp_path))


def test_tasks_yaml_describes_tables_of_other_projects_too(tmp_path):
    path, *_ = write_gym(tmp_path / "gym" / "ASSAY.csv")
    write(tmp_path / "gym/tasks.yaml", "tasks:", "- {name: ASSAY, metric: rmse, unit: kcal/mol, source: a paper}")
    task = load_task(str(path), split_by="random").task
    assert (task.metric, task.unit, task.citation) == ("rmse", "kcal/mol", "a paper")
    write(tmp_path / "gym/tasks.yaml", "tasks:", "- {name: ASSAY, metric: f1}")
    with refused("task.metric", found="f1"):
        load_task(str(path), split_by="random")


NEAR_MISSES = {
    "numbers": ("X,Y", "{place},{value}"),
    "molecules": ("X,Y", "CC(=O)N{place},{value}"),
    "labels": ("seq,label", "HHEEC,{value}"),
    "other case": ("Mutant,Mutated_Sequence,dms_score", "A1C,{sequence},{value}"),
    "no score": ("mutant,mutated_sequence,score", "A1C,{sequence},{value}"),
    "one of the names": ("Antibody,Y", "{sequence},{value}"),
    "an id without its protein": ("Antibody_ID,heavy,Y", "a{place},{sequence},{value}"),
    "no stage": ("protein,label", "{sequence},{value}"),
    "names": ("protein,label,stage", "P1234{place},{value},train"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_of_no_kind(name, tmp_path):
    header, row = NEAR_MISSES[name]
    rows = [
        row.format(place=place, sequence=sequence, value=value)
        for place, (sequence, value) in enumerate(zip(PROTEINS, VALUES, strict=True))
    ]
    path = write(tmp_path / "near.csv", header, *rows)
    assert find_kind(read_table(path)) is None
    assert peek_kind(path) is None
    with refused("task.columns"):
        load_task(str(path))


def test_a_table_of_two_kinds_is_the_first_of_the_list(tmp_path):
    """FLIP's columns and ProteinGym's: FLIP's sets are the ones that the file brings."""
    rows = [
        f"{s},{v},{'test' if n == 'test' else 'train'},{n == 'validation'},A1C,{s},{-v}"
        for s, v, n in zip(PROTEINS, VALUES, SETS, strict=True)
    ]
    header = "sequence,target,set,validation,mutant,mutated_sequence,DMS_score"
    path = write(tmp_path / "both.csv", header, *rows)
    assert peek_kind(path).name == KINDS[0].name == "a FLIP table"
    check(load_task(str(path)))


@pytest.mark.parametrize("columns", [kind.columns for kind in KINDS], ids=range(len(KINDS)))
def test_a_kind_is_not_hidden_by_an_earlier_one(columns):
    """Of two kinds one of which has all columns of the other, the one with more columns comes first."""
    place = [kind.columns for kind in KINDS].index(columns)
    assert not any(set(kind.columns) < set(columns) for kind in KINDS[:place])


@pytest.mark.parametrize(
    "name", ["data.mdb", "fluorescence_train.lmdb", "fluorescence_train.json", "splits.pkl", "a.jsonl"]
)
def test_kinds_of_files_that_are_not_read_say_what_to_do(name, tmp_path):
    path = write(tmp_path / "tape" / name, "content")
    for task in (path, path.parent):
        with refused("task.unread-kind") as caught:
            load_task(str(task))
        assert "CSV" in str(caught.value)


def write_parquet(path: Path, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


def test_parquet_tables_of_the_hugging_face_hub(tmp_path):
    for name, rows in (("train-00000-of-00002", range(3)), ("train-00001-of-00002", range(3, 6)),
                       ("valid-00000-of-00001", range(6, 8)), ("test-00000-of-00001", range(8, 10))):  # fmt: skip
        write_parquet(
            tmp_path / f"data/{name}.parquet",
            seq=[PROTEINS[row] for row in rows],
            label=pa.array([VALUES[row] for row in rows], pa.float64()),
        )
    data = load_task("data", None, tmp_path)
    check(data)
    assert (
        data.notes[0] == "data: read as a table with the columns seq and label: sequences from seq, targets from label"
    )
    assert len(data.files) == 4
    (tmp_path / "data/train-00001-of-00002.parquet").unlink()
    assert load_task("data", None, tmp_path).sizes["train"] == 3
    (tmp_path / "data/train-00000-of-00002.parquet").rename(tmp_path / "data/train.parquet")
    assert load_task("data", None, tmp_path).sizes["train"] == 3


def test_flips_and_proteingyms_columns_in_parquet(tmp_path):
    flip = write_parquet(
        tmp_path / "flip.parquet", sequence=PROTEINS, target=VALUES, validation=[name == "validation" for name in SETS],
        set=["test" if name == "test" else "train" for name in SETS],
    )  # fmt: skip
    check(load_task(str(flip)))
    _, names, sequences = write_gym(tmp_path / "gym.csv")
    gym = write_parquet(
        tmp_path / "gym.parquet", mutant=names, mutated_sequence=sequences, DMS_score=VALUES,
        fold_random_5=FOLDS["fold_random_5"], fold_modulo_5=FOLDS["fold_modulo_5"],
    )  # fmt: skip
    sets = [{3: "validation", 4: "test"}.get(fold, "train") for fold in FOLDS["fold_modulo_5"]]
    check(load_task(str(gym), "fold_modulo_5"), names, sequences, VALUES, sets)
    check(load_labels(gym, set="fold_modulo_5"), names, sequences, VALUES, sets)
    gym.write_bytes(gym.read_bytes()[:-40])
    with refused("table.damaged", path=gym):
        load_labels(gym)


def test_lists_of_residue_labels_in_parquet(tmp_path):
    path = write_parquet(
        tmp_path / "disorder.parquet", sequence=["MKT", "GS", "WYVT"], set=["train", "val", "test"],
        target=[[0.5, None, 2.0], [1.0, 2.5], [0.0, -1.0, 3.0, 4.0]],
    )  # fmt: skip
    data = load_task(str(path))
    assert (data.task.level, data.task.target) == ("residue", "value")
    assert data.scored.tolist() == [True, False, *[True] * 7]
    assert data.targets[data.scored].tolist() == [0.5, 2.0, 1.0, 2.5, 0.0, -1.0, 3.0, 4.0]


def test_an_lmdb_folder_is_recognised(tmp_path):
    write(tmp_path / "peer/beta_test.lmdb/data.mdb", "content")
    for task in (tmp_path / "peer/beta_test.lmdb", tmp_path / "peer"):
        with refused("task.unread-kind"):
            load_task(str(task))


def test_labels_with_tabs_next_to_a_fasta_are_no_split(tmp_path):
    write_test_sets(tmp_path / "task" / "sampled.fasta")
    write(tmp_path / "task/organisms.tsv", "id\torganism", *(f"p{place}\tyeast" for place in range(9)))
    assert list_splits(tmp_path / "task") == ["sampled"]
    write(tmp_path / "task/SAbDab.tab", *TDC)
    assert list_splits(tmp_path / "task") == ["SAbDab", "sampled"]


def test_a_task_with_the_name_of_a_flip_task_is_not_official(tmp_path):
    """The sizes of one's own folder gb1 were compared with none, so published scores stood next to its scores."""
    lines = [f"{s},{v},{'test' if n == 'test' else 'train'},{n == 'validation'}"
             for s, v, n in zip(PROTEINS, VALUES, SETS, strict=True)]  # fmt: skip
    write(tmp_path / "gb1/three_vs_rest.csv", "sequence,target,set,validation", *lines)
    own = load_task(str(tmp_path / "gb1"))
    assert (own.task.name, own.split, own.official) == ("gb1", "three_vs_rest", False)
    flip = load_task("gb1", "three_vs_rest", tmp_path)
    assert any("differ from FLIP's" in note for note in flip.notes)


def test_the_sample_tasks_are_read_as_before(root):
    for name, sizes in (("domain_of_life", 450), ("helix_content_pdb", None)):
        data = load_task(name, None, root / "data" / "sample" / "tasks")
        assert data.split == "sampled"
        assert sizes is None or len(data.ids) == sizes
        assert np.isin(data.sets, ("train", "validation", "test")).all()


def test_the_documentation_lists_every_kind(root):
    page = (root / "docs" / "howto" / "own-data.md").read_text()
    for kind in KINDS:
        name = "a TDC table" if kind.name.startswith("a TDC table") else kind.name
        assert f"| {name.removeprefix('a ')} |" in page, name
