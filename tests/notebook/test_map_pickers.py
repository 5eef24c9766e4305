"""Pickers of the map and of one protein: values, errors and cards."""

import re
from pathlib import Path

import pytest

from esm2kit.core.errors import InputError
from esm2kit.embedding import maps
from esm2kit.notebook.pickers import maps as map_pickers
from esm2kit.notebook.widgets import View
from esm2kit.sequences.fasta import Record, read_fasta


def text(view: View) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", view.card.value).split())


@pytest.fixture(scope="module")
def records(sample: Path) -> list[Record]:
    return list(read_fasta(sample / "tasks" / "domain_of_life" / "sampled.fasta"))


def test_the_map_is_coloured_by_any_field_of_the_headers(records: list[Record], sample: Path) -> None:
    fasta = sample / "tasks" / "domain_of_life" / "sampled.fasta"
    view = map_pickers.map_picker("pca", "TARGET", records, fasta)
    assert view.value[:3] == ("pca", "TARGET", "domain of life")
    assert view.value.values_P.tolist()[0] == "Eukaryota"
    assert view.parameters == {"projection": "pca", "colour_by": "TARGET"}
    assert "3 different: Eukaryota 150, Bacteria 150, Archaea 150" in text(view)
    offered = [value for _, value in view.controls["colour_by"].options]
    assert offered == ["", "TARGET", "SET", "VALIDATION", "residues"]
    view.controls["colour_by"].value = "residues"
    counts = [len(record.sequence) for record in records]
    assert f"a number, {min(counts)} to {max(counts)}" in text(view)
    assert view.value[:3] == ("pca", "residues", "length in residues")


def test_without_a_choice_the_first_field_that_fits_colours_the_map(records: list[Record]) -> None:
    assert map_pickers.map_picker("pca", "", records).value.colour_by == "TARGET"
    plain = [Record(f"p{place}", f"p{place} some protein", "M" * (place + 1)) for place in range(8)]
    view = map_pickers.map_picker("pca", "", plain)
    assert view.value[:3] == ("pca", "residues", "length in residues"), "a FASTA file without fields"
    assert view.controls["colour_by"].options[0] == ("the first that fits: residues", "")
    columns = {"Tm (C)": ["40.5", "38.25", None, "51", "52", "53", "54", "55.5"]}
    view = map_pickers.map_picker("pca", "", plain, "", columns)
    assert view.value[:2] == ("pca", "Tm (C)")
    assert "column of the table" in text(view)
    assert "a number, 38.25 to 55.5; 1 proteins have none" in text(view)


def test_a_method_that_is_not_installed_is_not_offered(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    def offered() -> list[str]:
        return [value for _, value in map_pickers.map_picker("pca", "", records).controls["projection"].options]

    monkeypatch.setattr(maps, "find_spec", lambda name: name)
    assert offered() == ["pca", "tsne", "umap"]
    monkeypatch.setattr(maps, "find_spec", lambda name: None)
    assert offered() == ["pca", "tsne"]


def test_many_values_are_cut_and_headers_are_escaped(records: list[Record]) -> None:
    strange = [Record(f"p{place}", f"p{place} OS=<b>{place}</b>", "MKT") for place in range(8)]
    view = map_pickers.map_picker("pca", "OS", strange)
    assert "and 3 more" in text(view)
    assert "<b>0" not in view.card.value
    assert "&lt;b&gt;0" in view.card.value
    protein = map_pickers.protein_picker("p1", strange)
    assert "&lt;b&gt;1" in protein.card.value


def test_an_invalid_choice_is_shown_and_raised(records: list[Record], monkeypatch) -> None:
    monkeypatch.setattr(maps, "find_spec", lambda name: None)
    for view, message in (
        (map_pickers.map_picker("pca", "OS", records), "no protein has the field 'OS'. Use one of TARGET, SET"),
        (map_pickers.map_picker("umap", "TARGET", records), "requires the umap-learn package: pip install umap-learn"),
        (map_pickers.map_picker("isomap", "TARGET", records), "unknown projection 'isomap'. Choose pca, tsne or umap"),
        (
            map_pickers.protein_picker("A0A022Q765", records),
            "protein 'A0A022Q765' is not among the 450 proteins: .*A0A022Q764",
        ),
    ):
        assert 'role="alert"' in view.card.value
        with pytest.raises(InputError, match=message) as caught:
            _ = view.value
        assert "\n" not in str(caught.value)
        assert "Cannot be used" in text(view)


def test_a_protein_is_chosen_by_its_id_and_the_first_without_one(records: list[Record]) -> None:
    view = map_pickers.protein_picker("", records)
    assert view.value == 0
    assert f"residues {len(records[0].sequence)}" in text(view)
    view.controls["protein"].value = f" {records[17].id} "
    assert view.value == 17
    assert records[17].description in text(view)
    doubled = [*records[:3], records[1]]
    assert map_pickers.protein_picker(records[1].id, doubled).value == 1, "the first of equal ids"
