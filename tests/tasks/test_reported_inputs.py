"""Task files from public bug reports of other tools, recreated, with their right reading."""

import os
import subprocess
import sys

import numpy as np
import pytest
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit.tasks.data import load_task

SETS = ("test,False", "train,True", "train,False", "train,False", "train,False")
HEADER = "id,sequence,target,set,validation\n"


def draw_sequences(count, lengths, seed=0):
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), lengths[i % len(lengths)])) for i in range(count)]


def write_table(folder, targets, lengths=(30,), ids="p{}"):
    """Write a table with these targets, or with functions of the sequence, and return the sequences."""
    sequences = draw_sequences(len(targets), lengths)
    rows = (
        f'"{ids.format(i)}",{sequence},"{target(sequence) if callable(target) else target}",{SETS[i % 5]}\n'
        for i, (sequence, target) in enumerate(zip(sequences, targets, strict=True))
    )
    folder.mkdir(exist_ok=True)
    (folder / "random.csv").write_text(HEADER + "".join(rows))
    return sequences


def load(folder, targets, lengths=(30,), ids="p{}", **options):
    write_table(folder / "t", targets, lengths, ids)
    return load_task("t", None, folder, **options)


def has_note(data, text):
    return any(text in note for note in data.notes)


def test_a_class_as_long_as_its_peptide_is_one_class(tmp_path):
    """HIV-1 protease octapeptides, cleaved or not: BMC Bioinformatics 10.1186/s12859-022-05017-x."""
    classes = [("positive", "negative")[i % 3 > 0] for i in range(60)]
    data = load(tmp_path, classes, (8,))
    assert (data.task.level, data.task.target, data.task.labels) == ("protein", "class", ("negative", "positive"))
    assert [data.task.labels[target] for target in data.targets] == classes
    assert has_note(data, "read as one class per protein; set level to residue")
    letters = load(tmp_path, classes, (8,), level="residue")
    assert letters.task.level == "residue"
    assert set(letters.task.labels) == set("positvenga")
    assert not has_note(letters, "set level to residue")
    assert not has_note(load(tmp_path, classes, (9,)), "set level")  # only one reading is possible


def test_a_declared_level_decides(tmp_path):
    (tmp_path / "tasks.yaml").write_text("tasks: [{name: t, level: residue}]\n")
    classes = ["positive", "negative"] * 10
    assert load(tmp_path, classes, (8,)).task.level == "residue"
    assert load(tmp_path, classes, (8,), level="protein").task.level == "protein"
    (tmp_path / "tasks.yaml").write_text("tasks: [{name: t, level: peptide}]\n")
    with refused("task.kind", task="t", name="level", found="peptide"):
        load(tmp_path, classes, (8,))


def helices(sequence):
    return "".join("H" if residue in "AELMQKRH" else "C" for residue in sequence)


@pytest.mark.parametrize("lengths", [(30,), (8,), (5, 8, 13)])
def test_labels_of_residues_are_recognised(tmp_path, lengths):
    data = load(tmp_path, [helices] * 40, lengths)
    assert (data.task.level, data.task.labels) == ("residue", ("C", "H"))
    assert data.targets.tolist() == [int(label == "H") for sequence in data.sequences for label in helices(sequence)]


def test_repeated_labels_of_residues_are_recognised_and_noted(tmp_path):
    """Few letters for the length, or lengths that vary and match, are evidence although the targets repeat."""
    for targets in ([lambda s: "0" * len(s), lambda s: "0" + "1" * (len(s) - 1)] * 20,):
        for lengths in ((12,), (5, 7, 12)):
            data = load(tmp_path, targets, lengths)
            assert data.task.level == "residue"
            assert has_note(data, "read as one label per residue; set level to protein")


def test_integers_as_long_as_the_sequences_are_ambiguous(tmp_path):
    numbers = [str(1000 + 37 * i % 900) for i in range(40)]
    with refused("task.level", found="1000"):
        load(tmp_path, numbers, (4,))
    values = load(tmp_path, numbers, (4,), level="protein")
    assert values.targets.tolist() == [float(number) for number in numbers]
    digits = load(tmp_path, numbers, (4,), level="residue")
    assert [digits.task.labels[target] for target in digits.targets] == list("".join(numbers))


def test_labels_in_the_bodies_that_may_be_classes_are_ambiguous(tmp_path):
    sequences = draw_sequences(20, (8,))
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "sequences.fasta").write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(sequences)))
    sets = ("SET=test", "SET=val", "SET=train", "SET=train")
    classes = ["positive", "positive", "positive", "negative"] * 5
    (folder / "a.fasta").write_text("".join(f">p{i} {sets[i % 4]}\n{text}\n" for i, text in enumerate(classes)))
    with refused("task.level", found="positive"):
        load_task("t", None, tmp_path)
    data = load_task("t", None, tmp_path, level="protein")
    assert [data.task.labels[target] for target in data.targets] == classes
    assert data.sequences == sequences


@pytest.mark.parametrize("field", ["INTERACTOR=q4", "interactor=q4"])
def test_a_pair_without_its_second_protein_is_refused(tmp_path, field):
    """Source: sacdallago/biotrainer examples/protein_protein_interaction/interactions.fasta."""
    (tmp_path / "t.fasta").write_text(f">pair0 {field} TARGET=0 SET=train VALIDATION=False\nMKV\n")
    with refused("pairs.no-sequence", record="pair0", found="q4"):
        load_task("t", None, tmp_path)


def test_a_second_protein_without_a_name_is_refused(tmp_path):
    (tmp_path / "t.fasta").write_text(">pair0 SEQINTERACTOR=MKV TARGET=0 SET=train VALIDATION=False\nMKV\n")
    with refused("task.pair", record="pair0", field="SEQINTERACTOR"):
        load_task("t", None, tmp_path)


def test_a_table_of_pairs_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("sequence,interactor,target,set\nMKV,q4,0,train\n")
    with refused("task.pair", field="interactor"):
        load_task("t", None, tmp_path)


HEADERS = "{0} SET=train TARGET=1.5 {1}\nMKV\n{0}b SET=val TARGET=2.5 {1}\nMKL\n{0}c SET=test TARGET=3.5\nMKI\n"


def test_unknown_fields_are_listed_once(tmp_path):
    (tmp_path / "t.fasta").write_text(HEADERS.format(">a", "OS=Homo sapiens GN=HBA1 TARGET2=7"))
    data = load_task("t", None, tmp_path)
    assert data.targets.tolist() == [1.5, 2.5, 3.5]
    assert "header fields that are not read: OS, GN, TARGET2" in data.notes
    (tmp_path / "u.csv").write_text("sequence,target,set,organism\nMKV,1.5,train,a\nMKL,2.5,val,b\nMKI,3.5,test,c\n")
    assert "columns that are not read: organism" in load_task("u", None, tmp_path).notes


def test_misspelt_repeated_and_lower_case_fields(tmp_path):
    (tmp_path / "t.fasta").write_text(HEADERS.format(">a", "VALIDATON=True"))
    with refused("task.field", found="VALIDATON", nearest="VALIDATION"):
        load_task("t", None, tmp_path)
    (tmp_path / "t.fasta").write_text(HEADERS.format(">a", "TARGET=7"))
    with refused("task.repeated-field", record="a", field="TARGET"):
        load_task("t", None, tmp_path)
    text = HEADERS.format(">a", "validation=True").replace("TARGET", "target").replace("SET=val", "set=train")
    (tmp_path / "t.fasta").write_text(text + ">d SET=train target=0.5\nMKW\n")
    assert load_task("t", None, tmp_path).sets.tolist() == ["validation", "validation", "test", "train"]
    (tmp_path / "t.csv").write_text("sequence,target,set,validaton\nMKV,1.5,train,\n")
    (tmp_path / "t.fasta").unlink()
    with refused("task.field", found="validaton", nearest="validation"):
        load_task("t", None, tmp_path)


@pytest.mark.parametrize("ids", ["GFP A{}K", "v{} rep1", "a/b|{}=x", "Größe {}"])
def test_an_id_of_a_table_is_complete(tmp_path, ids):
    """Ids with blanks: klebgenomics/Kleborate#64."""
    data = load(tmp_path, [f"{i / 7}" for i in range(20)], ids=ids)
    assert data.ids == [ids.format(i) for i in range(20)]


def test_an_id_with_a_line_break_is_read_as_one_line(tmp_path):
    assert load(tmp_path, [f"{i / 7}" for i in range(10)], ids="a\n{}").ids[0] == "a 0"
    with refused("task.id", record="a\x1b0"):
        load(tmp_path, [f"{i / 7}" for i in range(10)], ids="a\x1b{}")


@pytest.mark.parametrize("blank", ["\t", " \t ", "\t\t"])
def test_an_id_ends_at_a_tab(tmp_path, blank):
    """Sources: slt666666/NLRtracker#2, pierrebarbera/epa-ng#11."""
    (tmp_path / "t.fasta").write_text(HEADERS.format(">a", "").replace(" ", blank))
    assert load_task("t", None, tmp_path).ids == ["a", "ab", "ac"]
    folder = tmp_path / "three"
    folder.mkdir()
    (folder / "s.fasta").write_text(">a SET=train\nHCE\n>b SET=val\nEC\n>c SET=test\nCH\n")
    (folder / "sequences.fasta").write_text(f">a{blank}x\nMKV\n>b{blank}y\nLL\n> c\x01d z\nAC\n")
    assert load_task("three", None, tmp_path).sequences == ["MKV", "LL", "AC"]


@pytest.mark.parametrize("text", ["nucleus;cytoplasm", "nucleus|cytoplasm", "['nucleus', 'cytoplasm']"])
@pytest.mark.parametrize("period", [2, 7])
def test_several_labels_per_protein_are_read_with_a_note(tmp_path, text, period):
    """Multi-label location: naity/finetune-esm#2."""
    targets = ["nucleus", "cytoplasm"] * 15
    targets[::period] = [text] * len(targets[::period])
    targets[5], targets[8], targets[15] = "cytoplasm", "nucleus", "nucleus"
    data = load(tmp_path, targets)
    assert data.task.binary_labels == ("cytoplasm", "nucleus")
    assert data.targets.tolist() == [["cytoplasm" in target, "nucleus" in target] for target in targets]
    assert sum("multi-label" in note and "set target_type to class" in note for note in data.notes) == 1
    assert text in load(tmp_path, targets, target_type="class").task.labels


@pytest.mark.parametrize("text", ["nucleus, cytoplasm", "nucleus cytoplasm", "nucleus/cytoplasm", "nucleus;golgi"])
def test_an_uncertain_separator_of_labels_is_refused(tmp_path, text):
    targets = ["nucleus", "cytoplasm"] * 15
    targets[2] = text
    with refused("task.several-labels", record="p2", found=text):
        load(tmp_path, targets)
    assert text in load(tmp_path, targets, target_type="class").task.labels


def test_several_values_per_protein_are_refused(tmp_path):
    with refused("task.several-labels", record="p3", found="1.5;2"):
        load(tmp_path, ["1.5"] * 3 + ["1.5;2"] + ["2.5"] * 16)


def test_a_class_name_with_separators_is_one_class(tmp_path):
    data = load(tmp_path, ["Cell membrane", "Lysosome/Vacuole", "membrane, integral", "Nucleus", "Cell membrane"] * 4)
    assert data.task.labels == ("Cell membrane", "Lysosome/Vacuole", "Nucleus", "membrane, integral")


FORMS = {
    "list": lambda text: str(list(text)).replace('"', "'"),
    "blanks": " ".join,
    "commas": ",".join,
    "semicolons": ";".join,
    "numpy": lambda text: "[" + " ".join(f"'{letter}'" for letter in text) + "]",
}


@pytest.mark.parametrize("form", FORMS)
def test_residue_labels_as_lists(tmp_path, form):
    """Source: ai4protein/VenusX#2."""
    plain = load(tmp_path, [helices] * 20)
    data = load(tmp_path, [lambda sequence: FORMS[form](helices(sequence))] * 20)
    assert (data.task.level, data.task.target, data.task.labels) == ("residue", "class", ("C", "H"))
    assert data.targets.tolist() == plain.targets.tolist()


@pytest.mark.parametrize("form", ["list", "blanks", "commas", "numpy"])
def test_residue_integers_as_lists_are_classes(tmp_path, form):
    bits = lambda sequence: FORMS[form](helices(sequence).replace("H", "1").replace("C", "0")).replace("'", "")  # noqa: E731
    data = load(tmp_path, [bits] * 20)
    assert (data.task.level, data.task.target, data.task.labels) == ("residue", "class", ("0", "1"))
    assert has_note(data, "2 distinct integer targets are treated as classes; set target_type to value")
    values = load(tmp_path, [bits] * 20, target_type="value")
    assert values.targets.tolist() == data.targets.tolist()
    assert values.targets.dtype == np.float64


def test_words_as_residue_labels(tmp_path):
    names = {"H": "helix", "C": "coil"}
    data = load(tmp_path, [lambda sequence: ",".join(names[label] for label in helices(sequence))] * 20)
    assert data.task.labels == ("coil", "helix")
    assert data.targets.tolist() == [int(label == "H") for text in data.sequences for label in helices(text)]


def test_labels_with_blanks_in_the_bodies(tmp_path):
    files = {"s.fasta": ">a SET=train\nH C E\n>b SET=val\nE\nC\n>c SET=test\nC E\nE C\n", "mask.fasta":
             ">a\n0 1 1\n>b\n01\n>c\n11\n11\n", "sequences.fasta": ">a\nM KV\n>b\nLL\n>c\nACDE\n"}  # fmt: skip
    (tmp_path / "t").mkdir()
    for name, text in files.items():
        (tmp_path / "t" / name).write_text(text)
    data = load_task("t", None, tmp_path)
    assert [data.task.labels[target] for target in data.targets] == list("HCEECCEEC")
    assert data.scored.tolist() == [False, True, True, False, True, True, True, True, True]
    assert data.sequences == ["MKV", "LL", "ACDE"]


def test_numbers_that_may_be_classes_are_noted(tmp_path):
    """Sources: AxeldeRomblay/MLBox#94; TAPE's fold labels are integers up to 1,194."""
    folds = load(tmp_path, [str(7 * (i // 5)) for i in range(125)])
    assert folds.task.target == "value"
    assert has_note(folds, "25 distinct integer targets are treated as values; set target_type to class")
    floats = load(tmp_path, ["0.0", "1.0"] * 10)
    assert floats.task.target == "value"
    assert has_note(floats, "2 distinct integer targets are treated as values; set target_type to class")
    assert load(tmp_path, ["0.0", "1.0"] * 10, target_type="class").task.labels == ("0.0", "1.0")
    assert not has_note(load(tmp_path, ["0.0", "1.5"] * 10), "distinct integer")
    assert not has_note(load(tmp_path, ["0.0", "1.0"] * 10, target_type="value"), "distinct integer")


def test_digits_with_underscores_are_not_numbers(tmp_path):
    """Python reads 1_1 as 11."""
    assert load(tmp_path, ["1_1", "2_1"] * 10).task.labels == ("1_1", "2_1")


@pytest.mark.parametrize("pair", [("Low", "low"), ("cell membrane", "Cell_membrane"), ("1", "1.0")])
def test_spellings_of_one_class_are_noted(tmp_path, pair):
    data = load(tmp_path, ["high", *pair] * 10, target_type="class")
    assert has_note(data, "are separate classes; correct them if they are the same")


def test_a_flip_task_has_a_fixed_target_and_level(tmp_path):
    with refused("task.fixed", task="gb1", option="target_type", found="class"):
        load_task("gb1", None, tmp_path, target_type="class")
    with refused("task.fixed", task="gb1", option="level", found="residue"):
        load_task("gb1", None, tmp_path, level="residue")


@pytest.mark.parametrize("text", ["{}%", "<{}", "{} uM", "{}.5C", "> {}.25"])
def test_numbers_with_units_are_refused(tmp_path, text):
    targets = [text.format(19 + i) for i in range(30)]
    with refused("task.unit", record="p0", found=targets[0]):
        load(tmp_path, targets)
    with refused("task.target", record="p0", found=targets[0]):
        load(tmp_path, targets, target_type="value")


@pytest.mark.parametrize("names", [("3a", "7TM", "2H"), ("1st", "2nd"), ("a.1", "b.2")])
def test_classes_with_digits_remain_classes(tmp_path, names):
    targets = [names[i // 5 % len(names)] for i in range(60)]
    assert load(tmp_path, targets).task.labels == tuple(sorted(names))


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("42,062", "Write 42062, or 42.062 if the comma is a decimal comma."),
        ("1,234,567", "Write 1234567."),
        ("1,234.5", "Write 1234.5."),
        ("60,11", "Write 60.11, with"),
        ("1.234,5", "Write 1234.5, with"),
        ("0,125", "Write 0.125, with"),
    ],
)
def test_the_advice_for_a_comma_keeps_the_size_of_the_number(tmp_path, text, advice):
    for targets in ([text] * 10, ["7.5"] * 9 + [text]):
        with refused("task.target", found=text) as caught:
            load(tmp_path, targets)
        assert advice in str(caught.value)


def test_an_unmeasured_residue_is_masked(tmp_path):
    text = ">a TARGET=1.5;nan;3 SET=train\nMKV\n>b TARGET=0.5;NA SET=val\nLL\n>c TARGET=1;1 SET=test\nAC\n"
    (tmp_path / "t.fasta").write_text(text)
    data = load_task("t", None, tmp_path)
    assert data.task.target == "value"
    assert data.scored.tolist() == [True, False, True, True, False, True, True]
    assert data.targets.tolist() == [1.5, 0, 3, 0.5, 0, 1, 1]
    assert "2 residues have no measurement and are not scored" in data.notes
    (tmp_path / "t.fasta").write_text(text.replace("NA", ""))
    with refused("task.target", record="b", found=""):
        load_task("t", None, tmp_path)


def test_blanks_inside_a_sequence_are_removed(tmp_path):
    (tmp_path / "t.csv").write_text("sequence,target,set\nMKV LAA,1.5,train\nmkl*,2.5,val\nMK\tI,3.5,test\n")
    assert load_task("t", None, tmp_path).sequences == ["MKVLAA", "MKL", "MKI"]
    (tmp_path / "t.csv").write_text("sequence,target,set\nMK-V,1.5,train\n")
    with refused("sequence.alignment", record="Sequence0", found="-", residue=3):
        load_task("t", None, tmp_path)


@pytest.mark.parametrize("name", ["sequences.fasta", "mask.fasta"])
def test_an_id_with_two_contents_is_refused(tmp_path, name):
    files = {"s.fasta": ">a SET=train\nHCE\n>b SET=val\nEC\n>c SET=test\nCH\n",
             "sequences.fasta": ">a\nMKV\n>b\nLL\n>c\nAC\n", "mask.fasta": ">a\n111\n>b\n11\n>c\n11\n"}  # fmt: skip
    (tmp_path / "t").mkdir()
    for file, text in files.items():
        (tmp_path / "t" / file).write_text(text)
    same, other = {"sequences.fasta": ("M\nKV", "MKL"), "mask.fasta": ("11\n1", "110")}[name]
    (tmp_path / "t" / name).write_text(f"{files[name]}>a again\n{same}\n")
    assert load_task("t", None, tmp_path).sequences == ["MKV", "LL", "AC"]
    (tmp_path / "t" / name).write_text(f"{files[name]}>a again\n{other}\n")
    with refused("task.repeated-id", record="a"):
        load_task("t", None, tmp_path)


@pytest.mark.parametrize("name", ["test2", "cb513", "holdout"])
def test_a_third_test_set_is_refused(tmp_path, name):
    (tmp_path / "t.csv").write_text(f"sequence,target,set\nMKV,1.5,train\nMKL,2.5,val\nMKI,3,test\nMKW,4,{name}\n")
    with refused("task.set", found=name) as caught:
        load_task("t", None, tmp_path)
    assert f"--split {name}" in str(caught.value)


def test_a_sequences_file_beside_a_task_with_targets_is_not_read(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "sequences.fasta").write_text(">x\nWWW\n")
    (folder / "p.fasta").write_text(HEADERS.format(">a", ""))
    data = load_task("t", None, tmp_path)
    assert (data.task.level, data.sequences, list(data.files)) == ("protein", ["MKV", "MKL", "MKI"], ["split"])


@pytest.mark.parametrize(
    "targets",
    [
        ("\u22121.5", "\u22122.5", "3.5"),
        ("1 500", "2 500", "3 500"),
        ("1\u00a0500", "2\u00a0500", "3\u202f500"),
        ("1'500", "2'500", "3'500"),
        ("1_500", "2_500", "3_500"),
        ("1.5\u00b10.2", "2.5 \u00b1 0.1", "3.5+/-1"),
        ("\uff11.\uff15", "\uff12.\uff15", "\uff13.\uff15"),
    ],
)
def test_few_numbers_in_other_notations_are_not_classes(tmp_path, targets):
    """Spreadsheets of other locales write a minus sign, digit groups or digits of another width."""
    with refused("task.unit", record="p0", found=targets[0]):
        load(tmp_path, targets * 10)
    assert len(load(tmp_path, targets * 10, target_type="class").task.labels) == 3
    values = load(tmp_path, ("-1.5", "-2.5", "3.5") * 10)  # a hyphen is the sign of a number
    assert values.task.target == "value"
    assert list(values.targets[:3]) == [-1.5, -2.5, 3.5]
    assert load(tmp_path, ("EC 1", "EC 2", "EC 3") * 10).task.target == "class"


@pytest.mark.parametrize("other", ["cell\u00a0wall", "cell wall\u200b", "cell  wall", "\ufeffcell wall"])
def test_labels_that_look_the_same_are_refused(tmp_path, other):
    """Text copied from web pages and PDF files holds invisible characters."""
    with refused("task.alike"):
        load(tmp_path, ("cell wall", other, "nucleus") * 10)
    assert load(tmp_path, ("cell wall", "nucleus") * 15).task.labels == ("cell wall", "nucleus")


def test_decomposed_letters_are_refused(tmp_path):
    """macOS writes accents as letters of their own."""
    with refused("task.alike"):
        load(tmp_path, ("caf\u00e9", "cafe\u0301") * 15)


def test_an_open_quotation_mark_swallows_no_records(tmp_path):
    write_table(tmp_path / "t", [0.5 + i for i in range(30)])
    path = tmp_path / "t/random.csv"
    whole = path.read_text()
    assert len(load_task("t", None, tmp_path).ids) == 30
    path.write_text(whole.replace('"p27"', '"p27'))
    with refused("task.table", path=path):
        load_task("t", None, tmp_path)
    path.write_text(whole.replace('"p27",', '"p, ""27""",'))  # a quoted cell with its delimiter and quotes
    assert load_task("t", None, tmp_path).ids[27] == 'p, "27"'


def test_a_workbook_called_csv_is_named(tmp_path):
    (tmp_path / "t").mkdir()
    for start in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):
        (tmp_path / "t/random.csv").write_bytes(start + bytes(100))
        with refused("task.binary", path=tmp_path / "t/random.csv"):
            load_task("t", None, tmp_path)


def test_a_constant_target_is_noted(tmp_path):
    assert has_note(load(tmp_path, ["1.5"] * 30), "train has a single value, 1.5")
    assert not has_note(load(tmp_path, ["1.5", "2.5"] * 15), "single value")


def write_rows(folder, *rows, header="id,sequence,target,set,validation"):
    (folder / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    return lambda: load_task("t", None, folder)


def test_a_test_record_marked_for_validation_is_refused(tmp_path):
    rows = ["a,MKV,1.5,train,False", "b,MKL,2.5,train,True", "c,MKI,3.5,test,"]
    load = write_rows(tmp_path, *rows)
    assert list(load().sets) == ["train", "validation", "test"]
    load = write_rows(tmp_path, *rows, "d,MKA,1.5,test,True")
    with refused("task.contradiction", record="d", found=("test", "True")):
        load()
    (tmp_path / "t.csv").unlink()
    text = ">a SET=train TARGET=1.5\nMKV\n>b SET=val VALIDATION=True TARGET=2.5\nMKL\n>c SET=test TARGET=1.25\nMKA\n"
    (tmp_path / "t.fasta").write_text(text)
    assert list(load().sets) == ["train", "validation", "test"]
    (tmp_path / "t.fasta").write_text(text.replace("SET=test", "SET=test VALIDATION=yes"))
    with refused("task.contradiction", record="c", found=("test", "yes")):
        load()


def test_one_sequence_with_two_targets_is_noted(tmp_path):
    rows = ["a,MKV,1.5,train,", "b,MKL,2.5,train,True", "c,MKI,3.5,test,", "d,MKI,3.5,train,"]
    assert not has_note(write_rows(tmp_path, *rows)(), "different targets")
    data = write_rows(tmp_path, *rows, "e,MKV,2.5,train,", "f,MKV,3,train,", "g,MKI,1e-9,test,")()
    assert has_note(data, "2 sequences have different targets in different records, such as 'a' with 1.5 and 'e' with")
    rows = ["a,MKV,low,train,", "b,MKL,high,train,True", "c,MKI,low,test,", "d,MKV,high,train,"]
    data = write_rows(tmp_path, *rows)()
    assert has_note(
        data, "1 sequence has different targets in different records, such as 'a' with low and 'd' with high"
    )


def test_a_blank_id_is_refused(tmp_path):
    rows = ["a,MKV,1.5,train,", "b,MKL,2.5,train,True", "c,MKI,3.5,test,"]
    load = write_rows(tmp_path, *rows, " ,MKA,1.25,train,")
    with refused("task.no-id", row=4):
        load()
    assert write_rows(tmp_path, *rows, ",,,,")().ids == ["a", "b", "c"]  # the empty rows of Excel
    rows = ["MKV,1.5,train", "MKL,2.5,val", "MKI,3.5,test"]
    assert write_rows(tmp_path, *rows, header="sequence,target,set")().ids == ["Sequence0", "Sequence1", "Sequence2"]


@pytest.mark.parametrize("line", ["sep=;", '"sep=;"', "SEP=;"])
def test_the_separator_line_of_excel_is_passed_over(tmp_path, line):
    rows = ["id;sequence;target;set", "a;MKV;1.5;train", "b;MKL;2.5;val", "c;MKI;3.5;test"]
    data = write_rows(tmp_path, *rows, header=line)()
    assert (data.ids, data.sequences, list(data.targets)) == (["a", "b", "c"], ["MKV", "MKL", "MKI"], [1.5, 2.5, 3.5])


@pytest.mark.parametrize("name", ["t.csv", "t.fasta", "t.zip", "t/sequences.fasta", "t/tasks.yaml"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "own.fasta").write_text(">a SET=train\nHCE\n>b SET=val\nHEE\n>c SET=test\nCCE\n")
    (folder / "sequences.fasta").write_text(">a\nMKV\n>b\nMKL\n>c\nMKI\n")
    path = tmp_path / name
    task = "t" if "/" in name else name
    if name == "t.zip":
        task, path = "z", tmp_path / "z" / "t.zip"
        path.parent.mkdir()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")
    with refused("file.git-lfs", path=path):
        load_task(task, None, tmp_path)


@pytest.mark.parametrize("stage", ["benchmark", "finetune"])
def test_a_task_from_a_pipe_is_one_line(tmp_path, stage):
    """The file of a task is read several times, and by several processes."""
    model = tmp_path / "model.safetensors"
    write_tiny_model(model)
    write_rows(tmp_path, "a,MKV,1.5,train,", "b,MKL,2.5,train,True", "c,MKI,3.5,test,")
    for number, task in enumerate(("<(cat t.csv)", "-")):
        command = f"cat t.csv | {sys.executable} -m esm2kit {stage} --model {model} --out_dir out{number} --task {task}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2
        [line] = done.stderr.strip().split("\n")
        assert "is a pipe" in line
        assert "Save it" in line
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"t.csv", ".lock", model.name}
    os.mkfifo(tmp_path / "named.csv")
    with refused("task.pipe", path=tmp_path / "named.csv"):
        load_task(str(tmp_path / "named.csv"), None, tmp_path)


def test_a_mask_of_a_protein_target_is_noted(tmp_path):
    text = ">a SET=train TARGET=1.5 MASK=101\nMKV\n>b SET=val TARGET=2.5\nMKL\n>c SET=test TARGET=1.25\nMKA\n"
    (tmp_path / "t.fasta").write_text(text, encoding="utf-8")
    assert has_note(load_task("t", None, tmp_path), "the masks of 1 records are not used")
    (tmp_path / "t.fasta").write_text(text.replace(" MASK=101", ""), encoding="utf-8")
    assert not has_note(load_task("t", None, tmp_path), "mask")
