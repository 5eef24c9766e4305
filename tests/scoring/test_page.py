"""Heat maps, the HTML page and coloured structures of `esm2kit score`."""

import base64
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from Bio.Data.IUPACData import protein_letters_1to3
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit import STANDARD_RESIDUES, ScoreConfig, Scores, score
from esm2kit.cli.check import CheckConfig, check
from esm2kit.cli.main import main
from esm2kit.figures import render_svg
from esm2kit.scoring.page import build_heat_map, describe_model
from esm2kit.scoring.pictures import GROUPS, ORDER, Layout, average_substitutions, draw_substitutions
from esm2kit.sequences.structures import read_structure

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVK"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def run(folder: Path, model: Path, fasta: str = f">P\n{SEQUENCE}\n", **options) -> Scores:
    path = folder / "in.fasta"
    path.write_text(fasta, encoding="utf-8")
    return score(ScoreConfig(path, **{"model": str(model), "out_dir": folder / "out", "resamples": 100, **options}))


def make_table(count: int) -> tuple[np.ndarray, str]:
    """Random scores of a random protein, 0 for the wild type."""
    generator = np.random.default_rng(count)
    codes = generator.integers(0, 20, count)
    log_odds_TA = generator.normal(-2, 2, (count, 20))
    log_odds_TA[np.arange(count), codes] = 0
    return log_odds_TA, "".join(STANDARD_RESIDUES[code] for code in codes)


def write_pdb(path: Path, sequence: str, first: int = 1) -> Path:
    """A chain in the form of a helix, with CA atoms only."""
    lines = []
    for number, letter in enumerate(sequence, first):
        angle = np.deg2rad(100) * number
        x, y, z = 2.3 * np.cos(angle), 2.3 * np.sin(angle), 1.5 * number
        name = protein_letters_1to3[letter].upper()
        lines.append(f"ATOM  {number:5d}  CA  {name} A{number:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  9.99")
    path.write_text("\n".join([*lines, "TER", "END", ""]), encoding="utf-8")
    return path


def read_b_factors(path: Path) -> list[float]:
    return [float(line[60:66]) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("ATOM")]


def read_cells(page: str) -> list[dict]:
    """The data of the heat maps of a page, with the scores as arrays."""
    found = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]
    for data in found:
        cells = np.frombuffer(base64.b64decode(data["scores"]), dtype="<i2").reshape(-1, 20).astype(float)
        data["scores"] = np.where(cells == data["missing"], np.nan, cells / data["scale"])
    return found


def test_the_rows_of_the_heat_map_are_groups_of_amino_acids() -> None:
    assert sorted(ORDER) == sorted(STANDARD_RESIDUES)
    assert GROUPS["positive"] == "HKR"
    assert GROUPS["negative"] == "DE"


@pytest.mark.parametrize(("count", "rows", "per_row"), [(76, 1, 76), (263, 3, 90), (1863, 10, 190), (34350, 10, 3440)])
def test_long_proteins_are_wrapped(count: int, rows: int, per_row: int) -> None:
    layout = Layout.fit(np.zeros((count, 20)))
    assert (len(layout.rows), layout.per_row) == (rows, per_row)
    assert [row.start for row in layout.rows] == list(range(0, count, per_row))
    assert layout.rows[-1].stop == count


def test_the_heat_map_has_every_score_and_the_number_of_every_position() -> None:
    log_odds_TA, sequence = make_table(263)
    figure = draw_substitutions(log_odds_TA, sequence, offset=25)
    images = [ax.images[0] for ax in figure.axes if ax.images and ax.images[0].get_gid()]
    shown = np.concatenate([image.get_array().T for image in images])
    np.testing.assert_array_equal(shown, log_odds_TA[:, [STANDARD_RESIDUES.index(letter) for letter in ORDER]])
    assert images[0].norm.vmin == -images[0].norm.vmax  # the colour in the middle is 0
    (dots,) = images[1].axes.get_lines()[:1]
    x, y = dots.get_xdata()[::3], dots.get_ydata()[::3]
    assert [(int(place), ORDER[int(row)]) for place, row in zip(x, y, strict=True)] == [
        (place + 26, sequence[place]) for place in range(90, 180)
    ]
    ticks = [label.get_text() for label in images[1].axes.get_xticklabels()]
    assert ticks[:3] == ["116", "120", "130"]
    strips = [ax.images[0] for ax in figure.axes if ax.images and not ax.images[0].get_gid()][:3]
    mean_T = np.concatenate([np.asarray(strip.get_array())[0] for strip in strips])
    np.testing.assert_allclose(mean_T, log_odds_TA.sum(1) / 19)
    plt.close(figure)


def test_an_svg_of_1863_residues_is_small_and_has_a_pixel_per_cell() -> None:
    svg = render_svg(draw_substitutions(*make_table(1863)))
    assert len(svg) < 600_000
    images = [
        each
        for each in ElementTree.fromstring(re.sub(r' xmlns="[^"]*"', "", svg)).iter("image")
        if "cells-" in each.get("id", "")
    ]
    assert [(each.get("width"), each.get("height")) for each in images] == [("190", "20")] * 9 + [("153", "20")]


def test_the_mean_of_a_position_is_that_of_its_substitutions() -> None:
    log_odds_TA = np.full((3, 20), np.nan)
    log_odds_TA[0, :4] = 0, -1, -2, -6
    log_odds_TA[1] = -2
    log_odds_TA[1, 1] = 0
    np.testing.assert_array_equal(average_substitutions(log_odds_TA, "LAX"), [-3, -2, np.nan])


def test_the_page_has_the_scores_and_links_to_the_files(tmp_path: Path, model: Path) -> None:
    result = run(tmp_path, model, offset=10)
    page = result.page.read_text(encoding="utf-8")
    (data,) = read_cells(page)
    np.testing.assert_allclose(data["scores"], result.table(), atol=0.0051)
    assert (data["sequence"], data["first"], data["rows"]) == (SEQUENCE, 11, [[0, 60]])
    assert [path.name for path in result.pictures] == ["in_scores.png", "in_scores.svg"]
    assert [path.name for path in result.files[3:]] == [
        "in_scores.html", "in_scores.png", "in_scores.svg", "in_page.json",
    ]  # fmt: skip
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    links = re.findall(r'<a href="([^"#]+)"', page)
    assert links == ["in_scores.tsv", "in_scores.h5", "in_scores.json"]
    most = result.most_tolerated.split()[0]
    assert f"<td>{most}</td>" in page
    assert f"<td>{result.least_tolerated.split()[0]}</td>" in page
    assert "Meier et al. 2021" in page
    assert page.count("<svg") == 2  # heat map and entropy


def test_a_second_call_writes_nothing_and_another_setting_writes_the_page_again(tmp_path: Path, model: Path) -> None:
    first = run(tmp_path, model)
    times = {path: path.stat().st_mtime_ns for path in first.files}
    assert run(tmp_path, model).files == first.files
    assert {path: path.stat().st_mtime_ns for path in first.files} == times
    structure = write_pdb(tmp_path / "s.pdb", SEQUENCE)
    second = run(tmp_path, model, structure=structure)
    assert second.scores.stat().st_mtime_ns == times[first.scores]
    assert second.page.stat().st_mtime_ns > times[first.page]
    assert check(CheckConfig(tmp_path / "out")).startswith("8 files ")
    second.pictures[0].write_bytes(b"x")
    with refused("check.damaged"):
        check(CheckConfig(tmp_path / "out"))


def test_without_pictures_there_is_no_page(tmp_path: Path, model: Path) -> None:
    result = run(tmp_path, model, pictures=0)
    assert (result.page, result.pictures) == (None, ())
    assert not list((tmp_path / "out").glob("*.html"))


def test_of_many_proteins_only_some_have_a_heat_map(tmp_path: Path, model: Path) -> None:
    fasta = "".join(f">p{number}/<b>\n{SEQUENCE[number : number + 20]}\n" for number in range(5))
    result = run(tmp_path, model, fasta, pictures=2)
    page = result.page.read_text(encoding="utf-8")
    assert len(read_cells(page)) == 2
    assert [path.name for path in result.pictures] == [
        f"in_scores_p{number}--b-.{suffix}" for number in range(2) for suffix in ("png", "svg")
    ]
    assert re.findall(r'<a href="#([^"]+)">', page) == ["protein-0", "protein-1"]
    assert "The first 2 have a heat map below." in page
    assert "p4/&lt;b&gt;" in page  # listed, and escaped
    assert "<b>" not in page


def test_only_the_scored_positions_are_drawn(tmp_path: Path, model: Path) -> None:
    result = run(tmp_path, model, positions="20-24,30")
    (data,) = read_cells(result.page.read_text(encoding="utf-8"))
    assert (data["first"], data["sequence"]) == (20, SEQUENCE[19:30])
    is_scored = np.isfinite(data["scores"]).all(1)
    assert is_scored.tolist() == [True] * 5 + [False] * 5 + [True]


def test_the_page_of_an_assay_begins_with_the_verdict(tmp_path: Path, model: Path) -> None:
    own = run(tmp_path, model, pictures=0)
    scores = own.column("score")
    noise = np.random.default_rng(0).normal(size=len(scores)) * scores.std() / 2
    rows = [f"{name},{value}" for name, value in zip(own.column("mutation"), scores + noise, strict=True)]
    table = tmp_path / "assay.csv"
    table.write_text("\n".join(["mutant,DMS_score", *rows]), encoding="utf-8")
    page = run(tmp_path, model, mutations=str(table), name="good").page.read_text(encoding="utf-8")
    assert "agree with the measured values, better than every baseline without a model.</p>" in page
    assert "Spearman 0.8" in page  # the title of the scatter plot
    assert '<a href="good_assay.tsv">' in page
    opposite = [f"{name},{-value}" for name, value in zip(own.column("mutation"), scores, strict=True)]
    table.write_text("\n".join(["mutant,DMS_score", *opposite]), encoding="utf-8")
    page = run(tmp_path, model, mutations=str(table), name="bad").page.read_text(encoding="utf-8")
    lead = re.search(r'<p class="lead">(.*?)</p>', page)[1]
    assert lead.endswith("predict the measured values better than the model.")
    assert "BLOSUM62" in lead


def test_the_page_of_whole_proteins_lists_the_most_natural_one_first(tmp_path: Path, model: Path) -> None:
    fasta = "".join(f">p{number}\n{SEQUENCE[number : number + 20]}\n" for number in range(5))
    result = run(tmp_path, model, fasta, sequences=True)
    page = result.page.read_text(encoding="utf-8")
    order = result.column("protein")[np.argsort(result.column("pseudo_perplexity"))]
    assert re.findall(r"<td>(p\d)</td>", page) == order.tolist()
    assert f"The model finds {order[0]} the most natural" in page
    assert result.pictures == ()


def test_a_model_that_knows_the_protein_is_told_from_one_that_does_not(tmp_path: Path, model: Path) -> None:
    result = run(tmp_path, model, pictures=0)
    assert describe_model(result)[0].startswith("The model does not know the protein better than residue frequencies")

    class Certain(Scores):
        def log_probabilities(self, protein=0):
            found = np.full((len(SEQUENCE), 20), np.log(0.1 / 19))
            found[np.arange(len(SEQUENCE)), [STANDARD_RESIDUES.index(letter) for letter in SEQUENCE]] = np.log(0.9)
            return found

    certain = Certain(**{name: getattr(result, name) for name in result.__dataclass_fields__})
    assert "it guesses 100% of the hidden residues" in describe_model(certain)[0]
    assert "pseudo-perplexity of 1.1 " in describe_model(certain)[0]
    assert describe_model(certain)[0].startswith("The model knows the protein: ")


@pytest.mark.parametrize("colour_by", ["mean", "worst", "entropy"])
def test_a_structure_is_coloured_by_the_scores(tmp_path: Path, model: Path, colour_by: str) -> None:
    structure = write_pdb(tmp_path / "part.pdb", SEQUENCE[10:40], first=111)
    result = run(tmp_path, model, structure=structure, colour_by=colour_by, pictures=0)
    table_TA = np.where(result.table() == 0, np.nan, result.table())
    values = {"mean": np.nanmean(table_TA, 1), "worst": np.nanmin(table_TA, 1), "entropy": result.entropy()}
    assert [path.name for path in result.structures] == ["in_scores_part.pdb"]
    np.testing.assert_allclose(read_b_factors(result.structures[0]), values[colour_by][10:40], atol=0.0051)
    assert read_structure(result.structures[0]).chains[0].sequence == SEQUENCE[10:40]


def test_the_page_says_how_to_open_the_structure(tmp_path: Path, model: Path) -> None:
    page = run(tmp_path, model, structure=write_pdb(tmp_path / "s.pdb", SEQUENCE)).page.read_text(encoding="utf-8")
    assert '<a href="in_scores_s.pdb">' in page
    assert re.search(r"spectrum b, orange white blue, minimum=-[\d.]+, maximum=[\d.]+", page)
    assert re.search(r"color bfactor palette orange:white:blue range -[\d.]+,[\d.]+", page)
    assert "(chain A: P)" in page


def test_the_structure_of_another_protein_writes_nothing(tmp_path: Path, model: Path) -> None:
    structure = write_pdb(tmp_path / "other.pdb", "GSHLEDPVAGAGAGLVLVIFPYTY")
    with refused("structure.fit", chain="A"):
        run(tmp_path, model, structure=structure)
    with refused("score.structure"):
        run(tmp_path, model, f">P\n{SEQUENCE}\n>Q\n{SEQUENCE[::-1]}\n", structure=structure)
    assert not list((tmp_path / "out").glob("in_*"))
    with refused("score.structure-sequences"):
        ScoreConfig("a.fasta", sequences=True, structure=structure)
    with refused("score.colour-by", strategy="pseudo-ppl"):
        ScoreConfig("a.fasta", strategy="pseudo-ppl", colour_by="entropy")


def test_a_heat_map_without_scores_is_drawn() -> None:
    log_odds_TA = np.full((5, 20), np.nan)
    figure = build_heat_map(log_odds_TA, "XXXXX", 0, "none")
    assert "<svg" in figure["html"]


def test_the_command_prints_the_page(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.fasta").write_text(f">P\n{SEQUENCE}\n", encoding="utf-8")
    out = tmp_path / "out"
    assert main(["score", str(tmp_path / "a.fasta"), "--model", str(model), "--out_dir", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(out / "a_scores.html")
