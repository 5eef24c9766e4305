"""The table of tasks is consistent, and its set sizes match FLIP's files."""

import pytest
import yaml
from support.errors import refused

from esm2kit.models.config import SIZES
from esm2kit.tasks.data import load_task
from esm2kit.tasks.flip import TASKS, find_split
from esm2kit.tasks.published import PUBLISHED

ESM2NV_README = {"secondary_structure", "scl", "conservation", "bind", "sav", "meltome", "gb1", "aav"}


def test_the_tasks_are_those_of_the_readme_and_the_older_test_set():
    assert set(TASKS) == ESM2NV_README | {"secondary_structure_648"}


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_task_is_complete(task):
    assert task.default_split in task.splits
    assert task.citation
    assert task.licence
    assert (task.target == "class") == bool(task.labels)
    assert len(set(task.labels)) == len(task.labels)
    assert task.target == "class" or task.unit
    assert {split.light for split in task.splits.values()} <= {"green", "orange", "red"}
    if task.binary_labels:
        assert len(task.labels) == 2 ** len(task.binary_labels)


def test_published_scores_belong_to_known_splits_and_have_a_source():
    for score in PUBLISHED:
        assert score.split in TASKS[score.task].splits
        assert score.difference
        assert score.source


def test_an_unknown_split_lists_the_known_ones():
    with refused("task.no-split", task="gb1", allowed=tuple(TASKS["gb1"].splits)):
        find_split(TASKS["gb1"], "four_vs_rest")


SHARED = ("secondary_structure", "secondary_structure_648", "conservation", "bind", "gb1")


@pytest.mark.shared
@pytest.mark.parametrize(("task", "split"), [(task, split) for task in SHARED for split in TASKS[task].splits])
def test_the_table_has_the_sizes_of_flips_files(shared_data, task, split):
    data = load_task(task, split, shared_data / "flip")
    expected = TASKS[task].splits[split]
    assert data.sizes == {"train": expected.train, "validation": expected.validation, "test": expected.test}
    assert data.official


@pytest.mark.shared
def test_notes_on_flips_files(shared_data):
    flip = shared_data / "flip"
    assert "13 protein ids occur in both train and test" in load_task("bind", "one_vs_many", flip).notes
    bind = load_task("bind", None, flip)
    assert "the sequences of 2 of 300 test proteins also occur in train or validation" in bind.notes
    current, older = load_task("secondary_structure", None, flip), load_task("secondary_structure_648", None, flip)
    assert (current.num_residues > 1022).sum() == 37
    assert (older.num_residues > 1022).sum() == 39
    assert 0 < (~current.scored).sum() < len(current.scored) / 10  # unresolved residues are not scored
    assert set("".join(current.sequences)) >= set("XUO")
    assert load_task("gb1", "sampled", flip).notes == (
        "random split: overestimates",
        "FLIP marks this split orange: do not use it to compare models",
    )


@pytest.mark.shared
def test_csv_zip_and_fasta_of_a_split_have_the_same_content(shared_data, tmp_path):
    (tmp_path / "csv" / "gb1").mkdir(parents=True)
    (tmp_path / "zip" / "gb1").mkdir(parents=True)
    flip = shared_data / "flip" / "gb1"
    (tmp_path / "csv" / "gb1" / "two_vs_rest.csv").write_bytes((flip / "two_vs_rest.csv").read_bytes())
    (tmp_path / "zip" / "gb1" / "splits.zip").write_bytes((flip / "splits.zip").read_bytes())
    folders = (flip.parent, tmp_path / "csv", tmp_path / "zip")
    fasta, csv, archive = (load_task("gb1", "two_vs_rest", folder) for folder in folders)
    for other in (csv, archive):
        assert other.sequences == fasta.sequences
        assert other.targets == pytest.approx(fasta.targets, rel=1e-12)  # the CSV has one more digit
        assert (other.sets == fasta.sets).all()
    assert archive.files["split"].name == "splits.zip"


@pytest.mark.shared
def test_the_older_test_set_is_refused_under_the_name_of_the_newer(shared_data, tmp_path):
    (tmp_path / "secondary_structure").symlink_to(shared_data / "flip" / "secondary_structure_648")
    with refused("task.other-test-set", found="secondary_structure_648"):
        load_task("secondary_structure", None, tmp_path)


@pytest.mark.shared
def test_a_single_file_in_biotrainers_format_is_read(shared_data):
    data = load_task("scl_rand", None, shared_data / "flip_subsets")
    assert (data.task.level, data.task.target) == ("protein", "class")
    assert data.sizes == {"train": 115, "validation": 16, "test": 3}
    values = load_task("meltome_cv_test", None, shared_data / "flip_subsets")
    assert values.task.target == "value"
    assert values.targets[0] == 43.3297884677024


def test_the_published_scores_match_the_golden_file(root):
    """data/golden/published.yaml and PUBLISHED contain the same scores in different formats."""
    older = {("secondary_structure", 648): "secondary_structure_648"}
    expected = {("gb1", split, "spearman", "one-hot ridge"): value for split, value in read_golden_ridge(root).items()}
    for table in read_golden(root):
        for row in table.get("rows", ()):
            size = row["model"].split("_")[2]
            model = {
                "frozen": row["model"],
                "random start, fine-tuned": f"{size} from random weights, fine-tuned",
            }.get(row["training"], f"{row['model']}, {row['training']}")
            for task, column in table["columns"].items():
                name = older.get((task, column.get("test_proteins")), task)
                value = row[task] / 100 if column.get("unit") == "percent" else row[task]
                expected[name, column["split"], column["metric"], model] = value
    found = {(item.task, item.split, item.metric, item.model): item.value for item in PUBLISHED}
    assert found == pytest.approx(expected)


# Spearman correlation or accuracy, in the order gb1, aav, meltome, scl, secondary structure.
SCHMIRLER_ROWS = {
    ("esm2_t6_8M_UR50D", "frozen"): (0.818, 0.669, 0.564, 0.520, 0.753),
    ("esm2_t12_35M_UR50D", "frozen"): (0.827, 0.590, 0.586, 0.549, 0.782),
    ("esm2_t30_150M_UR50D", "frozen"): (0.833, 0.657, 0.617, 0.594, 0.822),
    ("esm2_t33_650M_UR50D", "frozen"): (0.857, 0.471, 0.656, 0.629, 0.847),
    ("esm2_t6_8M_UR50D", "fine-tuned"): (0.883, 0.827, 0.584, 0.559, 0.761),
    ("esm2_t33_650M_UR50D", "fine-tuned"): (0.879, 0.783, 0.664, 0.638, 0.855),
    ("esm2_t6_8M_UR50D", "random start, fine-tuned"): (0.857, 0.708, 0.527, 0.470, 0.708),
}


def test_the_golden_file_has_the_rows_of_schmirler(root):
    table = next(table for table in read_golden(root) if table["source"].startswith("Schmirler"))
    tasks = ("gb1", "aav", "meltome", "scl", "secondary_structure")
    rows = {(row["model"], row["training"]): tuple(row[task] for task in tasks) for row in table["rows"]}
    assert {key: rows[key] for key in SCHMIRLER_ROWS} == SCHMIRLER_ROWS
    frozen = [size.split("_")[2] for size, training in rows if training == "frozen"]
    assert frozen == ["8M", "35M", "150M", "650M", "3B"]
    assert len(rows) == len(table["rows"]) == 12


def test_published_contact_precision_grows_with_the_model(root):
    table = yaml.safe_load((root / "data" / "golden" / "published.yaml").read_text())["contact_precision"]
    assert list(table["values"]) == list(SIZES)
    for name in table["sets"]:
        found = [row[name] for row in table["values"].values()]
        assert found == sorted(found)
        assert 0 < found[0] < found[-1] < 100


def read_golden(root):
    return yaml.safe_load((root / "data" / "golden" / "published.yaml").read_text())["flip"]


def read_golden_ridge(root):
    return next(table["splits"] for table in read_golden(root) if table.get("model") == "ridge on one-hot")
