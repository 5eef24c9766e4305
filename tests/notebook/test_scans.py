"""Notebook 07: pasted sequences, the slider, and scores against the secondary structure."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit import STANDARD_RESIDUES, load_task
from esm2kit.notebook import scans
from esm2kit.notebook.pickers.scans import position_picker, read_pasted, sequence_picker
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.metrics import Interval
from esm2kit.tasks.task_data import TaskData

ROOT = Path(__file__).resolve().parents[2]
PROTEIN = Record("P", "P", "MKTAYIAKQRQISFVKSHFSRQ")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def task() -> TaskData:
    return load_task("secondary_structure_pdb", data_dir=ROOT / "data" / "sample" / "tasks")


def test_a_pasted_sequence_is_read_as_people_have_it() -> None:
    assert read_pasted(">sp|P1 Name\n 1 mktay iakqr\n11 QIS*\n") == Record("sp|P1", "sp|P1 Name", "MKTAYIAKQRQIS")
    assert read_pasted("MKT").id == "pasted"
    with refused("pasted.letter", found="J"):
        read_pasted("MKJ")
    with refused("pasted.letter"):
        read_pasted(">only a header")
    with refused("pasted.several", found=2):
        read_pasted(">a\nMK\n>b\nMK")


def test_a_pasted_sequence_is_used_instead_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_text(">a\nMKT\n>b\nMKV\n")
    view = sequence_picker(str(tmp_path / "a.fasta"), "")
    assert [record.id for record in view.value] == ["a", "b"]
    view.controls["sequence"].value = "mkl"
    assert [record.sequence for record in view.value] == ["MKL"]
    assert view.parameters == {"fasta": str(tmp_path / "a.fasta"), "sequence": "mkl"}


def test_the_slider_is_as_long_as_the_longest_protein() -> None:
    view = position_picker(50, [PROTEIN, Record("Q", "Q", "MK")])
    assert (view.controls["position"].max, view.value) == (22, 22)


def test_proteins_and_models_have_files_of_their_own(tmp_path: Path, model: Path) -> None:
    one = scans.score_protein(PROTEIN, str(model), tmp_path, pictures=0)
    assert scans.score_protein(PROTEIN, str(model), tmp_path, pictures=0) == one
    other = scans.score_protein(PROTEIN._replace(sequence="MKV"), str(model), tmp_path, pictures=0)
    assert other.scores != one.scores
    again = scans.score_protein(PROTEIN, str(model), tmp_path, pictures=0, strategy="wt-marginals")
    assert (again.scores, again.strategy) == (one.scores, "wt-marginals")


def test_the_bars_are_the_scores_of_the_position(tmp_path: Path, model: Path) -> None:
    scores = scans.score_protein(PROTEIN, str(model), tmp_path, pictures=0)
    ax = scans.position_bars(scores, 3)
    bars = {label.get_text(): bar.get_height() for label, bar in zip(ax.get_xticklabels(), ax.patches, strict=True)}
    assert bars == pytest.approx(dict(zip(STANDARD_RESIDUES, scores.table()[2], strict=True)))
    assert ax.get_xlabel() == "residue instead of T3"
    assert scans.position_bars(scores, 99).get_xlabel() == "residue instead of Q22"
    row_A = scores.table()[2]
    best = STANDARD_RESIDUES[int(np.argmax(np.where(row_A == 0, -np.inf, row_A)))]
    assert f"The best substitution of T is {best} (" in scans.describe_position(scores, 3, PROTEIN)


def test_the_structure_of_a_protein_of_the_sample(task: TaskData) -> None:
    found = scans.find_structure(task, "1ag9-A")
    assert found[1:17] == "CEEEEECCCCCHHHHH"
    assert found[0] == " "  # not observed
    assert scans.find_structure(task, "unknown") == ""


class Fixed:
    """Scores that are lower at structured residues."""

    def __init__(self, task: TaskData, by_context: bool) -> None:
        places = np.flatnonzero(task.sets == "test")[:8]
        self.proteins = [task.ids[place] for place in places]
        self.sequences = [task.sequences[place] for place in places]
        self.task, self.by_context = task, by_context

    def sequence(self, index: int) -> str:
        return self.sequences[index]

    def table(self, index: int) -> np.ndarray:
        structure = scans.find_structure(self.task, self.proteins[index])
        values = [-1.0 if self.by_context and letter in "HE" else 0.0 for letter in structure]
        if not self.by_context:  # only the letter counts
            values = [-float(STANDARD_RESIDUES.find(letter)) for letter in self.sequences[index]]
        return np.repeat(np.array(values)[:, None], 20, axis=1)


def test_context_is_told_from_letters(task: TaskData) -> None:
    knows = scans.compare_structure(Fixed(task, True), task)
    assert knows.shares["model"] == Interval(1.0, 1.0, 1.0)
    assert knows.difference.low > 0.2
    assert "The context adds something" in scans.describe_structure(knows)
    letters = scans.compare_structure(Fixed(task, False), task)
    assert letters.shares["model"] == letters.shares[scans.BY_LETTER]
    assert letters.difference == Interval(0.0, 0.0, 0.0)
    assert "The context adds something" not in scans.describe_structure(letters)


def test_an_assay_is_charted(tmp_path: Path, model: Path) -> None:
    scores = scans.score_protein(PROTEIN, str(model), tmp_path, pictures=0)
    values = scores.column("score")
    values += np.random.default_rng(0).normal(size=len(values)) * values.std() / 3
    rows = [f"{name},{value}" for name, value in zip(scores.column("mutation"), values, strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(["mutant,DMS_score", *rows]))
    assay = scans.score_protein(PROTEIN, str(model), tmp_path / "assay", mutations=str(tmp_path / "a.csv"), pictures=0)
    (chart, caption), (scatter, _) = scans.assay_charts(assay)
    assert caption.startswith("*a, 418 variants.* The model does better than every baseline: Spearman 0.9")
    assert [label.get_text() for label in chart.get_yticklabels()][:2] == ["the model", "BLOSUM62"]
    correlation = spearmanr(values, scores.column("score"))[0]
    assert scatter.get_title().startswith(f"Spearman {correlation:.2f}, 95% interval 0.9")
