"""Tables of measurements joined with a FASTA: names, columns, numbers, what is left out, and what is refused."""

import csv
import gzip
import random
import re
import shutil
import tempfile
from pathlib import Path

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused
from support.measurements import write_measurements

from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.data import load_labels, load_task, load_task_of
from esm2kit.tasks.labels_table import UNASSIGNED, read_labels
from esm2kit.tasks.matching import RecordMatcher
from esm2kit.tasks.split_file import write_split
from esm2kit.tasks.tables import read_table

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
# style of the FASTA's ids and of the names in the table, by the number of the protein
NAMES = {
    "plain": (lambda n: f"prot{n}", lambda n: f"prot{n}"),
    "numbers": (lambda n: f"{n + 17}", lambda n: f"{n + 17}"),
    "accessions": (lambda n: f"sp|P{n:05}|NAME{n}_HUMAN", lambda n: f"P{n:05}"),
    "entries": (lambda n: f"tr|Q{n:05}|X{n}_ECOLI", lambda n: f"X{n}_ECOLI"),
    "complete ids": (lambda n: f"A{n:05}", lambda n: f"sp|A{n:05}|NAME{n}_HUMAN"),
    "versions": (lambda n: f"NP_{n:06}.{n % 3 + 1}", lambda n: f"NP_{n:06}"),
    "case": (lambda n: f"MyProt{n}", lambda n: f"MYPROT{n}"),
    "blanks": (lambda n: f"GFP_A{n}K", lambda n: f"GFP A{n}K"),
    "umlauts": (lambda n: f"Ü{n}µ", lambda n: f"Ü{n}µ"),
}
FORMATS = ("comma", "semicolon", "tab", "sep line", "utf-16", "bom", "windows", "xlsx", "gzip")
EMPTY = ("", "NA", "NaN", "n/a", "#N/A", "-", "nan")


@st.composite
def tables(draw):
    """Draw proteins, a table of them in some notation, and what it says: name -> value, names without a value."""
    generator = random.Random(draw(st.integers(0, 2**32)))
    form = draw(st.sampled_from(FORMATS))
    style = draw(st.sampled_from(list(NAMES)))
    comma = draw(st.booleans()) and form != "xlsx"
    of_record, of_cell = NAMES[style]
    numbers = generator.sample(range(1000), 40)
    records = [(of_record(n), "".join(generator.choices(LETTERS, k=generator.randint(30, 60)))) for n in numbers]
    labelled, strangers = numbers[:35], [n + 2000 for n in range(draw(st.integers(0, 3)))]
    rows, truth, empty = [], {}, []
    for n in [*labelled, *strangers]:
        text = f"{generator.gauss(50, 20):.2f}"
        if n in labelled and generator.random() < 0.1:
            text = generator.choice(EMPTY)
            empty.append(of_record(n))
        elif n in labelled:
            truth[of_record(n)] = float(text)
        rows.append({"Protein": of_cell(n), "Tm (C)": text.replace(".", ",") if comma else text, "Organism": "E. coli"})
    rows += [dict(row) for row in rows[: draw(st.integers(0, 2))]]  # repeated rows that agree
    generator.shuffle(rows)
    columns = generator.sample(["Protein", "Tm (C)", "Organism"], 3)
    counted = {"strangers": len(strangers), "unlabelled": 5, "form": form, "comma": comma, "style": style}
    return records, rows, columns, truth, empty, counted


def write_drawn(folder, rows, columns, form):
    """Write the table; quotation marks are used where a cell has the separator."""
    if form == "xlsx":
        book = openpyxl.Workbook()
        book.active.append(columns)
        for row in rows:
            cells = [row[name] for name in columns]
            book.active.append([float(cell) if re.fullmatch(r"-?\d+\.\d+", cell) else cell or None for cell in cells])
        book.save(folder / "m.xlsx")
        return folder / "m.xlsx"
    separator = {"semicolon": ";", "sep line": ";", "tab": "\t", "utf-16": "\t"}.get(form, ",")
    encoding = {"utf-16": "utf-16", "bom": "utf-8-sig", "windows": "cp1252"}.get(form, "utf-8")
    path = folder / ("m.csv.gz" if form == "gzip" else "m.csv")
    opener = gzip.open if form == "gzip" else open
    with opener(path, "wt", newline="", encoding=encoding) as file:
        if form == "sep line":
            file.write("sep=;\r\n")
        table = csv.writer(file, delimiter=separator)
        table.writerow(columns)
        table.writerows([row[name] for name in columns] for row in rows)
    return path


@settings(max_examples=120, deadline=None)
@given(drawn=tables())
def test_reading_a_drawn_table_gives_what_was_written(drawn):
    records, rows, columns, truth, empty, counted = drawn
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "my.fasta").write_text("".join(f">{i} text\n{s}\n" for i, s in records), encoding="utf-8")
        found = read_labels(write_drawn(folder, rows, columns, counted["form"]), folder / "my.fasta")
    assert found.targets == ("Tm (C)",)
    assert {row.id: float(row.target) for row in found.rows} == truth
    assert [row.id for row in found.rows] == [i for i, _ in records if i in truth]
    assert {(row.id, row.sequence) for row in found.rows} <= set(records)
    assert {row.set for row in found.rows} == {UNASSIGNED}
    (note,) = found.notes
    assert "id column 'Protein', target 'Tm (C)' in C" in note
    assert f"{len(truth)} of 40 proteins of my.fasta joined" in note
    assert ("decimal commas" in note) == counted["comma"]
    assert "5 proteins without a row" in note
    strangers = "1 row " if counted["strangers"] == 1 else f"{counted['strangers']} rows "
    assert (f"{strangers}without a protein" in note) == bool(counted["strangers"])
    assert ("without a value" in note) == bool(empty)
    assert ("by a part of the id" in note) == (counted["style"] in ("accessions", "entries", "complete ids"))
    assert ("ignoring case" in note) == (counted["style"] == "case")


@pytest.mark.parametrize(
    ("ids", "name", "expected"),
    [
        (["sp|P69905|HBA_HUMAN", "sp|P68871|HBB_HUMAN"], "P69905", 0),
        (["sp|P69905|HBA_HUMAN", "sp|P68871|HBB_HUMAN"], "sp|P68871|HBB_HUMAN", 1),
        (["sp|P69905|HBA_HUMAN"], "sp|Q00000|OTHER", -1),  # a database in common is no match
        (["sp|P69905|HBA_HUMAN"], "sp", -1),
        (["UniRef50_P69905"], "P69905", 0),
        (["NP_000549.1"], "NP_000549", 0),
        (["NP_000549"], "NP_000549.2", 0),
        (["NP_000549.1"], "NP_000549.2", -1),  # another version may be another sequence
        (["mut.1", "mut.2"], "mut", -1),
        (["P12345"], "P12345-2", -1),  # another isoform
        (["abc", "ABC"], "Abc", -1),
        (["abc", "ABC"], "ABC", 1),
        (["P1", "P10"], "P1", 0),
        (["P1"], "P1 wild type", 0),
        (["P1"], "", -1),
    ],
)
def test_which_record_a_name_means(ids, name, expected):
    records = [Record(protein, f"{protein} text", f"MKV{place}") for place, protein in enumerate(ids)]
    assert RecordMatcher(records).match([name]).records == [expected]


def test_a_name_of_several_sequences_matches_by_the_complete_header_or_not_at_all():
    records = [Record("GFP", "GFP A1K", "MKV"), Record("GFP", "GFP A2K", "MKL")]
    found = RecordMatcher(records).match(["GFP A2K", "GFP", "GFP A3K"])
    assert found.records == [1, -1, -1]
    assert found.ambiguous == ["GFP", "GFP A3K"]


@pytest.mark.parametrize(
    ("ids", "names", "expected"),
    [
        (["mutant"], ["mutant", "mutant.2"], [0, -1]),
        (["mutant"], ["mutant.2"], [0]),  # without the other name it is the only candidate
        (["1abc_A"], ["1abc_a", "1abc_A"], [-1, 0]),  # two chains
        (["NP_000549.1"], ["NP_000549", "NP_000549.1"], [-1, 0]),
        (["sp|P69905|HBA_HUMAN"], ["P69905", "HBA_HUMAN"], [0, 0]),  # both name this protein
    ],
)
def test_an_uncertain_match_gives_way_to_a_certain_one(ids, names, expected):
    records = [Record(protein, protein, f"MKV{place}") for place, protein in enumerate(ids)]
    found = RecordMatcher(records).match(names)
    assert found.records == expected
    assert sum(found.rules.values()) == sum(place >= 0 for place in expected)


def test_a_row_of_another_version_does_not_fill_in_for_an_empty_one(tmp_path):
    table = build_rows("name,dG", "P_{0},1.{1}", letters="BCDEFGH") + "P_A,\nP_A.2,9.5\n"
    data = load_labels(*write_files(tmp_path, table))
    assert "P_A" not in data.ids
    assert 9.5 not in data.targets
    assert "1 row without a protein (P_A.2)" in data.notes[0]


def write_files(folder, table, fasta="ABCDEFGH"):
    """A FASTA with the records P_A, P_B ..., and a table."""
    sequences = {letter: "MKVLAAGHERTY" + letter.replace("B", "N") * 4 for letter in fasta}
    (folder / "my.fasta").write_text("".join(f">P_{name}\n{text}\n" for name, text in sequences.items()))
    (folder / "m.csv").write_text(table, encoding="utf-8")
    return folder / "m.csv", folder / "my.fasta"


def build_rows(*templates, letters="ACDEFGH"):
    return "\n".join([templates[0], *(templates[1].format(x, n) for n, x in enumerate(letters))]) + "\n"


def test_the_table_of_a_laboratory_is_read_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    files = write_measurements(tmp_path)
    data = load_task_of(BenchmarkConfig(fasta=files.fasta, labels=files.labels))
    assert dict(zip(data.ids, data.targets, strict=True)) == {name: files.values[name] for name in data.ids}
    assert len(data.ids) == 120
    assert (data.task.name, data.task.unit, data.task.target, data.split) == (
        "measurements_Tm",
        "C",
        "value",
        "identity50",
    )
    assert data.sizes == {"train": 96, "validation": 12, "test": 12}
    assert data.notes == (
        "measurements.csv: id column 'Protein', target 'Tm (C)' in C; 120 of 120 proteins of my.fasta joined",
        "train 96, validation 12, test 12: groups of at least 50% identity by shared 4-mers and alignments (seed 0)",
    )
    organism = load_labels(files.labels, files.fasta, target="organism")
    assert organism.task.labels == ("Escherichia coli", "Homo sapiens", "Thermus thermophilus")
    lines = files.labels.read_text().splitlines()
    files.labels.write_text("\n".join([lines[0], *reversed(lines[1:])]))
    again = load_labels(files.labels, files.fasta)
    assert again.sha256 == data.sha256
    other = load_labels(files.labels, files.fasta, split_seed=1)
    assert other.sizes == data.sizes
    assert (other.sets != data.sets).any()


def test_the_written_split_is_read_as_a_task_and_as_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    files = write_measurements(tmp_path / "in")
    for target in ("Tm (C)", "Organism"):
        data = load_labels(files.labels, files.fasta, target=target)
        path = write_split(data, tmp_path / target[:2])
        for again in (load_labels(path), load_task(str(path), None, tmp_path)):
            assert again.ids == data.ids
            assert again.sequences == data.sequences
            assert again.sets.tolist() == data.sets.tolist()
            assert again.targets.tolist() == data.targets.tolist()
            assert again.task.labels == data.task.labels
            assert write_split(again, tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_a_table_that_holds_the_sequences_needs_no_fasta(tmp_path):
    generator = random.Random(0)
    sequences = ["".join(generator.choices(LETTERS, k=40)) for _ in range(20)]
    path = tmp_path / "m.tsv"
    lines = [f"{n}\tv{n}\t{s.lower()}\t{n}.5" for n, s in enumerate(sequences)]
    path.write_text("\n".join(["\tname\tprotein sequence\tkcat", *lines, "20\tv20\t\t1.5"]))
    data = load_labels(path)
    assert data.ids == [f"v{n}" for n in range(20)]
    assert data.sequences == sequences
    assert data.targets.tolist() == [n + 0.5 for n in range(20)]
    assert "20 of 20 proteins of the table joined; 1 row without a protein (v20)" in data.notes[0]
    path.write_text("\n".join(["sequence,value", *(f"{s},{n}.5" for n, s in enumerate(sequences))]))
    assert load_labels(path).ids == [f"Sequence{n}" for n in range(20)]


def test_sets_of_the_table_are_used(tmp_path):
    table = build_rows("name,Split,dG,validation", "P_{0},{{}},1.{1},{{}}", letters="ABCDEFGH")
    marks = ["train", "WAHR", "train", "", "Train", "False", "test", "", "test", "", "", "", "train", "", "train", ""]
    labels, fasta = write_files(tmp_path, table.format(*marks))
    data = load_labels(labels, fasta)
    assert dict(zip(data.ids, data.sets, strict=True)) == {
        "P_A": "validation", "P_B": "train", "P_C": "train", "P_D": "test", "P_E": "test", "P_G": "train",
        "P_H": "train",
    }  # fmt: skip
    assert (data.split, data.split_method) == ("Split", "")
    assert "1 row without a set" in data.notes[0]
    labels.write_text(labels.read_text().replace("WAHR", "FALSCH"))
    data = load_labels(labels, fasta)
    assert data.sizes["validation"] == 1
    assert "1 of 5 train proteins were chosen" in data.notes[-1]


def test_training_and_testing_are_sets(tmp_path):
    sets = ["training", "Training", "dev", "testing", "TESTING", "training", "training"]
    rows = [f"P_{name},{name}x,1.{place}" for place, name in enumerate("ACDEFGH")]
    table = "\n".join(["name,subset,dG", *(row.replace(f"{row[2]}x", sets[i]) for i, row in enumerate(rows))]) + "\n"
    data = load_labels(*write_files(tmp_path, table))
    assert data.sizes == {"train": 4, "validation": 1, "test": 2}
    assert {data.ids[row] for row in data.rows("test")} == {"P_E", "P_F"}


def test_a_column_of_other_sets_is_noted(tmp_path):
    table = build_rows("name,split,dG", "P_{0},{1},1.{1}", letters="ABCDEFGH")
    data = load_labels(*write_files(tmp_path, table), target="dG")
    assert any(note.startswith("column 'split' is not read as sets") for note in data.notes)
    data = load_labels(*write_files(tmp_path, table), target="split", target_type="value")
    assert not any("is not read as sets" in note for note in data.notes)


def test_a_column_of_folds_that_is_not_used_is_noted(tmp_path):
    files = write_files(tmp_path, build_rows("name,fold,dG", "P_{0},{1},1.{1}", letters="ABCDEFGH"))
    note = "column 'fold' is not read; esm2kit benchmark --folds fold takes the folds from it"
    assert note in load_labels(*files).notes
    assert note not in load_labels(*files, target="fold", target_type="value").notes
    names = write_files(tmp_path, build_rows("name,fold,dG", "P_{0},a.{1},1.{1}", letters="ABCDEFGH"))
    assert note not in load_labels(*names).notes, "the folds of structures are no numbers"


@pytest.mark.parametrize(("name", "found"), [("Tm", 1), ("tm (C)", 1), ("TM  (C)", 1), ("dg", 2), ("dG (kJ)", None)])
def test_a_column_is_named_without_its_unit_or_with_it(tmp_path, name, found):
    path, _ = write_files(tmp_path, "name,Tm (C),dG (kcal)\nP_A,1,2\n")
    if found is not None:
        assert read_table(path).find_column(name) == found
    else:
        with refused("table.no-column", column=name):
            read_table(path).find_column(name)


@pytest.mark.parametrize(
    ("cells", "separator", "expected"),
    [
        (["1,5", "2,25", "1.000,5"], ";", [1.5, 2.25, 1000.5]),
        (["42,062", "1,500"], ";", [42.062, 1.5]),
        (["42,062", "1,500"], ",", [42062, 1500]),
        (["1,234,567", "1,500"], "\t", [1234567, 1500]),
        (["42,062", "3.5"], "\t", [42062, 3.5]),
        (["−1.5", "1 500", "2e-9"], "\t", [-1.5, 1500, 2e-9]),
        (["1'500.5", "１２"], "\t", [1500.5, 12]),
        (["1,5E-03", "3"], ";", [0.0015, 3]),
        (['="007"', "8.5"], "\t", [7, 8.5]),
    ],
)
def test_notations_of_numbers(tmp_path, cells, separator, expected):
    rows = [
        separator.join([f"P_{'ACDEFGH'[n]}", f'"{cell}"' if "=" not in cell else cell]) for n, cell in enumerate(cells)
    ]
    labels, fasta = write_files(tmp_path, "\n".join([separator.join(["name", "dG"]), *rows]))
    assert [float(row.target) for row in read_labels(labels, fasta).rows] == expected


@pytest.mark.parametrize(
    ("cells", "separator", "found"),
    [
        (["42,062", "1,500"], "\t", "42,062"),
        (["1,5", "1,234,567"], ";", "1,234,567"),
        (["1,5", "2.5"], ";", "2.5"),
    ],
)
def test_commas_with_two_meanings_are_refused(tmp_path, cells, separator, found):
    rows = [f"P_{'ACDEFGH'[n]}{separator}{cell}" for n, cell in enumerate(cells)]
    labels, fasta = write_files(tmp_path, "\n".join([f"name{separator}dG", *rows]))
    with refused("table.commas", column="dG", found=found):
        read_labels(labels, fasta)


def test_missing_values_and_signs_as_classes(tmp_path):
    cells = ["1.5", "-", "None", "ND", "2.5", "#DIV/0!", "?"]
    labels, fasta = write_files(
        tmp_path, "name,dG\n" + "".join(f"P_{x},{c}\n" for x, c in zip("ACDEFGH", cells, strict=True))
    )
    found = read_labels(labels, fasta)
    assert [(row.id, row.target) for row in found.rows] == [("P_A", "1.5"), ("P_F", "2.5")]
    assert "5 rows without a value (P_C, P_D, P_E, ...)" in found.notes[0]
    labels.write_text("name,binds\n" + "".join(f"P_{x},{c}\n" for x, c in zip("ACDEFGH", "+-+-+-+", strict=True)))
    assert [row.target for row in read_labels(labels, fasta).rows] == list("+-+-+-+")
    labels.write_text(
        "name,effect\n" + "".join(f"P_{x},{c}\n" for x, c in zip("ACDEFGH", ["none", "big", "-"] * 3, strict=False))
    )
    assert [row.target for row in read_labels(labels, fasta).rows] == ["none", "big", "none", "big", "none"]


NUMERIC = build_rows("name,Tm (C),pI", "P_{0},{1}.5,{1}.25")


@pytest.mark.parametrize(
    ("table", "options", "code", "values"),
    [
        (NUMERIC, {}, "labels.which-target", {"allowed": ("Tm (C)", "pI")}),
        (NUMERIC, {"target": "name"}, "labels.no-classes", {"column": "name"}),
        (">P_A\nMKV\n>P_C\nMKL\n", {}, "table.single-column", {}),
        (NUMERIC, {"target": "Tagg"}, "table.no-column", {"column": "Tagg"}),
        (NUMERIC, {"id": "protein"}, "table.no-column", {"column": "protein"}),
        (NUMERIC, {"id": "pI", "target": "Tm (C)"}, "labels.no-match", {"found": "0.25", "expected": "P_A"}),
        (build_rows("name,dG", "X_{0},{1}.5"), {}, "labels.no-match", {"found": "X_A", "expected": "P_A"}),
        (build_rows("name,note", "P_{0},"), {}, "labels.no-target", {}),
        (build_rows("name,dG", "P_{0},{1}.5") + "P_A,9.5\n", {}, "labels.repeated", {"found": ("0.5", "9.5")}),
        (build_rows("P_B,7.5", "P_{0},{1}.5"), {}, "labels.no-header", {}),
        (build_rows("name,dG,dG", "P_{0},{1}.5,{1}.5"), {"target": "dG"}, "table.repeated-column", {"column": "dG"}),
        (build_rows("name,dG", "P_{0},{1}.5,x"), {}, "table.cells", {"row": 2, "found": 3, "expected": 2}),
        (build_rows("name,dG,set", "P_{0},{1}.5,train") + "P_B,2,tst\n", {}, "task.set", {"record": "P_B"}),
        (build_rows("a,b,dG", "P_{0},P_A,{1}.5") + "P_A,P_B,3\n", {"id": "c"}, "table.no-column", {}),
        (
            build_rows("name,sequence,dG", "P_{0},MKVLAAGHERTYCCCC,{1}.5"),
            {},
            "labels.other-sequence",
            {"record": "P_A"},
        ),
        ("name\nP_A\n", {}, "table.single-column", {}),
        ("", {}, "table.single-column", {}),
        ("name,dG\n", {}, "table.no-rows", {}),
        ('name,dG\n"P_A,1.5\nP_B,2\n', {}, "table.quotes", {}),
        (build_rows("name,dG", "P_{0},NA") + "P_B,\n", {"target": "dG"}, "labels.empty", {"column": "dG"}),
    ],
)
def test_tables_that_cannot_be_read_rightly_are_refused(tmp_path, table, options, code, values):
    labels, fasta = write_files(tmp_path, table)
    with refused(code, **values):
        read_labels(labels, fasta, **options)


def test_columns_that_name_different_proteins_are_refused(tmp_path):
    labels, fasta = write_files(tmp_path, "a,b,dG\nP_A,P_B,1.5\nP_B,P_A,2.5\n")
    with refused("labels.two-ids", columns=("a", "b")):
        read_labels(labels, fasta)
    assert [row.target for row in read_labels(labels, fasta, id="b").rows] == ["2.5", "1.5"]


def test_equal_ids_with_different_sequences_are_refused(tmp_path):
    labels, fasta = write_files(tmp_path, "name,dG\nP_X,1.5\nP_X,2.5\n")
    fasta.write_text(">P_X\nMKV\n>P_X\nMKL\n")
    with refused("labels.no-match"):
        read_labels(labels, fasta)


def test_workbooks(tmp_path):
    _, fasta = write_files(tmp_path, "")
    book = openpyxl.Workbook()
    book.active.append(["Table S1. Stabilities"])
    book.active.append([])
    book.active.append(["name", "dG\n(kcal/mol)"])
    for number, letter in enumerate("ACDEFGH"):
        book.active.append([f"P_{letter}", number + 0.5 if number else "#N/A"])
    book.create_sheet("empty")
    book.save(tmp_path / "m.xlsx")
    found = read_labels(tmp_path / "m.xlsx", fasta)
    assert found.targets == ("dG (kcal/mol)",)
    assert [row.target for row in found.rows] == ["1.5", "2.5", "3.5", "4.5", "5.5", "6.5"]
    more = book.create_sheet("pI")
    more.append(["name", "pI"])
    more.append(["P_A", 7])
    more.append(["P_C", 6.5])
    book.save(tmp_path / "m.xlsx")
    with refused("table.which-sheet", allowed=("Sheet", "pI")):
        read_labels(tmp_path / "m.xlsx", fasta)
    found = read_labels(tmp_path / "m.xlsx:pI", fasta)
    assert [(row.id, row.target) for row in found.rows] == [("P_A", "7"), ("P_C", "6.5")]
    with refused("table.sheet", found="pX"):
        read_labels(tmp_path / "m.xlsx:pX", fasta)
    content = (tmp_path / "m.xlsx").read_bytes()
    (tmp_path / "cut.xlsx").write_bytes(content[: len(content) // 2])
    with refused("table.damaged"):
        read_table(tmp_path / "cut.xlsx")
    version = content.index(b"PK\1\2") + 6  # that is needed to unpack the first member
    (tmp_path / "new.xlsx").write_bytes(content[:version] + b"\xf0" + content[version + 1 :])
    with refused("table.damaged"):
        read_table(tmp_path / "new.xlsx")
    (tmp_path / "old.xls").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(100))
    with refused("table.xls"):
        read_table(tmp_path / "old.xls")
    with refused("table.absent"):
        read_table(tmp_path / "absent.csv")
    (tmp_path / "bytes.csv").write_bytes(bytes(range(256)) * 4)
    with refused("table.encoding"):
        read_table(tmp_path / "bytes.csv")


def test_comments_titles_and_unnamed_columns_are_passed_over(tmp_path):
    text = "# exported today\n\n#name\tdG\t\nP_A\t1.5\t\nP_B\t2.5\t\n"
    labels, _ = write_files(tmp_path, text)
    table = read_table(labels)
    assert (table.columns, table.rows) == (["name", "dG"], [["P_A", "1.5"], ["P_B", "2.5"]])
    labels.write_text("# exported; today\n,name,dG\n0,P_A,1.5\n1,P_B,2.5\n")
    assert read_table(labels).columns == ["column 1", "name", "dG"]
    assert read_labels(labels, tmp_path / "my.fasta").targets == ("dG",)


def test_labels_of_residues_and_computed_columns(tmp_path):
    generator = random.Random(0)
    names = [f"P{n}" for n in range(30)]
    sequences = ["".join(generator.choices(LETTERS, k=generator.randint(30, 60))) for _ in names]
    (tmp_path / "my.fasta").write_text("".join(f">{n}\n{s}\n" for n, s in zip(names, sequences, strict=True)))
    labels = ["".join(generator.choices("HEC", k=len(sequence))) for sequence in sequences]
    lines = [f"{n}  {len(s)}  {label}" for n, s, label in zip(names, sequences, labels, strict=True)]
    (tmp_path / "m.txt").write_text("\n".join(["name length dssp", *lines]))
    data = load_labels(tmp_path / "m.txt", tmp_path / "my.fasta")
    assert (data.task.level, data.task.labels) == ("residue", ("C", "E", "H"))
    assert "".join(data.task.labels[index] for index in data.targets) == "".join(labels)
    path = write_split(data, tmp_path)
    again = load_task(str(path), None, tmp_path)
    assert again.targets.tolist() == data.targets.tolist()
    assert again.sets.tolist() == data.sets.tolist()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"fasta": "x.fasta"}, "option.labels"),
        ({"id": "name"}, "option.labels"),
        ({"labels": "m.csv", "task": "gb1"}, "option.task-and-labels"),
        ({"labels": "m.csv", "split": "random"}, "option.task-and-labels"),
        ({"identity": 0}, "option.range"),
    ],
)
def test_parameters_of_tasks_and_labels_are_not_mixed(options, code):
    with refused(code):
        BenchmarkConfig(**options)


def test_a_fasta_may_be_given_as_the_task():
    config = BenchmarkConfig(task="my.fasta", labels=Path("m.csv"))
    assert (config.fasta, config.task) == (Path("my.fasta"), BenchmarkConfig.task)
    assert BenchmarkConfig(labels=Path("m.csv"), target="value").target == ["value"]
