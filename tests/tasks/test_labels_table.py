"""Targets from any column: their names, units and types."""

import random

import pytest
from support.errors import refused

from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.finetuning.config import FinetuneConfig
from esm2kit.scoring.variants import read_variants
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.columns import read_columns
from esm2kit.tasks.data import load_labels, load_task, load_task_of
from esm2kit.tasks.matching import RecordMatcher
from esm2kit.tasks.proteins import read_proteins
from esm2kit.tasks.tables import format_column_name, read_table, split_unit

SETS = ("train", "train", "val", "test")


def write_table(path, header, rows):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    ("column", "quantity", "unit", "name"),
    [
        ("Tm (C)", "Tm", "C", "Tm"),
        ("activity [U/mg]", "activity", "U/mg", "activity"),
        ("kcat/Km (1/(M s))", "kcat/Km (1/(M s))", "", "kcat_Km_1_M_s"),
        ("Tm (n=3)", "Tm (n=3)", "", "Tm_n_3"),
        (" dG ", "dG", "", "dG"),
        ("(C)", "(C)", "", "C"),
        ("%", "%", "", "target"),
    ],
)
def test_the_unit_of_a_column(column, quantity, unit, name):
    assert split_unit(column) == (quantity, unit)
    assert format_column_name(column) == name


def test_target_names_a_column_of_a_tasks_table(tmp_path):
    rows = [f"p{i},MKV{'ACDE'[i % 4]}L{'FGHI'[i // 4]},{i / 10},low,{SETS[i % 4]}" for i in range(16)]
    path = write_table(tmp_path / "mine.csv", "id,sequence,Tm (C),target,set", rows)
    data = load_task_of(BenchmarkConfig(task=str(path), target="Tm (C)"))
    assert data.targets.tolist() == [i / 10 for i in range(16)]
    assert (data.task.name, data.task.unit, data.task.target) == ("mine_Tm", "C", "value")
    assert "columns that are not read: target" in data.notes
    other = load_task_of(BenchmarkConfig(task=str(path)))
    assert (other.task.name, other.task.unit, other.task.labels) == ("mine", "", ("low",))
    with refused("task.columns", missing=("tagg",)):
        load_task(str(path), None, tmp_path, target="Tagg")


def test_target_names_a_field_of_a_tasks_headers(tmp_path):
    text = "".join(f">p{i} TARGET=no TM={i}.5 SET={SETS[i % 4]}\nMKV{'ACDE'[i % 4]}\n" for i in range(8))
    (tmp_path / "mine.fasta").write_text(text)
    data = load_task("mine", None, tmp_path, target="tm")
    assert data.targets.tolist() == [i + 0.5 for i in range(8)]
    assert "header fields that are not read: TARGET" in data.notes
    with refused("task.no-target-field", field="DG"):
        load_task("mine", None, tmp_path, target="dG")


@pytest.mark.parametrize("split_by", ["random", "identity"])
def test_without_validation_a_tenth_of_train_is_chosen(tmp_path, split_by):
    generator = random.Random(0)
    sequences = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=50)) for _ in range(60)]
    rows = [f"p{i},{sequences[i]},{i / 10},{'test' if i % 6 == 0 else 'train'}" for i in range(60)]
    rows += [f"copy{i},{sequences[i]},{i / 10},train" for i in (1, 2, 3, 4, 5)]
    path = write_table(tmp_path / "mine.csv", "id,sequence,target,set", rows)
    data = load_task_of(BenchmarkConfig(task=str(path), split_by=split_by))
    chosen = {data.ids[row] for row in data.rows("validation")}
    assert 5 <= len(chosen) <= 7
    assert {f"p{i}" for i in range(0, 60, 6)} == {data.ids[row] for row in data.rows("test")}
    assert all((f"p{i}" in chosen) == (f"copy{i}" in chosen) for i in range(1, 6))
    (note,) = (note for note in data.notes if "validation" in note)
    assert f"{len(chosen)} of 55 train proteins were chosen ({data.split_method.removeprefix('validation: ')}" in note
    write_table(tmp_path / "again.csv", "id,sequence,target,set", generator.sample(rows, len(rows)))
    again = load_task_of(BenchmarkConfig(task=str(tmp_path / "again.csv"), split_by=split_by))
    assert {again.ids[row] for row in again.rows("validation")} == chosen


@pytest.mark.parametrize("stage", [BenchmarkConfig, FinetuneConfig])
def test_class_and_value_are_types_of_targets(stage):
    assert (stage(target="value").target, stage(target="value").target_type) == (None, "value")
    assert (stage(target=["class"]).target, stage(target=["class"]).target_type) == (None, "class")
    assert stage(target="Tm").target == ["Tm"]
    named = stage(target="value", target_type="value")
    assert (named.target, named.target_type) == (["value"], "value")
    with refused("option.target"):
        stage(target=[])


def test_a_column_of_organisms_is_not_one_of_sequences(tmp_path):
    """All letters of the names are those of residues; blanks do not count as residues."""
    names = ["Thermus thermophilus"] * 30 + ["Homo sapiens"] * 10
    rows = [f"p{number},{number / 7:.3f},{name}" for number, name in enumerate(names)]
    (tmp_path / "t.csv").write_text("\n".join(["Protein,Tm,Organism", *rows]) + "\n")
    letters = "ACDEFGHIKLMNPQRSTVWY"
    (tmp_path / "t.fasta").write_text("".join(f">p{n}\n{letters[n % 20 :]}MKV{letters[: n % 19]}\n" for n in range(40)))
    data = load_labels(tmp_path / "t.csv", tmp_path / "t.fasta")
    assert data.targets.tolist() == pytest.approx([number / 7 for number in range(40)], abs=1e-3)


PROTEIN = "MKVLAAGGLLWWRRDDEEKKTTSSPP"


@pytest.mark.parametrize(
    ("columns", "units"),
    [
        (["id,Tm,activity", ",°C,U/mg"], ("°C", "U/mg")),
        (["id,Tm,activity", "unit,degrees,"], ("degrees",)),
        (["id,Tm,activity", "name,(°C),"], ("(°C)",)),
        (["id,Tm,activity", "accession,K,kcal mol-1"], ("K", "kcal mol-1")),
        (["id;Tm;activity", ";measured at pH 7;"], ("measured at pH 7",)),
        (["id\tTm\tactivity", "-\t%\tµmol/min/mg"], ("%", "µmol/min/mg")),
    ],
)
def test_a_row_of_units_is_refused(tmp_path, columns, units):
    separator = next(letter for letter in ",;\t" if letter in columns[0])
    rows = [separator.join([f"p{number}", f"{40 + number}", f"{number}"]) for number in range(5)]
    path = tmp_path / "labels.tsv"
    path.write_text("\n".join([*columns, *rows]) + "\n")
    with refused("table.units-row", found=units, row=2):
        read_table(path)
    path.write_text("\n".join([columns[0], *rows]) + "\n")
    assert read_table(path).cells(1) == ["40", "41", "42", "43", "44"]


def test_a_row_of_units_is_refused_by_every_stage(tmp_path):
    (tmp_path / "my.fasta").write_text("".join(f">p{number}\n{PROTEIN}{'A' * number}\n" for number in range(6)))
    rows = [f"p{number},{PROTEIN}{'A' * number},{number}.5" for number in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,sequence,Tm", ",,°C", *rows]) + "\n")
    records = [Record("p1", "p1", f"{PROTEIN}A")]
    (tmp_path / "scores.csv").write_text("mutant,score\n,kcal/mol\nM1A,0.5\nK2A,1.5\n")
    for read in (
        lambda path: load_labels(path),
        lambda path: read_columns(path, records),
        lambda path: read_proteins(None, path),
        lambda path: read_variants(path.with_name("scores.csv"), records),
    ):
        with refused("table.units-row"):
            read(tmp_path / "labels.csv")


@pytest.mark.parametrize(
    "first",
    [
        f"p0,{PROTEIN},too low,3",  # a protein with a comment: its own error names the protein
        f"p0,{PROTEIN},n.d.,",
        f"p0,{PROTEIN},°C,",
        "p0,,unstable,n.d.",
        ",,,",
        ",,n.d.,-",
    ],
)
def test_a_first_row_that_is_not_one_of_units(tmp_path, first):
    rows = [f"p{number},{PROTEIN}{'A' * number},{number}.5,{number}" for number in range(1, 6)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,sequence,Tm,count", first, *rows]) + "\n")
    assert len(read_table(tmp_path / "labels.csv").rows) == (6 if any(first.split(",")) else 5)


def test_classes_are_not_units(tmp_path):
    rows = ["p0,K,fold", "p1,m,fold", "p2,K,other", "p3,m,other"]
    (tmp_path / "labels.csv").write_text("\n".join(["id,state,kind", *rows]) + "\n")
    assert read_table(tmp_path / "labels.csv").cells(1) == ["K", "m", "K", "m"]


def test_the_time_of_a_join_does_not_grow_with_the_square_of_the_proteins(tmp_path, monkeypatch):
    """The matches are read a few times, and not once per protein."""
    reads = []

    class Counted(list):
        def __iter__(self):
            reads.append(len(self))
            return super().__iter__()

    monkeypatch.setattr(
        RecordMatcher, "match", lambda self, names, match=RecordMatcher.match: match(self, names)._replace(
            records=Counted(match(self, names).records)
        )
    )  # fmt: skip
    lines = [f">p{n}\nMKV{'ACDEFGHIKL'[n % 10]}{'MNPQRSTVWY'[n // 10 % 10]}{'ACDEF'[n // 100]}" for n in range(500)]
    (tmp_path / "my.fasta").write_text("\n".join(lines) + "\n")
    table = write_table(tmp_path / "labels.csv", "protein,Tm", [f"p{n},{n / 4}" for n in range(0, 500, 2)])
    data = load_labels(table, tmp_path / "my.fasta", split_by="random")
    assert sorted(data.targets) == [n / 4 for n in range(0, 500, 2)]
    assert len(reads) < 20
