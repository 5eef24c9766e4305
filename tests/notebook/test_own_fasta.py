"""Notebook 03 with its defaults on FASTA files as people have them, executed headless."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.notebook.runs.manifest import read_manifest
from esm2kit.notebook.runs.run import RunConfig, run
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = np.random.default_rng(0)


@pytest.fixture(scope="module")
def clone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone after `make walkthrough`: a finished run with a model, and no work folder."""
    root = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (root / "data").symlink_to(ROOT / "data")
    walked = root / "papermill_runs" / "sample-20260101-000000"
    shape = {"model": "custom", "num_layers": 1, "embed_dim": 16, "attention_heads": 2, "accelerator": "cpu"}
    batch = {"max_steps": 2, "warmup_steps": 1, "val_check_interval": 2, "global_batch_size": 2}
    pretrain(PretrainConfig(dataset, out_dir=walked / "artefacts" / "pretrain", **shape, **batch))
    entry = {"status": "done", "seconds": 1.0, "parameters": {}, "figures": {}}
    manifest = {"tier": "sample", "created": "2026-01-01T00:00:00+00:00", "notebooks": {"02_pretrain": entry}}
    (walked / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return root


def embed(clone: Path, tier: str, monkeypatch: pytest.MonkeyPatch, **parameters: str) -> tuple[Path, list[str]]:
    """Run notebook 03 without network; returns the folder of the run and the captions of its figures."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(clone / "hub"))
    path = clone / "papermill_runs" / f"{tier}.yaml"
    path.write_text(yaml.safe_dump({"03_embed": parameters}), encoding="utf-8")
    run(RunConfig(tier=tier, root=clone))
    folder = next((clone / "papermill_runs").glob(f"{tier}-*"))
    cells = json.loads((folder / "03_embed.ipynb").read_text(encoding="utf-8"))["cells"]
    data = [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]
    return folder, ["".join(each["text/markdown"]) for each in data if "text/markdown" in each]


def write_fasta(path: Path, lengths: list[int], header: str = "{id}") -> Path:
    path.parent.mkdir(exist_ok=True)
    letters: Any = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    sequences = ["".join(GENERATOR.choice(letters, length)) for length in lengths]
    path.write_text(
        "".join(f">{header.format(id=f'P{100 + n}')}\n{sequence}\n" for n, sequence in enumerate(sequences)),
        encoding="utf-8",
    )
    return path


def test_a_fasta_without_fields_and_the_model_of_the_walkthrough(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No parameter but the path: the model is that of the newest run, the map is coloured by length."""
    fasta = write_fasta(clone / "lab" / "enzymes.fasta", list(range(20, 44, 2)))
    folder, captions = embed(clone, "plain", monkeypatch, fasta=str(fasta))
    assert any("12 proteins by t-SNE, coloured by length in residues." in caption for caption in captions)
    assert any("on the same side of the median length in residues" in caption for caption in captions)
    made = folder / "artefacts" / "embeddings"
    with EmbeddingReader(made / "enzymes_trained_here_embeddings.h5") as reader:
        assert reader.matrix().shape == (12, 16)
    assert read_manifest(folder).notebooks["03_embed"].result == "12 proteins embedded by the model trained here."


def test_a_table_of_measurements_colours_the_map(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fasta = write_fasta(clone / "lab" / "measured.fasta", [30] * 12, "sp|{id}|{id}_HUMAN Enzyme {id} OS=Homo sapiens")
    rows = "".join(f"P{100 + number};{40 + number / 4:.2f}\n".replace(".", ",") for number in range(11))
    (clone / "lab" / "tm.csv").write_text(f"Protein;Tm (C)\n{rows}", encoding="utf-8")
    _, captions = embed(clone, "table", monkeypatch, fasta=str(fasta), labels=str(clone / "lab" / "tm.csv"))
    assert any("coloured by Tm (C)." in caption for caption in captions)
    assert any("(the star; Tm (C): 40)" in caption for caption in captions)


def test_two_peptides_too_few_for_a_map_and_too_short_for_contacts(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta = write_fasta(clone / "lab" / "peptides.fasta", [5, 6])
    folder, captions = embed(clone, "peptides", monkeypatch, fasta=str(fasta))
    page = (folder / "03_embed.html").read_text(encoding="utf-8")
    assert "a map requires at least 4 proteins, found 2" in page
    assert "a pair map requires at least 8 residues, found 5" in page
    assert any(caption.startswith("*The 16 channels that vary most along P100.*") for caption in captions)
