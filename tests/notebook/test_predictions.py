"""Figures of predictions: the strip of a test protein, and predictions of new proteins."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.errors import refused
from support.reports import report, row, score

from esm2kit.benchmarking.report import Report
from esm2kit.notebook import captions
from esm2kit.notebook.predictions import new_prediction_chart, strip_chart


def strip_report(folder: Path, truth: str, predicted: str, sizes: list[int], **task: object) -> Report:
    """A report of a task with the classes C, E and H per residue, with its predictions."""
    first = row("probe", "model, cnn", {"accuracy": score(0.5, 0.4, 0.6)})
    found = report("accuracy", [first], [])
    about = {"level": "residue", "target": "class", "labels": ("C", "E", "H")} | task
    numbers = [np.array(["CEH".index(letter) for letter in text]) for text in (truth, predicted)]
    arrays = {"truth": numbers[0], "predicted/model, cnn": numbers[1][None], "num_targets": sizes}
    np.savez(folder / "predictions.npz", **arrays)
    files = {"predictions": "predictions.npz"}
    return replace(found, task=replace(found.task, **about), files=files, json=folder / "report.json")


def colours(ax) -> list[list[str]]:
    """The class of each cell of a strip, by the colours of the legend."""
    names = {handle.get_color(): handle.get_label() for handle in ax.lines}
    image = ax.images[0].get_array()
    return [[next((name for colour, name in names.items() if np.allclose([*colour, 1], cell)), "") for cell in line]
            for line in image]  # fmt: skip


def test_the_strip_shows_the_protein_of_median_accuracy(tmp_path: Path) -> None:
    good, middle, bad = ("H" * 40, "H" * 40), ("E" * 20 + "C" * 20, "E" * 10 + "C" * 30), ("C" * 30, "H" * 30)
    short = ("E" * 5, "E" * 5)  # too short to be typical
    pairs = (bad, good, short, middle)
    truth, predicted = ("".join(texts) for texts in zip(*pairs, strict=True))
    found = strip_report(tmp_path, truth, predicted, [len(pair[0]) for pair in pairs])
    ax = strip_chart(found)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["measured", "predicted"]
    assert ["".join(line) for line in colours(ax)] == list(middle)
    assert "that with the median accuracy" in captions.strip(found)


def test_only_classes_per_residue_have_a_strip(tmp_path: Path) -> None:
    for task in ({"level": "protein"}, {"target": "value"}, {"labels": tuple("ACDEFGHIKLMNP")}):
        with refused("strip.task"):
            strip_chart(strip_report(tmp_path, "CE", "CE", [2], **task))


def predict_result(folder: Path, table: str, level: str, target: str, labels: list[str]) -> dict[str, object]:
    out, manifest = folder / "new.tsv", folder / "new.tsv.json"
    out.write_text(table)
    manifest.write_text(json.dumps({"level": level, "target": target, "labels": labels, "unit": "C"}))
    return {"out": out, "manifest": manifest, "num_proteins": 2, "verdict": "Predicted 2.", "warnings": ["Flat."]}


def test_new_predictions_are_plotted_by_their_kind(tmp_path: Path) -> None:
    values = predict_result(tmp_path, "id\tprediction\nNA\t1.5\n1\t2.5\n", "protein", "value", [])
    ax = new_prediction_chart(values)
    assert ax.get_xlabel() == "predicted value (C)"
    assert sum(bar.get_height() for bar in ax.patches) == 2
    assert captions.new_predictions(values) == "*Predictions for 2 proteins.* Predicted 2. Flat."
    classes = predict_result(tmp_path, "id\tprediction\nNA\t1\n1\t1\n2\t0\n", "protein", "class", ["0", "1", "2"])
    ax = new_prediction_chart(classes)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["1", "0", "2"]
    assert [bar.get_width() for bar in ax.patches] == [2, 1, 0]
    rows = "".join(f"NA\t{place + 1}\tA\t{letter}\n" for place, letter in enumerate("HHC"))
    residues = predict_result(tmp_path, f"id\tposition\tresidue\tprediction\n{rows}", "residue", "class", list("CEH"))
    ax = new_prediction_chart(residues)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["NA"]
    assert colours(ax) == [["H", "H", "C"]]
    labels = predict_result(tmp_path, "id\tprediction\nA\tx;y\nB\t\nC\ty\n", "protein", "class", ["x", "y", "z"])
    about = json.loads(labels["manifest"].read_text()) | {"threshold": 0.5}
    labels["manifest"].write_text(json.dumps(about))
    ax = new_prediction_chart(labels)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["y", "x", "z"]
    assert [bar.get_width() for bar in ax.patches] == [2, 1, 0]
    columns = predict_result(
        tmp_path, "id\tTm\tdG\nA\t1.5\t3\nB\t2.5\t4\nC\t2.5\t5\n", "protein", "value", ["Tm", "dG"]
    )
    figure = new_prediction_chart(columns).figure
    assert [ax.get_xlabel() for ax in figure.axes] == ["predicted Tm", "predicted dG"]
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == 3


@pytest.mark.parametrize(
    ("best", "losses", "text"),
    [
        (70, [0.9, 0.8, 0.88], "After that it rises by 10.0%."),
        (70, [0.9, 0.8, 0.80001], "After that it hardly changes."),
        (210, [0.9, 0.8], "That is the last validation."),
    ],
)
def test_the_caption_of_fine_tuning_names_the_saved_update(best: int, losses: list[float], text: str) -> None:
    caption = captions.finetuning_loss(210, best, losses)
    assert caption.startswith(f"*Loss over 210 updates.* The model of update {best} is saved")
    assert caption.endswith(text)


def test_layouts_without_a_difference_are_equal() -> None:
    assert "The two layouts differ by at most 9e-08 of the loss;" in captions.layouts(9e-8, 8)
    assert "The two layouts have equal losses, to the last bit;" in captions.layouts(0.0, 8)


def test_captions_of_the_training_set() -> None:
    fits = captions.training_lengths(np.array([50, 399]), 1022)
    assert fits == "*Lengths of the 2 training records.* The longest has 399 residues, so all fit into the window."
    assert "1 are longer than the window" in captions.training_lengths(np.array([50, 1023]), 1022)
    assert "75% of them have one member, but only 30% of the records" in captions.cluster_sizes(np.array([1, 1, 1, 7]))
    shares = dict.fromkeys("ACDEFGHIKLMNPQRSTVWY", 0.05) | {"L": 0.1, "W": 0.01}
    assert "L is 10 times as frequent as W" in captions.residue_shares(shares, 3)
    none = captions.residue_shares(shares | {"W": 0.0}, 3)
    assert none.endswith("all twenty would be equally common; L is the most frequent, and W does not occur.")


def test_the_caption_of_a_confusion_names_the_best_and_the_worst_class(tmp_path: Path) -> None:
    found = strip_report(tmp_path, "C", "C", [1])
    recalls = {"C": {"recall": 0.7, "support": 3}, "E": {"recall": 0.5, "support": 2}, "H": {"recall": 0, "support": 0}}
    found = replace(found, rows=[replace(found.first, per_class=recalls)])
    text = captions.held_out(found)
    assert text.endswith("Of the class C, 70% are predicted correctly, of the class E 50%.")
    values = replace(found, task=replace(found.task, target="value"), warnings=("The predictions have collapsed.",))
    assert captions.held_out(values).endswith("(first seed). The predictions have collapsed.")
