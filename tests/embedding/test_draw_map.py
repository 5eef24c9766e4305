"""`esm2kit map`: a picture and a table of proteins, coloured by a measurement, from a FASTA and a table."""

import csv
import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit import EmbeddingReader, MapConfig, draw_map
from esm2kit.cli.main import summarise

MODEL = "tiny.safetensors"
GENERATOR = np.random.default_rng(5)
SEQUENCES = {f"P690{row:02d}": "".join(GENERATOR.choice(list("ACDEFGHIKLMNPQRSTVWY"), 20 + row)) for row in range(12)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [f">sp|{name}|X_{name} protein OS={'yeast' if number % 2 else 'human'}\n{sequence}\n"
             for number, (name, sequence) in enumerate(SEQUENCES.items())]  # fmt: skip
    (tmp_path / "my.fasta").write_text("".join(lines), encoding="utf-8")
    rows = [f"{name};{40 + number / 4:.2f}".replace(".", ",") for number, name in enumerate(SEQUENCES) if number != 3]
    (tmp_path / "measured.csv").write_text("Protein;Tm (C)\n" + "\n".join(reversed(rows)) + "\n", encoding="utf-8")
    write_tiny_model(tmp_path / MODEL)
    return tmp_path


def test_map_of_a_table(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "esm2kit")
    config = MapConfig(folder / "my.fasta", str(folder / MODEL), folder / "measured.csv", out_dir=folder / "out")
    made = draw_map(config)
    assert made["map"] == folder / "out" / "my_map.svg"
    assert (made["colour_by"], made["num_proteins"]) == ("Tm (C)", 12)
    assert set(made["files"]) == {path for path in (folder / "out").iterdir() if path.suffix != ".json"}
    assert summarise(made, on_terminal=True).splitlines()[-1] == f"map: {made['map']}"
    with open(made["table"], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"sp|{name}|X_{name}" for name in SEQUENCES]
    assert [float(row["Tm (C)"]) for row in rows[:3]] == [40.0, 40.25, 40.5]
    assert rows[3]["Tm (C)"] == "nan", "this protein was not measured"
    with EmbeddingReader(made["embeddings"]) as reader:
        expected_P2 = PCA(2, svd_solver="full").fit_transform(reader.matrix())
    found_P2 = np.array([[float(row["x"]), float(row["y"])] for row in rows])
    np.testing.assert_allclose(np.abs(found_P2), np.abs(expected_P2), rtol=1e-3, atol=1e-5)  # a component has no sign
    page = made["page"].read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert '"sp|P69000|X_P69000"' in page
    assert '"40.25"' in page
    picture = made["map"].read_bytes()
    groups = re.findall(rb'<g id="PathCollection_\d+">(.*?)\n   </g>', picture, re.DOTALL)
    assert {1, 11} <= {group.count(b"<use ") for group in groups}, "points without and with a measurement"
    assert picture.count(b"<image") == 1, "the colour bar"
    again = draw_map(replace(config, colour_by="tm"))
    assert again["colour_by"] == "Tm (C)", "a column may be named without its unit"
    assert again["map"].read_bytes() == picture, "the same answer twice"
    assert "my_map.svg already exists and will be replaced" in caplog.text
    with refused("map.field", name="Tm (K)"):
        draw_map(replace(config, colour_by="Tm (K)"))


def test_map_of_a_proteingym_assay(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The sequences of other projects' tables are in a column; their targets colour the map."""
    caplog.set_level(logging.INFO, "esm2kit")
    rows = [
        f"A{place + 1}C,{sequence},{place / 4},{int(place > 5)}" for place, sequence in enumerate(SEQUENCES.values())
    ]
    table = folder / "ASSAY.csv"
    table.write_text("mutant,mutated_sequence,DMS_score,DMS_score_bin\n" + "\n".join(rows) + "\n", encoding="utf-8")
    made = draw_map(MapConfig(table, str(folder / MODEL), out_dir=folder / "out"))
    assert (
        "ASSAY.csv: read as a ProteinGym assay: sequences from mutated_sequence, targets from DMS_score" in caplog.text
    )
    assert (made["colour_by"], made["num_proteins"], made["map"].name) == ("DMS_score", 12, "ASSAY_map.svg")
    assert set(made["files"]) == {path for path in (folder / "out").iterdir() if path.suffix != ".json"}
    with open(made["table"], encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [row["id"] for row in found] == [f"A{place + 1}C" for place in range(12)]
    assert [float(row["DMS_score"]) for row in found] == [place / 4 for place in range(12)]
    with EmbeddingReader(made["embeddings"]) as reader:
        assert reader.find_proteins(
            [row["id"] for row in found], list(SEQUENCES.values()), same_input=True
        ).tolist() == [*range(12)]
    assert draw_map(MapConfig(table, str(folder / MODEL), colour_by="DMS_score_bin", out_dir=folder / "out"))["files"]
    table.write_text("Drug_ID,Drug,Y\nd1,CCO,1\nd2,CCN,2\n", encoding="utf-8")
    with refused("task.unread-kind"):
        draw_map(MapConfig(table, str(folder / MODEL), out_dir=folder / "none"))
    assert not (folder / "none").exists()


def test_fields_of_headers_and_formats(folder: Path) -> None:
    common = {"fasta": folder / "my.fasta", "model": str(folder / MODEL), "out_dir": folder / "out"}
    assert draw_map(MapConfig(**common, format="png", method="tsne"))["colour_by"] == "OS"
    assert (folder / "out" / "my_map.png").read_bytes()[:4] == b"\x89PNG"
    assert draw_map(MapConfig(**common, colour_by="residues", format="pdf"))["colour_by"] == "residues"
    with refused("map.field", name="pH"):
        draw_map(MapConfig(**common, colour_by="pH", labels=folder / "measured.csv"))
    with refused("labels.no-id"):
        draw_map(MapConfig(**common, id="Tm (C)", labels=folder / "measured.csv"))
    (folder / "three.fasta").write_text(">a\nMKT\n>b\nMKV\n>c\nMKL\n", encoding="utf-8")
    with refused("map.too-few", found=3):
        draw_map(MapConfig(folder / "three.fasta", str(folder / MODEL), out_dir=folder / "none"))
    assert not (folder / "none").exists(), "refused before anything was written"


def test_the_command(folder: Path) -> None:
    command = [sys.executable, "-m", "esm2kit", "map", "my.fasta", "--labels", "measured.csv", "--model",
               MODEL, "-o", "out"]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=True)
    assert json.loads(done.stdout)["map"] == "out/my_map.svg"
    assert "measured.csv: column 'Protein' names 11 of 12 proteins" in done.stderr
    assert "12 proteins by PCA, coloured by Tm (C)." in done.stderr
