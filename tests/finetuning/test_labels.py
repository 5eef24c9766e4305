"""A FASTA and a table of measurements in the stages: reports, sets, resuming, and several targets."""

import csv
import json
import shutil

import pytest
from support.errors import refused
from support.finetune_fixtures import write_tiny_model
from support.measurements import write_measurements

from esm2kit import BenchmarkConfig, FinetuneConfig, Report, benchmark, finetune
from esm2kit.core.files import sha256_file

QUICK = {"baselines": [], "untrained": False, "resamples": 100, "seeds": [0]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = write_measurements(tmp_path / "in", proteins=60, new=0)
    lines = found.labels.read_text().splitlines()
    lines = [f"{line},{'dG [kJ/mol]' if not n else n % 7 + n / 100}" for n, line in enumerate(lines)]
    found.labels.write_text("\n".join(lines) + "\n")
    write_tiny_model(tmp_path / "tiny.safetensors")
    return found


def test_one_report_per_target_and_a_comparison(files, tmp_path, caplog):
    caplog.set_level("DEBUG")
    given = {"labels": files.labels, "fasta": files.fasta, "model": str(tmp_path / "tiny.safetensors"), **QUICK}
    with refused("labels.which-target", allowed=("Tm (C)", "dG [kJ/mol]")):
        benchmark(BenchmarkConfig(**given, out_dir=tmp_path / "out"))
    found = benchmark(BenchmarkConfig(**given, target=["Tm (C)", "dG"], out_dir=tmp_path / "out"))
    assert found.html.is_file()
    reports = [Report.read(tmp_path / "out" / name) for name in ("Tm", "dG")]
    assert [report.task.name for report in reports] == ["measurements_Tm", "measurements_dG"]
    assert [report.task.unit for report in reports] == ["C", "kJ/mol"]
    for report in reports:
        inputs = report.provenance["inputs"]
        assert inputs["task/labels"] == {"path": str(files.labels), "sha256": sha256_file(files.labels)}
        assert inputs["task/fasta"]["sha256"] == sha256_file(files.fasta)
        assert report.notes[0].startswith("measurements.csv: id column 'Protein', target ")
        assert "groups of at least 50% identity by shared 4-mers and alignments (seed 0)" in report.notes[1]
        assert report.task.sizes == {"train": 48, "validation": 6, "test": 6}
    with open(tmp_path / "out" / "Tm" / "split.csv", encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    assert {row["id"]: float(row["target"]) for row in rows} == files.values
    assert sum(row["set"] == "test" for row in rows) == 6
    caplog.clear()
    config = BenchmarkConfig(**given, target="Tm (C)", out_dir=tmp_path / "out" / "Tm")
    assert tmp_path / "out" / "Tm" / "split.csv" in benchmark(config).paths
    assert "loaded from an earlier run" in caplog.text
    task = BenchmarkConfig(**(given | {"labels": None, "fasta": None}), task=str(tmp_path / "out/Tm/split.csv"))
    again = benchmark(task.__class__(**(vars(task) | {"out_dir": tmp_path / "again"})))
    assert again.rows[0].metrics["spearman"].value == reports[0].rows[0].metrics["spearman"].value


def test_a_report_with_other_sets_moves_the_earlier_one_and_its_split(files, tmp_path):
    given = {"labels": files.labels, "fasta": files.fasta, "target": "dG", "out_dir": tmp_path / "out", **QUICK}
    given |= {"model": str(tmp_path / "tiny.safetensors")}
    first = benchmark(BenchmarkConfig(**given))
    split = (tmp_path / "out" / "split.csv").read_bytes()
    benchmark(BenchmarkConfig(**given))
    assert not (tmp_path / "out" / "earlier").exists()
    second = benchmark(BenchmarkConfig(**given, split_seed=1))
    assert (tmp_path / "out" / "earlier" / "1" / "split.csv").read_bytes() == split
    assert (tmp_path / "out" / "split.csv").read_bytes() != split
    assert Report.read(tmp_path / "out" / "earlier" / "1").notes == first.notes != second.notes


def test_finetuning_on_a_table_records_where_the_labels_are_from(files, tmp_path):
    given = {"fasta": files.fasta, "labels": files.labels, "target": "Tm (C)", "out_dir": tmp_path / "tuned"}
    given |= {"model": str(tmp_path / "tiny.safetensors"), "mode": "frozen", "max_steps": 4, "benchmark": False}
    assert finetune(FinetuneConfig(**given))["files"].count(str(tmp_path / "tuned" / "split.csv")) == 1
    inputs = json.loads((tmp_path / "tuned" / "finetune.json").read_text())["provenance"]["inputs"]
    assert inputs["task/labels"]["sha256"] == sha256_file(files.labels)
    assert (tmp_path / "tuned" / "split.csv").is_file()
    with refused("resume.another-run") as caught:
        finetune(FinetuneConfig(**given, split_seed=1))
    assert "split_seed was 0 and is now 1" in str(caught.value)
    files.labels.write_text(files.labels.read_text().replace("P001,", "P001,1"))
    with refused("resume.another-run") as caught:
        finetune(FinetuneConfig(**given))
    assert "the data's sha256" in str(caught.value)
