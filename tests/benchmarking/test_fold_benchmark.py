"""`benchmark --folds` from a table to the report: files, resuming, comparison, checks and predictions."""

import csv
import dataclasses
import json
import math
from html import escape
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import norm, spearmanr, t
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit.benchmarking import cross_validation, layer_sweep
from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.compare import check_report, compare
from esm2kit.benchmarking.config import BenchmarkConfig, CompareConfig
from esm2kit.benchmarking.fold_page import build_fold_section
from esm2kit.benchmarking.fold_summary import FoldSummary
from esm2kit.benchmarking.report import Report
from esm2kit.cli.main import main
from esm2kit.core.files import to_json
from esm2kit.finetuning.config import PredictConfig
from esm2kit.finetuning.predict import predict

LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a small model, and a table of 60 proteins in 20 families whose value is the share of tryptophan."""
    folder, generator = tmp_path_factory.mktemp("folds"), np.random.default_rng(0)
    write_tiny_model(folder / "model.safetensors")
    lines = ["id,sequence,family,Tm (C),fold"]
    for number in range(60):
        if number % 3 == 0:
            ancestor = generator.choice(LETTERS, 60)
            ancestor[generator.random(60) < generator.random() / 2] = "W"
        member = np.where(generator.random(60) < 0.1, generator.choice(LETTERS, 60), ancestor)
        value = (member == "W").mean() * 20 + 40 + generator.normal() / 10
        lines.append(f"p{number},{''.join(member)},f{number // 3},{value:.3f},{number // 3 % 4}")
    (folder / "mine.csv").write_text("\n".join(lines) + "\n")
    return folder


def run(folder, out, **options) -> Report:
    """Run a benchmark by cross-validation."""
    chosen = {"folds": 4, "seeds": [0], "resamples": 100, "device": "cpu", "baselines": ["mean", "composition"]}
    chosen |= {"labels": folder / "mine.csv", "target": "Tm", "model": str(folder / "model.safetensors")}
    return benchmark(BenchmarkConfig(out_dir=out, **chosen | options))


@pytest.fixture(scope="module")
def report(folder, tmp_path_factory):
    """Run two repeats of four folds."""
    return run(folder, tmp_path_factory.mktemp("out"), repeats=2, group_by="family")


def read_table(report: Report) -> list[dict[str, str]]:
    """Read predictions.csv."""
    with open(report.json.with_name(report.files["table"]), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_report_has_the_folds_and_is_read_as_it_was_written(report):
    assert to_json(Report.read(report.json)) == to_json(report)
    folds = report.folds
    assert (folds.num_folds, folds.repeats, folds.num_groups) == (4, 2, 20)
    assert folds.method == "4 folds of whole groups; groups: column family"
    assert folds.widening == pytest.approx(math.sqrt(1 + 4 / 3))
    assert folds.expansion == pytest.approx(math.sqrt(20 / 19) * t.ppf(0.975, 19) / norm.ppf(0.975))
    assert [fold.test for fold in folds.folds] == [15] * 8
    assert all(fold.train + fold.validation == 45 and fold.validation >= 6 for fold in folds.folds)
    assert report.task.sizes == {"train": 0, "validation": 0, "test": 60}
    assert report.task.split == "4_folds_2_repeats"
    assert [row.kind for row in report.rows] == ["probe", "untrained", "baseline", "baseline"]
    assert all(len(row.folds) == 8 for row in report.rows)
    assert report.settings.folds == 4
    assert report.settings.group_by == "family"
    assert all(path.is_file() for path in report.paths)


def test_the_table_and_the_scores_agree(report):
    rows = read_table(report)
    assert len(rows) == 120
    for name in ("id", "group", "fold"):
        assert len({(row["repeat"], row["id"], row[name]) for row in rows}) == 120
    by_family = {(row["repeat"], int(row["id"][1:]) // 3): set() for row in rows}
    for row in rows:
        by_family[row["repeat"], int(row["id"][1:]) // 3].add(row["fold"])
    assert all(len(folds) == 1 for folds in by_family.values())
    for found in report.rows[:1]:
        expected = []
        for repeat in ("1", "2"):
            for fold in "1234":
                chosen = [row for row in rows if (row["repeat"], row["fold"]) == (repeat, fold)]
                values = np.array([[float(row["measured"]), float(row[found.name])] for row in chosen])
                expected.append(spearmanr(*values.T).statistic)
        assert found.folds == pytest.approx(expected, abs=1e-6)
        assert found.metrics["spearman"].value == pytest.approx(np.mean(expected), abs=1e-6)
        assert found.metrics["spearman"].low < found.metrics["spearman"].value < found.metrics["spearman"].high
    composition = next(row for row in report.rows if row.name == "composition")
    assert composition.metrics["spearman"].low > 0.5  # it knows the share of tryptophan
    mean = next(row for row in report.rows if row.name == "mean")
    assert mean.metrics["spearman"].value is None
    assert next(pair for pair in report.comparisons if pair.theirs == "mean").metric == "rmse"


def test_the_page_describes_the_folds(report):
    page = report.html.read_text(encoding="utf-8")
    for text in (
        "cross-validation", "60 proteins in 4 folds of 15, divided 2 times", "None of the 20 groups (column family)",
        "Cross-validated Spearman", "fitted on all proteins", "by a factor of 1.10 for 20 groups (Hesterberg 2015).",
    ):  # fmt: skip
        assert text in page
    assert "Test Spearman" not in page


def test_the_folds_of_an_earlier_report_have_no_factor_for_few_groups(report):
    found = json.loads(report.json.read_bytes())["folds"]
    del found["expansion"]
    earlier = FoldSummary.parse(found)
    assert earlier == dataclasses.replace(report.folds, expansion=1.0)
    text = build_fold_section(dataclasses.replace(report, folds=earlier))["text"]
    assert "(Nadeau and Bengio 2003)." in text
    assert "Hesterberg" not in text


def test_an_interrupted_run_fits_only_what_is_missing(folder, report, monkeypatch, tmp_path):
    out = report.json.parent
    before = report.json.read_bytes()
    monkeypatch.setattr(cross_validation, "fit_probe_folds", None)
    monkeypatch.setattr(cross_validation, "fit_baseline", None)
    again = run(folder, out, repeats=2, group_by="family")
    assert json.loads(before)["rows"] == json.loads(again.json.read_bytes())["rows"]
    with pytest.raises(TypeError):  # other folds are fitted
        run(folder, out, repeats=1, group_by="family")


def test_a_finished_row_is_kept_when_the_next_one_fails(folder, monkeypatch, tmp_path):
    original = cross_validation.fit_baseline
    monkeypatch.setattr(cross_validation, "fit_baseline", None)
    with pytest.raises(TypeError):
        run(folder, tmp_path)
    monkeypatch.setattr(cross_validation, "fit_baseline", original)
    monkeypatch.setattr(cross_validation, "fit_probe_folds", None)
    assert len(run(folder, tmp_path).rows) == 4


def test_clusters_and_columns_of_folds(folder, tmp_path):
    clusters = run(folder, tmp_path / "clusters", baselines=["mean"], untrained=False)
    assert "groups of " in clusters.folds.method
    assert clusters.folds.num_groups <= 20  # two families may be similar
    folds_of = {}
    for row in read_table(clusters):
        folds_of.setdefault(int(row["id"][1:]) // 3, set()).add(row["fold"])
    assert [len(found) for found in folds_of.values()] == [1] * 20
    column = run(folder, tmp_path / "column", folds="fold", baselines=["mean"], untrained=False)
    assert [fold.name for fold in column.folds.folds] == ["0", "1", "2", "3"]
    for row in read_table(column):
        assert int(row["fold"]) == int(row["id"][1:]) // 3 % 4


def test_layers_are_chosen_in_each_fold(folder, tmp_path):
    found = run(folder, tmp_path, repr_layer="0,1,2", baselines=["mean"])
    chosen = [fold.selected for fold in found.folds.folds]
    assert set(chosen) <= {"layer 0, mean", "layer 1, mean", "layer 2, mean"}
    most = max(sorted(set(chosen)), key=chosen.count)
    assert f"on {most.partition(',')[0]} of" in found.first.note
    assert found.first.selected["candidate"] == [int(text[6]) for text in chosen]
    assert "chosen on validation" in found.html.read_text(encoding="utf-8")
    assert "layer 0, mean" in found.html.read_text(encoding="utf-8")


def test_other_candidates_are_chosen_again(folder, monkeypatch, tmp_path):
    """A row is computed again for other candidates or another order, also if the folder of the vectors is the same."""
    original = layer_sweep.embed_task

    def embed_every_layer(data, model, layers, poolings, out_dir, *rest):
        files = original(data, model, [0, 1, 2], poolings, out_dir, *rest)
        return {place: path for place, path in files.items() if place[0] in layers}

    monkeypatch.setattr(layer_sweep, "embed_task", embed_every_layer)
    options = {"baselines": [], "untrained": False}
    runs = [run(folder, tmp_path, repr_layer=layers, **options) for layers in ("0,1", "1,0", "1,2", "1,2")]
    for report, layers in zip(runs, [(0, 1), (1, 0), (1, 2), (1, 2)], strict=True):
        own = [f"layer {layers[place]}, mean" for place in report.first.selected["candidate"]]
        assert [fold.selected for fold in report.folds.folds] == own
    assert len({fold.selected for fold in runs[0].folds.folds}) == 2, "both are chosen, so that the order matters"
    assert runs[2].first.metrics != runs[0].first.metrics
    assert runs[3].first.seconds == runs[2].first.seconds, "the same candidates are not fitted again"
    chosen = [[fold.selected for fold in report.folds.folds] for report in runs]
    moved = sum(one != other for one, other in pairwise(chosen))
    assert len(list(tmp_path.glob("earlier/*/report.json"))) == moved >= 1, "a report of other choices is kept"


def test_a_note_on_equal_replicates_counts_groups(folder, tmp_path):
    """Two kinds that composition separates: all 24 predictions are right, and 12 families are resampled."""
    generator, lines = np.random.default_rng(1), ["id,sequence,family,kind"]
    for number in range(24):
        letters = "".join(generator.choice(LETTERS, 20)) + "WK"[number // 2 % 2] * 20
        lines.append(f"p{number},{letters},f{number // 2},{'ab'[number // 2 % 2]}")
    (tmp_path / "kinds.csv").write_text("\n".join(lines) + "\n")
    options = {"labels": tmp_path / "kinds.csv", "target": "kind", "group_by": "family", "untrained": False}
    report = run(folder, tmp_path / "out", baselines=["composition"], **options)
    (note,) = (note for note in report.notes if note.startswith("Every bootstrap replicate"))
    assert note.startswith("Every bootstrap replicate of the 12 groups of proteins gives the same accuracy (")
    assert report.first.metrics["accuracy"].low == pytest.approx(0.05 ** (1 / 12))


def test_reports_with_equal_groups_are_compared_in_pairs(folder, report, tmp_path):
    other = run(folder, tmp_path / "other", repeats=2, group_by="family", repr_layer=0, untrained=False)
    found = compare(CompareConfig([report.json, other.json], tmp_path / "pair"))
    assert len(found.pairs) == 1
    assert found.pairs[0].comparison.difference == pytest.approx(
        report.headline(report.first).value - other.headline(other.first).value
    )
    # other groups are resampled in another way, and a plain report has other proteins
    plain = run(folder, tmp_path / "plain", folds=None, untrained=False)
    clusters = run(folder, tmp_path / "sequences", split_by="random", untrained=False)
    found = compare(CompareConfig([report.json, plain.json, clusters.json], tmp_path / "all"))
    assert not found.pairs
    assert "4_folds_2_repeats" in found.html.read_text(encoding="utf-8")


def test_check_finds_damage(folder, tmp_path):
    found = run(folder, tmp_path, baselines=["mean"], untrained=False)
    check_report(found.json)
    table = found.json.with_name("predictions.csv")
    text = table.read_text(encoding="utf-8")
    table.write_text(text.replace("p7,", "p8,", 1), encoding="utf-8")
    with refused("file.damaged", path=table):
        check_report(found.json)
    table.unlink()
    with refused("file.damaged", path=table):
        check_report(found.json)
    assert main(["check", str(tmp_path)]) != 0


def test_predict_uses_the_final_probe(report, tmp_path):
    fasta = tmp_path / "new.fasta"
    sequences = ["W" * 30 + "A" * 30, "A" * 60]
    fasta.write_text("".join(f">n{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    best = report.best_predictor
    assert best.name == "composition"
    out = tmp_path / "new.csv"
    said = predict(PredictConfig(model=report.json.parent, fasta=fasta, out=out, device="cpu"))["uncertainty"]
    assert "90% of new values on average, for proteins like the 60 proteins of the cross-validation" in said
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values, widths = zip(
        *((float(row["prediction"]), float(row["upper"]) - float(row["lower"])) for row in rows), strict=True
    )
    assert values[0] > values[1]
    # the intervals come from the out-of-fold errors: one that contains 90% of 60 proteins
    first = [row for row in read_table(report) if row["repeat"] == "1"]
    errors = sorted(abs(float(row["measured"]) - float(row["composition"])) for row in first)
    assert widths == pytest.approx([2 * errors[54]] * 2, rel=1e-3)
    assert widths == pytest.approx([2 * best.uncertainty["quantile"]] * 2, rel=1e-5)  # those of the report


def test_the_page_shows_how_sure_the_predictions_are(folder, report):
    page = report.html.read_text(encoding="utf-8")
    assert "How sure are the predictions?" in page
    assert escape(report.first.uncertainty["sentence"]) in page
    assert "on test" not in report.first.uncertainty["sentence"]
    assert "found out of fold" in page
    assert {row.uncertainty["out_of_fold"] for row in report.rows} == {True}
    lines = (folder / "mine.csv").read_text(encoding="utf-8").splitlines()
    values = [float(line.split(",")[3]) for line in lines[1:]]
    kinds = [
        f"{line},{'hot' if value > np.median(values) else 'cold'}"
        for line, value in zip(lines[1:], values, strict=True)
    ]
    table = folder / "kinds.csv"
    table.write_text("\n".join([f"{lines[0]},kind", *kinds]) + "\n", encoding="utf-8")
    out = folder / "kinds"
    options = {"labels": table, "target": "kind", "baselines": ["majority"], "untrained": False, "group_by": "family"}
    found = run(folder, out, **options)
    page = found.html.read_text(encoding="utf-8")
    assert escape(found.first.uncertainty["sentence"]) in page
    assert "Reliability of the logistic probe on the frozen encoder out of fold" in page
    assert found.first.uncertainty["num_validation"] == 60
    # a run that resumes has the same section without a fit
    assert to_json(run(folder, out, **options).rows) == to_json(found.rows)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"folds": None, "repeats": 3}, "option.folds"),
        ({"folds": None, "group_by": "cluster"}, "option.folds"),
        ({"folds": "fold", "repeats": 3}, "option.folds"),
        ({"folds": 1}, "option.range"),
        ({"folds": 3, "repeats": 0}, "option.range"),
        ({"folds": 61}, "folds.too-few-groups"),
        ({"folds": 21, "group_by": "cluster"}, "folds.too-few-groups"),
        ({"folds": 4, "group_by": "plate"}, "table.no-column"),
        ({"folds": "plate"}, "table.no-column"),
    ],
)
def test_options_that_do_not_fit(folder, tmp_path, options, code):
    with refused(code):
        run(folder, tmp_path, **options)


def test_settings_of_earlier_reports_have_no_folds():
    fields = {field.name: field.default for field in dataclasses.fields(Report)}
    assert fields["folds"] is None
