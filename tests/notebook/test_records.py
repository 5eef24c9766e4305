"""Names of files made from a FASTA file, and what a notebook records."""

import json
from pathlib import Path

import pytest
from support.errors import refused

from esm2kit.notebook import records
from esm2kit.notebook.records import output_name, record


def test_a_second_fasta_does_not_replace_the_files_of_the_first(tmp_path: Path) -> None:
    """Files of one folder, of one name in two folders, and of one name with two suffixes."""
    lab, field, out = tmp_path / "lab", tmp_path / "field", tmp_path / "out"
    assert output_name(lab / "enzymes.fasta", out) == "enzymes"
    assert output_name(lab / "others.fasta", out) == "others", "not named after the folder"
    assert output_name(field / "enzymes.fasta", out) == "enzymes_2"
    assert output_name(lab / "enzymes.fa.gz", out) == "enzymes_3"
    assert output_name(lab / "enzymes.fasta", out) == "enzymes", "the same file has the same name again"
    assert output_name(lab / "enzymes.fasta", out, "official 8M") == "enzymes_official_8M"
    assert output_name(field / "enzymes.fasta", tmp_path / "elsewhere") == "enzymes"


def test_a_relative_and_an_absolute_path_are_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_name("enzymes.fasta", "out") == output_name(tmp_path / "enzymes.fasta", "out") == "enzymes"


def test_what_a_notebook_made_is_linked_relative_to_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notebooks").mkdir()
    made = tmp_path / "out" / "a&b.h5"
    made.parent.mkdir()
    made.write_text("")
    monkeypatch.chdir(tmp_path / "notebooks")
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(records, "display", lambda data, raw: shown.append(data))
    record("03_embed", "../out", {"vectors": made}, {"proteins": 3}, "Three proteins.")
    (data,) = shown
    assert '<a href="../out/a&amp;b.h5">vectors</a>' in data["text/html"]
    assert data["text/plain"] == f"created vectors: {made}"
    recorded = json.loads((tmp_path / "out" / "records" / "03_embed.json").read_text(encoding="utf-8"))
    assert recorded == {"made": {"vectors": str(made)}, "figures": {"proteins": 3}, "result": "Three proteins."}
    with refused("record.absent"):
        record("03_embed", "../out", {"vectors": made.with_name("no")}, {})
