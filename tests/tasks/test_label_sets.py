"""Several targets per protein: how sets of labels and columns are read, and that the reading is reported."""

import csv
import random

import numpy as np
import pytest
from support.errors import refused

from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.tasks.config import TaskConfig, check_task
from esm2kit.tasks.data import load_labels, load_task, load_task_of
from esm2kit.tasks.label_sets import split_label_set, stratify_columns
from esm2kit.tasks.split_file import write_split
from esm2kit.tasks.task import describe_task, read_task

SETS = ("train", "train", "val", "test")


def sequence(number: int) -> str:
    return "".join(random.Random(number).choices("ACDEFGHIKLMNPQRSTVWY", k=30))


def write(path, header, rows):
    """Write a task with the columns id, sequence, set and others; `rows` are the cells of the others."""
    lines = [f"p{i},{sequence(i)},{SETS[i % 4]},{row}" for i, row in enumerate(rows)]
    path.write_text("\n".join([f"id,sequence,set,{header}", *lines]) + "\n")
    return path


@pytest.mark.parametrize(
    ("text", "separator", "labels"),
    [
        ("nucleus;cytoplasm", ";", ("cytoplasm", "nucleus")),
        ("['GO:0005634', \"GO:0005737\"]", ",", ("GO:0005634", "GO:0005737")),
        ("b | a |a", "|", ("a", "b")),
        ("[]", ";", ()),
        ("{}", ",", ()),
        ("cell  wall; ", ";", ("cell wall",)),
        ("membrane, integral;nucleus", ";", ("membrane, integral", "nucleus")),
    ],
)
def test_the_labels_of_a_text(text, separator, labels):
    assert split_label_set(text, separator) == labels


def test_one_name_with_a_semicolon_among_many_classes_is_refused_and_settled(tmp_path):
    names = [f"class {i % 41}" for i in range(400)]
    names[7] = "odd;name"
    path = write(tmp_path / "mine.csv", "target", names)
    with refused("task.several-labels", record="p7", found="odd;name") as caught:
        load_task(str(path))
    assert "target_type to multilabel" in str(caught.value)
    names[4] = "odd;name"  # in train, so that the class is known
    path = write(tmp_path / "mine.csv", "target", names)
    data = load_task(str(path), target_type="class")
    assert (len(data.task.labels), data.task.is_multilabel) == (42, False)


def test_the_same_table_is_read_as_the_user_says(tmp_path):
    cells = ["a;b", "a", "b", "a;b", "a", "[]", "a;b", "b", "b"] * 3
    path = write(tmp_path / "mine.csv", "target", cells)
    data = load_task(str(path))
    assert data.task.metric == "macro_f1"
    assert data.targets.tolist() == [["a" in cell, "b" in cell] for cell in cells]
    assert data.targets.dtype == np.int64
    (note,) = [note for note in data.notes if note.startswith("multi-label")]
    assert note == (
        "multi-label: 2 labels, 1.2 per protein, 3 proteins without a label, separated by semicolons; set target_type "
        "to class if each text is one class"
    )
    assert load_task(str(path), target_type="class").task.labels == ("[]", "a", "a;b", "b")
    chosen = load_task(str(path), target_type="multilabel")
    assert chosen.sha256 == data.sha256
    assert all("set target_type" not in note for note in chosen.notes)
    task = read_task(describe_task(data.task))
    assert (task.is_multilabel, task.num_outputs) == (True, 2)


def test_commas_separate_labels_where_the_user_says_so(tmp_path):
    path = write(tmp_path / "mine.csv", "target", ['"a, b"', "a", "b", "a"] * 4)
    with refused("task.several-labels", found="a, b"):
        load_task(str(path))
    assert load_task(str(path), target_type="multilabel").task.binary_labels == ("a", "b")


def test_a_rare_separator_does_not_hide_the_one_of_the_labels(tmp_path):
    path = write(tmp_path / "mine.csv", "target", [*(["A|B", "A", "B", "A|C", "C"] * 2), "A|x;y"])
    for kind in (None, "multilabel"):
        data = load_task(str(path), target_type=kind)
        assert data.task.binary_labels == ("A", "B", "C", "x;y")
        assert data.targets[:2].sum(axis=1).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ("GO:1,GO:2", "GO:3", {"GO:1", "GO:2", "GO:3"}),
        ("GO:1|GO:2", "GO:3", {"GO:1", "GO:2", "GO:3"}),
        ("['GO:1', 'GO:2']", "['GO:3']", {"GO:1", "GO:2", "GO:3"}),
        ("transferase, acting on X", "hydrolase, acting on X", {"transferase, acting on X", "hydrolase, acting on X"}),
    ],
    ids=["commas", "bars", "brackets", "names"],
)
def test_rows_of_one_protein_may_list_several_labels(tmp_path, first, second, labels):
    rows = [
        (f"p{i}", sequence(i), label, SETS[i % 4]) for i in range(24) for label in (first, second)[: 1 + i % 3 // 2]
    ]
    for name, load in (("task.csv", lambda path: load_task(str(path), target_type="multilabel")),
                       ("labels.csv", lambda path: load_labels(path, target_type="multilabel"))):  # fmt: skip
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "sequence", "target", "set"), *rows])
        data = load(tmp_path / name)
        assert set(data.task.binary_labels) == labels
        expected = [len(labels) if i % 3 == 2 else len(labels) - 1 for i in range(24)]
        assert data.targets.sum(axis=1).tolist() == expected


def test_lists_of_0_and_1_have_no_names(tmp_path):
    path = write(tmp_path / "mine.csv", "target", ["1;0", "0;1", "1;1", "0;0"] * 4)
    with refused("task.label-names", record="p0", found="1;0"):
        load_task(str(path), target_type="multilabel")


def test_columns_of_0_and_1_are_labels(tmp_path):
    cells = ["1,0,1.0", "0,0,0", "1,TRUE,0", "1,0,0"] * 4
    path = write(tmp_path / "mine.csv", "nucleus,golgi,cell wall", cells)
    config = BenchmarkConfig(task=str(path), target="nucleus,golgi,cell wall", joint=True)
    data = load_task_of(config)
    assert data.task.binary_labels == ("nucleus", "golgi", "cell wall")
    assert data.targets[:3].tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert any("multi-label: 3 labels" in note and "set target_type to value" in note for note in data.notes)
    values = load_task(str(path), target=["nucleus", "cell wall"], target_type="value")
    assert (values.task.columns, values.targets.dtype) == (("nucleus", "cell wall"), np.float64)
    path = write(tmp_path / "mine.csv", "nucleus,golgi", ["1,0", "0,", "1,1", "1,0"] * 4)
    with refused("task.cell", record="p1", column="golgi", found=""):
        load_task(str(path), target=["nucleus", "golgi"])
    path = write(tmp_path / "mine.csv", "nucleus,golgi", ["1,0", "0,maybe", "1,1", "1,0"] * 4)
    with refused("task.cell", record="p1", column="golgi", found="maybe"):
        load_task(str(path), target=["nucleus", "golgi"])


def test_rows_of_one_protein_are_its_labels_only_if_the_user_says_so(tmp_path):
    lines = [f"p{i},{sequence(i)},{SETS[i % 4]},{label}" for i in range(16) for label in "ab"[: 1 + i % 2]]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(["id,sequence,set,target", *lines]) + "\n")
    data = load_task(str(path), target_type="multilabel")
    assert (len(data.ids), data.targets.tolist()) == (16, [[1, i % 2] for i in range(16)])
    assert load_task(str(path)).task.labels == ("a", "b")
    path.write_text(path.read_text().replace(f"p1,{sequence(1)},train,b", f"p1,{sequence(1)},test,b"))
    with refused("task.repeated-labels", record="p1"):
        load_task(str(path), target_type="multilabel")


def test_rows_of_one_protein_in_a_table_of_labels(tmp_path):
    lines = [f"p{i},{sequence(i)},{label}" for i in range(60) for label in ("nucleus", "wall", "nucleus")[: 1 + i % 3]]
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["protein,sequence,place", *lines]) + "\n")
    with refused("labels.repeated", record="p1") as caught:
        load_labels(path, target="place")
    assert "target_type to multilabel" in str(caught.value)
    data = load_labels(path, target="place", target_type="multilabel")
    assert data.targets.tolist() == [[1, i % 3 > 0] for i in range(60)]
    assert {name: size > 0 for name, size in data.sizes.items()} == dict.fromkeys(("train", "validation", "test"), True)


def test_several_values_of_a_table_with_missing_cells(tmp_path):
    cells = [f"{i / 4},{'' if i % 3 else i},n.d." for i in range(15)] + ["1.5,2,7", "n/a,,"]
    lines = [f"p{i},{sequence(i)},{row}" for i, row in enumerate(cells)]
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["protein,sequence,Tm (C),dG,rate", *lines]) + "\n")
    data = load_labels(path, target=["Tm (C)", "dG"])
    assert (data.task.columns, data.task.unit, data.task.name) == (("Tm (C)", "dG"), "", "labels_Tm_dG")
    assert len(data.ids) == 16  # p16 has no value
    expected = [[i / 4, np.nan if i % 3 else i] for i in range(15)] + [[1.5, 2.0]]
    np.testing.assert_array_equal(data.targets, expected)
    assert any("10 cells without a value" in note for note in data.notes)
    with refused("task.empty-column", column="rate"):
        load_labels(path, target=["Tm (C)", "rate"])


def test_a_text_among_several_values_is_refused(tmp_path):
    path = write(tmp_path / "mine.csv", "a,b", ["1.5,2", "1,high", "2,3", "3,4"] * 4)
    with refused("task.cell", record="p1", column="b", found="high"):
        load_task(str(path), target=["a", "b"])
    with refused("task.several-residue-targets"):
        load_task(str(path), target=["a", "b"], level="residue")


def test_fields_of_headers_are_several_targets(tmp_path):
    text = "".join(f">p{i} A={i}.5 B={i % 3} SET={SETS[i % 4]}\n{sequence(i)}\n" for i in range(16))
    (tmp_path / "mine.fasta").write_text(text)
    data = load_task("mine", None, tmp_path, target=["a", "b"])
    assert data.targets[:2].tolist() == [[0.5, 0.0], [1.5, 1.0]]


@pytest.mark.parametrize(
    ("given", "names"),
    [("a,b , c", ["a", "b", "c"]), ("rate (1/(M s), log)", ["rate (1/(M s), log)"]), (["a,b"], ["a,b"])],
)
def test_names_of_columns_are_separated_by_commas_outside_brackets(given, names):
    config = TaskConfig(target=given)
    check_task(config)
    assert config.target == names


def test_a_subset_keeps_rare_labels_and_all_columns(tmp_path):
    cells = ["common;rare" if i % 40 < 4 else "common" if i % 3 else "[]" for i in range(400)]
    data = load_task(str(write(tmp_path / "mine.csv", "target", cells)), target_type="multilabel")
    small = data.limit_proteins(20)
    assert small.targets.shape == (len(small.ids), 2)
    assert all(small.targets[small.sets == name, 1].any() for name in ("train", "validation", "test"))
    values = np.array([[0.0, 1.0], [1.0, np.nan], [2.0, 3.0], [3.0, 4.0]])
    assert (np.diff(stratify_columns(values, multilabel=False)) > 0).all()


def test_a_label_that_only_test_has_is_refused(tmp_path):
    cells = ["a;b", "a", "b", "a;b"] * 4
    cells[3] = "a;c"
    with refused("task.unseen-class", label="c"):
        load_task(str(write(tmp_path / "mine.csv", "target", cells)))


@pytest.mark.parametrize("form", ["text", "values"])
def test_the_written_split_is_a_task_with_the_same_targets(tmp_path, form):
    cells = ["a;b,1.5,", "a,2,3.25", "[],,1", "b,4,1e-3"] * 15
    lines = [f"p{i},{sequence(i)},{row}" for i, row in enumerate(cells)]
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["protein,sequence,place,x,y", *lines]) + "\n")
    target = "place" if form == "text" else ["x", "y"]
    data = load_labels(path, target=target)
    again = load_task(str(write_split(data, tmp_path)), target=None if form == "text" else target)
    assert (again.ids, again.sets.tolist()) == (data.ids, data.sets.tolist())
    np.testing.assert_array_equal(again.targets, data.targets)


def test_decimal_commas_of_any_of_several_columns_are_noted(tmp_path):
    lines = [f"p{i};{sequence(i)};{i};{i},5" for i in range(30)]
    (tmp_path / "labels.csv").write_text("\n".join(["protein;sequence;count;Tm", *lines]) + "\n")
    data = load_labels(tmp_path / "labels.csv", target=["count", "Tm"])
    assert data.targets.tolist() == [[i, i + 0.5] for i in range(30)]
    assert any("targets 'count', 'Tm', decimal commas; 30 of 30" in note for note in data.notes)


def test_proteins_are_sorted_by_the_values_that_they_have_without_a_warning(recwarn):
    """The mean of the standardised values, by numpy; a missing value and a column of equal ones do not count."""
    nan = np.nan
    targets_PC = np.array([[1.0, 10.0, 7.0], [2.0, nan, 7.0], [nan, 40.0, 7.0], [6.0, 10.0, nan], [nan, nan, 7.0]])
    standard = [(column - np.nanmean(column)) / np.nanstd(column) for column in targets_PC.T[:2]]
    expected = [np.mean([value for value in row if np.isfinite(value)]) for row in np.array(standard).T[:4]]
    np.testing.assert_allclose(stratify_columns(targets_PC, multilabel=False), [*expected, 0.0], rtol=1e-12)
    assert not stratify_columns(np.full((3, 2), nan), multilabel=False).any()
    assert not stratify_columns(np.full((7, 2), 0.1), multilabel=False).any()
    assert not recwarn.list
