"""The form for Google Colab, with a stand-in for `google.colab`: vectors, map and tables of an upload or a sequence."""

import csv
import json
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit import EmbedConfig, EmbeddingReader, embed
from esm2kit.notebook.colab import embed_form, format_pasted
from esm2kit.sequences.fasta import read_fasta

FASTA = "".join(
    f">p{number} OS={'Homo sapiens' if number < 3 else 'Mus musculus'} GN=G{number}\nMKTAYIAKQR{letter}\n"
    for number, letter in enumerate("ACDEFG")
)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_tiny_model(tmp_path / "model.safetensors"))


@pytest.fixture
def colab(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Colab's module `files`: `upload` returns the given files, `download` records its path."""
    state = types.SimpleNamespace(uploads={}, downloads=[])
    package, module, files = (types.ModuleType(name) for name in ("google", "google.colab", "google.colab.files"))
    files.upload, files.download = lambda: state.uploads, state.downloads.append
    package.colab, module.files = module, files
    for each in (package, module, files):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return state


def read_rows(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_an_uploaded_fasta_becomes_vectors_a_map_and_tables(
    colab: types.SimpleNamespace, model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    colab.uploads = {"my liver:1.fasta": FASTA.encode()}
    folder = embed_form("", model, out_dir=tmp_path / "out")
    (tmp_path / "same.fasta").write_text(FASTA)
    expected = EmbeddingReader(embed(EmbedConfig(tmp_path / "same.fasta", out_dir=tmp_path, model=model)).embeddings)
    header, *rows = read_rows(folder / "my liver-1_vectors.csv")
    assert header[:3] == ["id", "residues", "v1"]
    assert [row[:2] for row in rows] == [[f"p{number}", "11"] for number in range(6)]
    assert (np.array([row[2:] for row in rows], dtype=np.float32) == expected.matrix()).all(), "every digit is there"
    header, *rows = read_rows(folder / "my liver-1_map.csv")
    assert header == ["id", "x", "y", "OS"]
    assert [row[0] for row in rows] == list(expected.ids)
    xy = np.array([row[1:3] for row in rows], dtype=float)
    centred = expected.matrix() - expected.matrix().mean(0)
    assert np.allclose(
        np.abs(xy[:, 0]), np.abs(np.linalg.svd(centred)[0][:, 0] * np.linalg.svd(centred)[1][0]), atol=1e-4
    )
    assert (folder / "my liver-1_map.png").read_bytes().startswith(b"\x89PNG")
    (packed,) = colab.downloads
    assert Path(packed) == folder / "my liver-1_esm2kit.zip"
    names = [f"my liver-1_{name}" for name in ("embeddings.h5", "map.csv", "map.png", "vectors.csv")]
    assert zipfile.ZipFile(packed).namelist() == names
    assert "6 proteins, 66 residues" in capsys.readouterr().out


def test_inputs_and_models_do_not_replace_each_other(colab: types.SimpleNamespace, model: str, tmp_path: Path) -> None:
    colab.uploads = {"my.fasta": FASTA.encode()}
    first = embed_form("", model, "GN", tmp_path)
    before = (first / "my_vectors.csv").read_bytes()
    assert read_rows(first / "my_map.csv")[0][-1] == "GN"
    colab.uploads = {"my.fasta": FASTA.replace("MKT", "MKV").encode()}
    assert embed_form("", model, "", tmp_path) != first
    assert (first / "my_vectors.csv").read_bytes() == before


def test_a_pasted_sequence_has_vectors_but_no_map(model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = embed_form(" mktayiakqr\n", model, out_dir=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "pasted.fasta", "pasted_embeddings.h5", "pasted_esm2kit.zip", "pasted_vectors.csv",
    ]  # fmt: skip
    assert [record.sequence for record in read_fasta(folder / "pasted.fasta")] == ["MKTAYIAKQR"]
    shown = capsys.readouterr().out
    assert "1 protein, 10 residues" in shown
    assert "at least 4 proteins" in shown


def test_pasted_text() -> None:
    assert (
        format_pasted("MKV, lag;  MKT*\nAC") == ">protein_1\nMKV\n>protein_2\nLAG\n>protein_3\nMKT*\n>protein_4\nAC\n"
    )
    assert format_pasted(">a b\nMKV\n") == ">a b\nMKV\n"
    with refused("form.fasta-in-one-line"):
        format_pasted(">aMKV")
    with refused("form.not-a-sequence", found="P69905.2"):
        format_pasted("MKV P69905.2")


def test_uploads_that_are_not_one_file(colab: types.SimpleNamespace, model: str, tmp_path: Path) -> None:
    for uploads in ({}, {"a.fasta": b">a\nM\n", "b.fasta": b">b\nM\n"}):
        colab.uploads = uploads
        with refused("form.upload", found=len(uploads)):
            embed_form("", model, out_dir=tmp_path)


def test_without_colab_nothing_can_be_uploaded(model: str, tmp_path: Path) -> None:
    with refused("form.no-colab"):
        embed_form("", model, out_dir=tmp_path)


def test_the_notebook_is_one_form_and_one_button(root: Path) -> None:
    """The form has the tag that papermill needs to run it without a browser."""
    notebook = json.loads((root / "notebooks" / "colab" / "my_proteins.ipynb").read_text(encoding="utf-8"))
    form, button = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert form["metadata"] == {"cellView": "form", "tags": ["parameters"]}
    assert button["metadata"] == {"cellView": "form"}
    assert all("".join(cell["source"]).startswith("# @title ") for cell in (form, button))
    names: dict = {}
    exec("".join(form["source"]), names)
    assert {"sequence": "", "model": "8M", "colour_by": ""}.items() <= names.items()
    assert "".join(form["source"]).count("# @param ") == 3
