"""The task table agrees with itself and, on real files, with FLIP."""

import pytest
import yaml
from support.errors import refused

from esm2kit.tasks.data import load_task
from esm2kit.tasks.flip import TASKS, find_split
from esm2kit.tasks.published import PUBLISHED

ESM2NV_README = {"secondary_structure", "scl", "conservation", "bind", "sav", "meltome", "gb1", "aav"}


def test_the_eight_tasks_of_the_readme_are_there_and_the_older_test_set_beside_them():
    assert set(TASKS) == ESM2NV_README | {"secondary_structure_648"}


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_task_is_whole(task):
    assert task.default_split in task.splits
    assert task.citation
    assert task.licence
    assert (task.target == "class") == bool(task.labels)
    assert len(set(task.labels)) == len(task.labels)
    assert task.target == "class" or task.unit
    assert {split.light for split in task.splits.values()} <= {"green", "orange", "red"}
    if task.binary_labels:
        assert len(task.labels) == 2 ** len(task.binary_labels)


def test_published_figures_belong_to_known_splits_and_say_why_they_may_differ():
    for figure in PUBLISHED:
        assert figure.split in TASKS[figure.task].splits
        assert figure.difference
        assert figure.source


def test_an_unknown_split_lists_the_known_ones():
    with refused("task.no-split", task="gb1", allowed=tuple(TASKS["gb1"].splits)):
        find_split(TASKS["gb1"], "four_vs_rest")


SHARED = ("secondary_structure", "secondary_structure_648", "conservation", "bind", "gb1")


@pytest.mark.shared
@pytest.mark.parametrize(("task", "split"), [(task, split) for task in SHARED for split in TASKS[task].splits])
def test_the_real_files_have_the_sizes_of_the_table(shared_data, task, split):
    data = load_task(task, split, shared_data / "flip")
    expected = TASKS[task].splits[split]
    assert data.sizes == {"train": expected.train, "validation": expected.validation, "test": expected.test}
    assert data.official


@pytest.mark.shared
def test_traps_of_the_real_files(shared_data):
    flip = shared_data / "flip"
    assert "13 protein ids are in train and in test" in load_task("bind", "one_vs_many", flip).notes
    bind = load_task("bind", None, flip)
    assert "2 of 300 test proteins have a sequence that train or validation has too" in bind.notes
    current, older = load_task("secondary_structure", None, flip), load_task("secondary_structure_648", None, flip)
    assert (current.num_residues > 1022).sum() == 37
    assert (older.num_residues > 1022).sum() == 39
    assert 0 < (~current.scored).sum() < len(current.scored) / 10  # unresolved residues do not count
    assert set("".join(current.sequences)) >= set("XUO")
    assert load_task("gb1", "sampled", flip).notes == (
        "random split: overestimates",
        "FLIP marks this split orange: not for comparing models",
    )


@pytest.mark.shared
def test_csv_zip_and_fasta_of_one_split_hold_the_same(shared_data, tmp_path):
    (tmp_path / "csv" / "gb1").mkdir(parents=True)
    (tmp_path / "zip" / "gb1").mkdir(parents=True)
    flip = shared_data / "flip" / "gb1"
    (tmp_path / "csv" / "gb1" / "two_vs_rest.csv").write_bytes((flip / "two_vs_rest.csv").read_bytes())
    (tmp_path / "zip" / "gb1" / "splits.zip").write_bytes((flip / "splits.zip").read_bytes())
    folders = (flip.parent, tmp_path / "csv", tmp_path / "zip")
    fasta, csv, archive = (load_task("gb1", "two_vs_rest", folder) for folder in folders)
    for other in (csv, archive):
        assert other.sequences == fasta.sequences
        assert other.targets == pytest.approx(fasta.targets, rel=1e-12)  # the CSV has a digit more
        assert (other.sets == fasta.sets).all()
    assert archive.files["split"].name == "splits.zip"


@pytest.mark.shared
def test_the_older_test_set_under_the_newer_name_is_refused(shared_data, tmp_path):
    (tmp_path / "secondary_structure").symlink_to(shared_data / "flip" / "secondary_structure_648")
    with refused("task.other-test-set", found="secondary_structure_648"):
        load_task("secondary_structure", None, tmp_path)


@pytest.mark.shared
def test_the_one_file_form_of_biotrainer(shared_data):
    data = load_task("scl_rand", None, shared_data / "flip_subsets")
    assert (data.task.level, data.task.target) == ("protein", "class")
    assert data.sizes == {"train": 115, "validation": 16, "test": 3}
    values = load_task("meltome_cv_test", None, shared_data / "flip_subsets")
    assert values.task.target == "value"
    assert values.targets[0] == 43.3297884677024


def test_the_figures_are_those_of_the_golden_file(root):
    """data/golden/published.yaml and flip.PUBLISHED hold the same figures, each as its readers need them."""
    older = {("secondary_structure", 648): "secondary_structure_648"}
    expected = {("gb1", split, "spearman", "one-hot ridge"): value for split, value in golden_ridge(root).items()}
    for table in golden(root):
        for row in table.get("rows", ()):
            suffix = {"frozen": "", "fine-tuned": ", fine-tuned"}.get(row["training"])
            model = row["model"] + suffix if suffix is not None else "8M from random weights, fine-tuned"
            for task, column in table["columns"].items():
                name = older.get((task, column.get("test_proteins")), task)
                value = row[task] / 100 if column.get("unit") == "percent" else row[task]
                expected[name, column["split"], column["metric"], model] = value
    found = {(item.task, item.split, item.metric, item.model): item.value for item in PUBLISHED}
    assert found == pytest.approx(expected)


def golden(root):
    return yaml.safe_load((root / "data" / "golden" / "published.yaml").read_text())["flip"]


def golden_ridge(root):
    return next(table["splits"] for table in golden(root) if table.get("model") == "ridge on one-hot")
