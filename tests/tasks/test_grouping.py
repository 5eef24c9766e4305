"""Groups and folds of tasks: clusters and columns, no group in two folds, validation sets within the other folds."""

import itertools
import zipfile
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused

from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.sequences import similarity
from esm2kit.sequences.alignment import Criterion, are_similar
from esm2kit.tasks import grouping
from esm2kit.tasks.data import load_pooled_task, load_task
from esm2kit.tasks.grouping import connect_pairs, find_shared_groups, hold_out, plan_folds
from esm2kit.tasks.split import separate_groups
from esm2kit.tasks.task import Task
from esm2kit.tasks.task_data import TaskData

LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


@pytest.fixture(scope="module", autouse=True)
def compare_kmers():
    """Group by k-mers, which takes milliseconds, also where MMseqs2 is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity.shutil, "which", lambda name: None)
        yield


def draw_families(seed: int, num_families: int, most: int, share: float = 0.15) -> tuple[list[str], np.ndarray]:
    """Draw families of related sequences: members differ from an ancestor in a share of their residues."""
    generator = np.random.default_rng(seed)
    sequences, family = [], []
    for number in range(num_families):
        ancestor = generator.choice(LETTERS, int(generator.integers(60, 120)))
        for _ in range(int(generator.integers(1, most + 1))):
            member = np.where(
                generator.random(len(ancestor)) < share, generator.choice(LETTERS, len(ancestor)), ancestor
            )
            sequences.append("".join(member))
            family.append(number)
    return sequences, np.array(family)


def build_task(sequences: list[str], targets: np.ndarray, labels: tuple[str, ...] = ()) -> TaskData:
    """Build a pooled task."""
    kind = "class" if labels else "value"
    task = Task("drawn", "protein", kind, "accuracy" if labels else "spearman", {}, "", labels=labels)
    names = [f"p{number}" for number in range(len(sequences))]
    return TaskData(
        task, "", names, sequences, np.full(len(names), "train"), targets, np.ones(len(names), dtype=bool), {}
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 2))
def test_no_two_folds_share_a_cluster_or_a_similar_pair(seed, num_folds, repeats):
    sequences, family = draw_families(seed, 12, 5)
    data = build_task(sequences, np.random.default_rng(seed).normal(size=len(sequences)))
    plan = plan_folds(data, num_folds, repeats, "cluster", source="none")
    criterion = Criterion(0.5, 0.8, len(set(sequences)))
    pairs = itertools.combinations(range(len(sequences)), 2)
    similar = [pair for pair in pairs if are_similar(sequences[pair[0]], sequences[pair[1]], criterion)]
    first, second = np.array(similar).T
    for fold_P in plan.fold_RP:
        assert not find_shared_groups(plan.group_P, fold_P).size
        assert (fold_P[first] == fold_P[second]).all()
        assert not find_shared_groups(family, fold_P).size
    for repeat, fold in itertools.product(range(repeats), range(num_folds)):
        held = hold_out(data, plan, repeat, fold)
        assert (held.sets == "test").tolist() == (plan.fold_RP[repeat] == fold).tolist()
        assert not find_shared_groups(plan.group_P, np.unique(held.sets, return_inverse=True)[1]).size
        assert set(held.sets.tolist()) == {"train", "validation", "test"}


def test_repeats_divide_the_proteins_differently():
    sequences, _ = draw_families(0, 30, 1)
    data = build_task(sequences, np.arange(30.0))
    plan = plan_folds(data, 5, 3, source="none")
    assert len({tuple((fold_P[:, None] == fold_P).ravel()) for fold_P in plan.fold_RP}) == 3
    assert "groups of at least 50% identity" in plan.method


def test_variants_of_one_protein_are_divided_by_equal_sequences_and_it_is_said():
    sequences, _ = draw_families(1, 1, 1)
    variants = [sequences[0][:place] + letter + sequences[0][place + 1 :] for place in range(10) for letter in "AC"]
    data = build_task(variants, np.arange(20.0))
    plan = plan_folds(data, 4, source="none")
    assert plan.method.endswith("groups: equal sequences")
    assert any("fewer groups than 4 folds" in note for note in plan.notes)
    assert not find_shared_groups(np.unique(variants, return_inverse=True)[1], plan.fold_RP[0]).size
    with refused("folds.too-few-groups", folds=4, groups=1):
        plan_folds(data, 4, group_by="cluster", source="none")


def load_pooled(**options) -> TaskData:
    """Load a pooled task from the options of a benchmark."""
    return load_pooled_task(BenchmarkConfig(**options))


def write_table(path, columns: dict[str, list]) -> None:
    """Write a CSV file."""
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n")


def test_folds_and_groups_of_columns(tmp_path):
    sequences, family = draw_families(2, 8, 4)
    names = [f"p{number}" for number in range(len(sequences))]
    values = [f"{number * 7 % 11}.5" for number in range(len(sequences))]
    folds = [f"f{number % 3}" for number in family]
    table = tmp_path / "mine.csv"
    write_table(table, {"id": names, "sequence": sequences, "plate": family.tolist(), "fold": folds, "target": values})
    for data in (load_task(str(table), pooled=True), load_pooled(labels=table, target="target")):
        plan = plan_folds(data, "fold", group_by="plate", source=table)
        assert [plan.names[fold] for fold in plan.fold_RP[0]] == folds
        assert (plan.group_P == family).all()
        by_plate = plan_folds(data, 3, group_by="plate", source=table)
        assert not find_shared_groups(family, by_plate.fold_RP[0]).size
        with refused("folds.shared-group", groups=len([size for size in np.bincount(family) if size > 1])):
            write_table(tmp_path / "other.csv", {"id": names, "fold": np.arange(len(names)).tolist(), "plate": family})
            plan_folds(data, "fold", group_by="plate", source=tmp_path / "other.csv")
        with refused("table.no-column", column="batch"):
            plan_folds(data, 3, group_by="batch", source=table)


def test_folds_of_a_column_that_share_clusters_are_noted(tmp_path):
    sequences, family = draw_families(3, 6, 3)
    table = tmp_path / "mine.csv"
    folds = [number % 2 for number in range(len(sequences))]
    write_table(table, {"sequence": sequences, "fold": folds, "target": np.arange(len(sequences)) + 0.5})
    plan = plan_folds(load_task(str(table), pooled=True), "fold", source=table)
    assert plan.fold_RP[0].tolist() == folds
    assert any("in several folds of column fold" in note for note in plan.notes)
    divided = sum(len({fold for fold, own in zip(folds, family, strict=True) if own == each}) > 1 for each in range(6))
    with refused("folds.shared-group", groups=divided):
        plan_folds(load_task(str(table), pooled=True), "fold", group_by="cluster", source=table)


def test_folds_of_a_column_with_whole_clusters(tmp_path):
    sequences, family = draw_families(3, 6, 3)
    table = tmp_path / "mine.csv"
    write_table(table, {"sequence": sequences, "fold": family % 2, "target": np.arange(len(sequences)) + 0.5})
    plan = plan_folds(load_task(str(table), pooled=True), "fold", group_by="cluster", source=table)
    assert plan.fold_RP[0].tolist() == (family % 2).tolist()
    assert not plan.notes


def test_pairs_that_were_not_aligned_are_noted(monkeypatch):
    sequences, _ = draw_families(0, 12, 1)
    data = build_task(sequences, np.arange(12.0))
    assert not plan_folds(data, 3, source="none").notes
    monkeypatch.setattr(grouping, "separate_groups", partial(separate_groups, max_cells=1))
    (note,) = plan_folds(data, 3, source="none").notes
    assert note.startswith("0 of 66 pairs of proteins of different sets were aligned")


def test_records_with_a_common_protein_are_one_group():
    pairs = np.array([[0, 1], [2, 3], [1, 4], [5, 5], [3, 6]])
    assert connect_pairs(pairs).tolist() == [0, 1, 0, 2, 1]
    joined = join_pairs(pairs)
    assert {frozenset(np.flatnonzero(connect_pairs(pairs) == k).tolist()) for k in range(3)} == joined
    assert connect_pairs(np.array([[3], [1], [3]])).tolist() == [1, 0, 1]


def join_pairs(pairs) -> set[frozenset[int]]:
    """Join pairs with a common protein until none is left."""
    parts = [({row}, set(pair)) for row, pair in enumerate(pairs.tolist())]
    joined = True
    while joined:
        joined = False
        for a, b in itertools.combinations(range(len(parts)), 2):
            if parts[a][1] & parts[b][1]:
                rows, proteins = parts.pop(b)
                parts[a] = (parts[a][0] | rows, parts[a][1] | proteins)
                joined = True
                break
    return {frozenset(rows) for rows, _ in parts}


@pytest.mark.parametrize("options", [{"folds": "fold"}, {"folds": 3, "group_by": "fold"}])
def test_folds_of_pairs_are_not_read_from_a_column(tmp_path, options):
    sequences, table = draw_families(5, 20, 1)[0], tmp_path / "mine.csv"
    columns = {
        "sequence_a": sequences[:10],
        "sequence_b": sequences[10:],
        "target": np.arange(10) + 1.5,
        "fold": [0, 1] * 5,
    }
    write_table(table, columns)
    with refused("pairs.option", path=table):
        plan_folds(load_pooled(labels=table, target="target"), source=table, **options)


@pytest.mark.parametrize("group_by", [None, "cluster"])
def test_pairs_that_are_all_connected_are_refused(tmp_path, group_by):
    sequences, table = draw_families(5, 21, 1)[0], tmp_path / "mine.csv"
    write_table(table, {"sequence_a": sequences[:20], "sequence_b": sequences[1:], "target": np.arange(20) + 1.5})
    data = load_pooled(labels=table)
    with refused("folds.pairs-connected", pairs=20, largest=20, folds=2):
        plan_folds(data, 2, group_by=group_by, source=table)


@pytest.mark.parametrize(
    ("cells", "options", "name"),
    [
        (["1.5"] * 5 + [""] * 15, {"target": ["a", "b"], "joint": True}, "b"),
        (["x;y"] * 5 + ["x"] * 15, {"target": "b", "target_type": "multilabel"}, "y"),
    ],
)
def test_a_column_or_a_label_in_one_fold_is_refused(tmp_path, cells, options, name):
    table, sequences = tmp_path / "mine.csv", draw_families(5, 20, 1)[0]
    fold = [number // 5 for number in range(20)]
    write_table(table, {"sequence": sequences, "a": np.arange(20) + 0.5, "b": cells, "fold": fold})
    data = load_pooled(labels=table, folds="fold", **options)
    with refused("folds.class-in-one-fold", label=name, proteins=5, groups=5):
        plan_folds(data, "fold", source=table)
    assert plan_folds(data, 4, source=table, split_by="random").num_folds == 4


@pytest.mark.parametrize(
    ("cells", "code"), [(["a", "", "b", "a"], "folds.no-entry"), (["a", "a", "a", "a"], "folds.single")]
)
def test_cells_of_folds_that_cannot_be_used(tmp_path, cells, code):
    table = tmp_path / "mine.csv"
    sequences = draw_families(4, 4, 1)[0]
    write_table(table, {"id": list("wxyz"), "sequence": sequences, "fold": cells, "target": [1.5, 2.5, 3.5, 4.5]})
    with refused(code, column="fold"):
        plan_folds(load_task(str(table), pooled=True), "fold", source=table)


def test_two_folds_of_one_sequence(tmp_path):
    table = tmp_path / "mine.csv"
    sequences = draw_families(4, 3, 1)[0]
    write_table(table, {"sequence": [*sequences, sequences[0]], "fold": [0, 1, 2, 1], "target": [1.5, 2.5, 3.5, 4.5]})
    with refused("folds.two-entries", column="fold"):
        plan_folds(load_task(str(table), pooled=True), "fold", source=table)


def test_fields_of_headers(tmp_path):
    fasta = tmp_path / "mine.fasta"
    sequences = draw_families(5, 6, 1)[0]
    records = [f">p{n} TARGET={n}.5 FOLD={n % 3}\n{sequence}\n" for n, sequence in enumerate(sequences)]
    fasta.write_text("".join(records))
    data = load_task(str(fasta), pooled=True)
    assert plan_folds(data, "fold", source=fasta).fold_RP[0].tolist() == [0, 1, 2, 0, 1, 2]
    fasta.write_text("".join(records).replace("FOLD=", "Fold="))
    with refused("folds.no-field", field="FOLD") as caught:
        plan_folds(data, "Fold", source=fasta)
    assert "the fields are TARGET. Write the names of fields in capital letters" in str(caught.value)


def test_columns_are_not_read_from_a_zip_archive(tmp_path):
    rows = "".join(f"{sequence},{n}.5,{n % 3}\n" for n, sequence in enumerate(draw_families(5, 6, 1)[0]))
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        archive.writestr("mine.csv", f"sequence,target,fold\n{rows}")
    with refused("folds.zipped", column="fold", path=tmp_path / "mine.zip"):
        plan_folds(load_task(str(tmp_path), pooled=True), "fold")


def test_a_class_in_one_group_cannot_be_tested():
    sequences, _ = draw_families(6, 12, 1)
    classes = np.array([0, 1] * 5 + [0, 2])
    with refused("folds.class-in-one-fold", label="c", proteins=1, groups=1):
        plan_folds(build_task(sequences, classes, ("a", "b", "c")), 3, source="none")
    plan = plan_folds(build_task(sequences, np.minimum(classes, 1), ("a", "b", "c")), 3, source="none")
    assert plan.num_folds == 3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_every_class_of_the_other_folds_is_in_train(seed):
    generator = np.random.default_rng(seed)
    sequences, _ = draw_families(seed, 14, 1)
    classes = np.concatenate([[0, 0, 1, 1, 2, 2], generator.integers(0, 2, 8)])
    data = build_task(sequences, classes, ("a", "b", "c"))
    try:
        plan = plan_folds(data, 3, source="none", seed=seed)
    except ValueError:
        return  # both proteins of a class are in one fold
    for fold in range(3):
        held = hold_out(data, plan, 0, fold)
        assert set(held.targets[held.rows("train")]) >= set(held.targets[held.sets != "test"])
        assert len(held.rows("validation"))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_every_class_of_residues_in_the_other_folds_is_in_train(seed):
    """Two proteins have a residue of a rare class."""
    generator = np.random.default_rng(seed)
    sequences, _ = draw_families(seed, 15, 1)
    counts = np.array([len(sequence) for sequence in sequences])
    classes, first = generator.integers(0, 2, counts.sum()), np.cumsum(counts) - counts
    classes[first[:2]] = 2
    task = Task("drawn", "residue", "class", "accuracy", {}, "", labels=("a", "b", "c"))
    names, sets, scored = [f"p{n}" for n in range(15)], np.full(15, "train"), np.ones(len(classes), dtype=bool)
    scored[first[2:]] = generator.random(13) < 0.5  # an ignored residue does not count
    classes[first[2:][~scored[first[2:]]]] = 2
    data = TaskData(task, "", names, sequences, sets, classes, scored, {})
    try:
        plan = plan_folds(data, 3, source="none", seed=seed)
    except ValueError:
        return  # both proteins of the class are in one fold
    for fold in range(3):
        held = hold_out(data, plan, 0, fold)
        train = set(held.targets[held.target_rows("train")])
        assert train >= set(held.targets[held.target_rows("validation")])
        assert len(held.rows("validation"))


def test_a_column_of_folds_is_not_the_target(tmp_path):
    table = tmp_path / "labels.csv"
    sequences = draw_families(7, 20, 1)[0]
    numbers = np.arange(20)
    columns = {"id": numbers, "sequence": sequences, "fold": numbers % 3, "plate": numbers % 4, "heat": numbers / 8}
    write_table(table, columns)
    config = BenchmarkConfig(labels=table)
    assert load_pooled_task(config, ["plate"]).targets.tolist() == (numbers / 8).tolist()
    with refused("labels.which-target", allowed=("plate", "heat")):
        load_pooled_task(config)


def test_pooled_records_need_no_set(tmp_path):
    sequences, numbers = draw_families(8, 20, 1)[0], np.arange(20)
    table = tmp_path / "mine.csv"
    write_table(table, {"id": numbers, "sequence": sequences, "fold": numbers % 3, "target": numbers + 0.5})
    with refused("task.columns", missing=("set",)):
        load_task(str(table))
    for data in (load_task(str(table), pooled=True), load_pooled(labels=table), load_pooled(task=str(table))):
        assert set(data.sets.tolist()) == {"train"}
        assert data.targets.tolist() == (numbers + 0.5).tolist()
    sets = [("train", "val", "test")[number % 3] for number in range(20)]
    write_table(table, {"id": numbers, "sequence": sequences, "set": sets, "target": numbers + 0.5})
    for data in (load_pooled(labels=table), load_pooled(task=str(table))):
        assert set(data.sets.tolist()) == {"train"}
        assert "cross-validation uses the proteins of all sets (train 7, validation 7, test 6)" in data.notes
    assert load_task(str(table)).sizes == {"train": 7, "validation": 7, "test": 6}
