"""`esm2kit score` of files with measured values: files, real assays, planted signals, repeated calls, bad input."""

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit import STANDARD_RESIDUES, ScoreConfig, Scores, score
from esm2kit.cli.check import CheckConfig, check
from esm2kit.cli.main import main
from esm2kit.scoring.evaluation import list_factors
from esm2kit.scoring.variants import read_variants
from esm2kit.sequences.fasta import Record

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVK"
B2L11 = "B2L11_HUMAN_Dutta_2010_binding-Mcl-1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def read_rows(path: Path | None) -> list[dict[str, str]]:
    assert path is not None
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def own_scores(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[dict[str, str]]:
    """Every single substitution of SEQUENCE with its score."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "p.fasta").write_text(f">P\n{SEQUENCE}\n")
    return read_rows(score(ScoreConfig(folder / "p.fasta", model=str(model), out_dir=folder, pictures=0)).scores)


def write_assay(path: Path, rows: list[dict[str, str]], measured: np.ndarray) -> Path:
    """Write an assay in the form of ProteinGym; the upper half of the values is fit."""
    lines = ["mutant,mutated_sequence,DMS_score,DMS_score_bin"]
    for row, value in zip(rows, measured, strict=True):
        place = int(row["position"]) - 1
        mutated = SEQUENCE[:place] + row["mutation"][-1] + SEQUENCE[place + 1 :]
        lines.append(f"{row['mutation']},{mutated},{float(value)!r},{int(value > np.median(measured))}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(source: Path, model: Path, folder: Path, **options) -> Scores:
    return score(ScoreConfig(source, model=str(model), out_dir=folder, **{"resamples": 200, "pictures": 0, **options}))


def add_noise(rows: list[dict[str, str]], seed: int = 0) -> np.ndarray:
    """Scores of the model with noise of the same variance: a Pearson correlation of sqrt(1/2)."""
    values = np.array([float(row["score"]) for row in rows])
    return values + np.random.default_rng(seed).normal(size=len(values)) * values.std()


def test_a_planted_signal_is_found(tmp_path: Path, model: Path, own_scores: list[dict[str, str]]) -> None:
    measured = add_noise(own_scores)
    result = run(write_assay(tmp_path / "planted.csv", own_scores, measured), model, tmp_path / "out")
    (assay,) = result.read_assay()["assays"]
    assert assay["num_variants"] == 19 * len(SEQUENCE)
    found = assay["rows"]["model"]["spearman"]
    assert found["value"] == pytest.approx(spearmanr(measured, [float(row["score"]) for row in own_scores])[0])
    assert found["low"] < 6 / np.pi * np.arcsin(np.sqrt(0.5) / 2) < found["high"]
    assert list(assay["rows"]) == ["model", "blosum62", "hydrophobicity", "volume"]
    assert list(assay["rows"]["blosum62"]) == ["spearman", "auc", "mcc", "ndcg", "top_recall"]
    assert assay["better_baselines"] == []
    assert assay["verdict"][0].startswith("The model does better than every baseline: Spearman 0.6")


def test_a_better_baseline_is_said_in_words(
    tmp_path: Path, model: Path, own_scores: list[dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "esm2kit")
    first = run(write_assay(tmp_path / "a.csv", own_scores, add_noise(own_scores)), model, tmp_path / "out")
    volume = np.array([float(row["volume"]) for row in read_rows(first.assay.with_suffix(".tsv"))])
    noise = np.random.default_rng(1).normal(size=len(volume)) * volume.std()
    result = run(write_assay(tmp_path / "b.csv", own_scores, volume + noise), model, tmp_path / "out")
    (assay,) = result.read_assay()["assays"]
    assert assay["better_baselines"][0] == "volume"
    assert any(sentence.startswith("Volume change does better than the model here") for sentence in assay["verdict"])
    assert "b: Volume change does better than the model here: Spearman 0.6" in caplog.text


def test_files_and_repeated_calls(
    tmp_path: Path, model: Path, own_scores: list[dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "esm2kit")
    path = write_assay(tmp_path / "ABC1_YEAST_Smith_2020.csv", own_scores[::7], add_noise(own_scores)[::7])
    result = run(path, model, tmp_path / "out")
    names = [f"ABC1_YEAST_Smith_2020_{suffix}" for suffix in ("scores.tsv", "scores.h5", "scores.json")]
    names += [f"ABC1_YEAST_Smith_2020_{suffix}" for suffix in ("assay.tsv", "assay.json")]
    assert [file.name for file in result.files] == names
    assert sorted(file.name for file in (tmp_path / "out").iterdir() if file.suffix != ".lock") == sorted(names)
    table = read_rows(result.assay.with_suffix(".tsv"))
    assert [row["mutation"] for row in table] == [row["mutation"] for row in own_scores[::7]]
    assert [row["score"] for row in table] == [row["score"] for row in own_scores[::7]]
    assert {row["protein"] for row in table} == {"ABC1_YEAST"}
    recorded = result.read_assay()
    assert recorded["provenance"]["inputs"]["scores"]["path"] == str(result.scores)
    # the same call writes nothing
    before = {file: file.stat().st_mtime_ns for file in result.files}
    assert run(path, model, tmp_path / "out") == result
    assert {file: file.stat().st_mtime_ns for file in result.files} == before
    # the file as mutations without a FASTA is the same run
    options = {"model": str(model), "out_dir": tmp_path / "out", "resamples": 200, "pictures": 0}
    assert score(ScoreConfig(mutations=str(path), **options)) == result
    # with other resamples only the comparison is made again
    again = run(path, model, tmp_path / "out", resamples=300)
    assert {file: file.stat().st_mtime_ns for file in again.files[:3]} == {
        file: time for file, time in before.items() if file in again.files[:3]
    }
    assert again.read_assay()["settings"]["resamples"] == 300
    assert again.read_assay()["assays"][0]["rows"]["model"]["spearman"]["value"] == pytest.approx(
        recorded["assays"][0]["rows"]["model"]["spearman"]["value"]
    )
    assert Scores.read(result.manifest).read_assay() == again.read_assay()
    # the files know their checksums
    assert "5 files" in check(CheckConfig(tmp_path / "out"))
    result.assay.with_suffix(".tsv").write_bytes(b"assay\n")
    with pytest.raises(ValueError, match=r"assay\.tsv"):
        run(path, model, tmp_path / "out", resamples=300)
    assert Scores.read(result.manifest).scores == result.scores


def test_mutations_without_measured_values(tmp_path: Path, model: Path) -> None:
    (tmp_path / "p.fasta").write_text(f">P\n{SEQUENCE}\n")
    (tmp_path / "m.txt").write_text("K2R\nT3A:A4G\n")
    result = run(tmp_path / "p.fasta", model, tmp_path / "out", mutations=str(tmp_path / "m.txt"))
    assert result.assay is None
    assert result.column("mutation").tolist() == ["K2R", "T3A:A4G"]
    with refused("scores.no-assay"):
        result.read_assay()
    for name in ("alignment", "groups"):
        with refused("assay.no-values"):
            run(tmp_path / "p.fasta", model, tmp_path / "out", **{name: tmp_path / "p.fasta"})
        with refused("score.absent", name=name):
            run(tmp_path / "p.fasta", model, tmp_path / "out", **{name: tmp_path / "nothing"})


def test_a_comparison_does_not_outlive_its_scores(
    tmp_path: Path, model: Path, own_scores: list[dict[str, str]]
) -> None:
    path = write_assay(tmp_path / "P.csv", own_scores, add_noise(own_scores))
    (tmp_path / "P.fasta").write_text(f">P\n{SEQUENCE}\n")
    assert run(path, model, tmp_path / "out").assay is not None
    result = run(tmp_path / "P.fasta", model, tmp_path / "out", mutations="K2R", restart=True)
    assert result.assay is None
    assert sorted(file.name for file in (tmp_path / "out").glob("P_*")) == [
        "P_scores.h5",
        "P_scores.json",
        "P_scores.tsv",
    ]


def test_several_assays_of_a_folder(tmp_path: Path, model: Path, own_scores: list[dict[str, str]]) -> None:
    folder = tmp_path / "assays"
    folder.mkdir()
    measured = add_noise(own_scores)
    write_assay(folder / "ABC1_YEAST_Smith_2020.csv", own_scores[::3], measured[::3])
    write_assay(folder / "ABC1_YEAST_Jones_2021.csv", own_scores[::2], -measured[::2])
    (folder / "groups.txt").write_text("assay,protein,kind\n")
    result = run(folder, model, tmp_path / "out", name="all")
    chosen = {row["mutation"] for row in (*own_scores[::3], *own_scores[::2])}
    assert result.num_scores == len(chosen)
    assert result.num_proteins == 1
    recorded = result.read_assay()
    values = [assay["rows"]["model"]["spearman"]["value"] for assay in recorded["assays"]]
    assert [assay["assay"] for assay in recorded["assays"]] == ["ABC1_YEAST_Jones_2021", "ABC1_YEAST_Smith_2020"]
    assert values[0] < -0.5 < 0.5 < values[1]
    summary = recorded["summary"]
    assert (summary["num_assays"], summary["num_proteins"]) == (2, 1)
    assert summary["averages"]["model"]["spearman"]["value"] == pytest.approx(np.mean(values))
    assert "ABC1_YEAST_Jones_2021" in summary["assays_with_better_baselines"]
    assert summary["published_spearman"]["esm2_t33_650M_UR50D"] == 0.414
    # with groups of a table
    (tmp_path / "groups.csv").write_text(
        "assay,protein,kind\nABC1_YEAST_Jones_2021,A,binding\nABC1_YEAST_Smith_2020,A,growth\n"
    )
    grouped = run(folder, model, tmp_path / "out", name="all", groups=tmp_path / "groups.csv").read_assay()["summary"]
    assert {group: row["model"] for group, row in grouped["groups"]["kind"].items()} == pytest.approx(
        {"binding": values[0], "growth": values[1]}
    )


def test_an_alignment_is_a_baseline(tmp_path: Path, model: Path, own_scores: list[dict[str, str]]) -> None:
    path = write_assay(tmp_path / "assay.csv", own_scores, add_noise(own_scores))
    (tmp_path / "p.a3m").write_text(f">P\n{SEQUENCE}\n>b\n{SEQUENCE.replace('K', 'R')}\n")
    result = run(path, model, tmp_path / "out", alignment=tmp_path / "p.a3m")
    assert "site_independent" in result.read_assay()["assays"][0]["rows"]
    rows = {row["mutation"]: float(row["site_independent"]) for row in read_rows(result.assay.with_suffix(".tsv"))}
    assert rows["K2R"] == pytest.approx(0)  # both residues of this position are as frequent
    assert rows["K2A"] == rows["K2W"] < 0
    # an alignment of another protein is found before any score is computed
    (tmp_path / "p.a3m").write_text(">Q\nCCCCCCC\n")
    with refused("alignment.query"):
        run(path, model, tmp_path / "other", alignment=tmp_path / "p.a3m")
    assert not list((tmp_path / "other").glob("*_scores*"))


def test_bad_assays_leave_nothing(
    tmp_path: Path, model: Path, own_scores: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_assay(tmp_path / "assay.csv", own_scores[:50], np.ones(50))
    with refused("assay.values", found=50):
        run(path, model, tmp_path / "out")
    path.write_text(path.read_text().replace("1.0", "1.x", 1))
    assert main(["score", str(path), "--model", str(model), "--out_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip() == (
        "esm2kit: assay.csv: row 2: DMS_score is '1.x', which is not a finite number. Correct it, or leave the cell "
        "empty."
    )
    assert not [file for file in (tmp_path / "out").iterdir() if not file.name.startswith(".")]
    with refused("score.no-input"):
        ScoreConfig(model=str(model))
    with refused("score.both", found=["positions"]):
        run(path, model, tmp_path / "out", positions="3")
    with refused("option.range", name="resamples"):
        run(path, model, tmp_path / "out", resamples=3)


@pytest.mark.shared
def test_a_real_assay(tmp_path: Path, model: Path, shared_data: Path) -> None:
    path = shared_data / "dms" / f"{B2L11}.csv"
    result = run(path, model, tmp_path)
    (assay,) = result.read_assay()["assays"]
    assert (assay["assay"], assay["protein"], assay["num_variants"]) == (B2L11, "B2L11_HUMAN", 170)
    # the baseline does not depend on the model: this value is that of BLOSUM62 by hand
    table = read_rows(result.assay.with_suffix(".tsv"))
    measured, blosum62 = ([float(row[name]) for row in table] for name in ("measured", "blosum62"))
    assert assay["rows"]["blosum62"]["spearman"]["value"] == pytest.approx(spearmanr(measured, blosum62)[0])
    assert assay["published_spearman"]["esm2_t6_8M_UR50D"] == 0.174
    assert run(shared_data / "dms", model, tmp_path, name="folder").read_assay()["assays"] == [assay]


@pytest.mark.shared
def test_random_weights_have_no_correlation_beyond_its_interval(tmp_path: Path, model: Path, shared_data: Path) -> None:
    """Of 16 random models, the intervals of nearly all contain 0, although single correlations are as high as 0.5."""
    path = shared_data / "dms" / f"{B2L11}.csv"
    assays = [
        run(path, model, tmp_path / str(seed), untrained_seed=seed).read_assay()["assays"][0] for seed in range(16)
    ]
    assert {assay["resampled"] for assay in assays} == {"positions and amino acids"}
    found = [assay["rows"]["model"]["spearman"] for assay in assays]
    values = np.array([each["value"] for each in found])
    assert abs(values.mean()) < 2.5 * values.std(ddof=1) / np.sqrt(len(values))
    assert np.abs(values).max() > 0.3
    outside = sum(not each["low"] <= 0 <= each["high"] for each in found)
    assert outside <= 3
    no_correlation = sum("no correlation" in " ".join(assay["verdict"]) for assay in assays)
    assert no_correlation == len(assays) - outside


def test_what_is_resampled(tmp_path: Path, model: Path) -> None:
    _, (found,) = read_variants("M1A,K2R,K2A", [Record("P", "P", SEQUENCE)])
    position, letter = list_factors(found.variants) or ()
    assert position.tolist() == [0, 1, 1]
    assert letter.tolist() == [STANDARD_RESIDUES.index(residue) for residue in "ARA"]
    _, (found,) = read_variants("M1A,K2R:T3A", [Record("P", "P", SEQUENCE)])
    assert list_factors(found.variants) is None
    # double mutants are resampled one by one
    path = tmp_path / "doubles.csv"
    path.write_text("mutant,DMS_score\nM1A:K2R,1\nM1A,2\nK2R,4\nT3A,3\n")
    (tmp_path / "p.fasta").write_text(f">P\n{SEQUENCE}\n")
    result = run(tmp_path / "p.fasta", model, tmp_path / "out", mutations=str(path))
    assert result.read_assay()["assays"][0]["resampled"] == "variants"
    assert "num_mutations" in result.read_assay()["assays"][0]["rows"]
