"""A biologist's first ten minutes: a FASTA and a table of measurements, four commands, and predictions to trust."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from support.finetune_fixtures import write_tiny_model
from support.measurements import write_measurements


def run(folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    """Run a command as a user types it; returns its result and its log."""
    done = subprocess.run(
        [sys.executable, "-m", "esm2kit", *words], cwd=folder, capture_output=True, encoding="utf-8", check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_fasta_and_table_to_vectors_map_benchmark_and_predictions(tmp_path: Path) -> None:
    made = write_measurements(tmp_path)
    model = write_tiny_model(tmp_path / "model.safetensors").name

    result, _ = run(tmp_path, "embed", "my.fasta", "--model", model, "-o", "vectors")
    assert (tmp_path / result["embeddings"]).stat().st_size > 0

    result, log = run(tmp_path, "map", "my.fasta", "--labels", "measurements.csv", "--model", model, "-o", "vectors")
    rows = read(tmp_path / result["table"])
    assert {row["id"]: float(row["Tm (C)"]) for row in rows} == dict(list(made.values.items())[:120])
    assert "embedded" not in log, "the vectors of the first command are used"

    data = ("--fasta", "my.fasta", "--labels", "measurements.csv", "--target", "Tm (C)")
    result, log = run(tmp_path, "benchmark", *data, "--model", model, "-o", "bench", "--seeds", "0", "1")
    assert "120 of 120 proteins of my.fasta joined" in log
    verdict = log.strip().splitlines()[-1]
    assert verdict.startswith("Predicts better than the mean of train (R² 0.9"), "the verdict is the last line"
    assert verdict.endswith("but no better than amino-acid composition."), "which is what was planted"
    assert {row["set"] for row in read(tmp_path / "bench" / "split.csv")} == {"train", "validation", "test"}

    result, log = run(tmp_path, "predict", "new.fasta", "--model", "bench", "-o", "predictions.csv")
    assert result["num_proteins"] == 30
    predicted = {row["id"]: float(row["prediction"]) for row in read(tmp_path / "predictions.csv")}
    measured = {name: value for name, value in made.values.items() if name in predicted}
    correlation = spearmanr([predicted[name] for name in measured], list(measured.values())).statistic
    assert correlation > 0.8, correlation
    assert np.std(list(predicted.values())) > 0.5 * np.std(list(measured.values())), "predictions have not collapsed"
    plots = [path for path in result["files"] if path.endswith((".svg", ".png"))]
    assert plots
    assert all((tmp_path / path).stat().st_size > 1000 for path in plots)
