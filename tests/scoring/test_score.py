"""`esm2kit score`: its files are whole or absent, equal on every run, and an interrupted run resumes."""

import csv
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit import STANDARD_RESIDUES, ScoreConfig, Scores, load_model, residue_odds, score
from esm2kit.cli.check import CheckConfig, check
from esm2kit.cli.main import main
from esm2kit.scoring import masked_passes
from esm2kit.scoring.journal import Journal, JournalValues

SEQUENCES = {"one": "MKTAYIAKQRQISFVKSHFSRQ", "two": "GSHMLEDPVXAWC", "three": "MEEPQSDPSVEPPLSQETFSDLWKLL"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def write_fasta(path: Path, *names: str) -> Path:
    path.write_text("".join(f">{name}\n{SEQUENCES[name]}\n" for name in names or SEQUENCES), encoding="utf-8")
    return path


def configure(folder: Path, model: Path | str, *names: str, **options) -> ScoreConfig:
    fasta = write_fasta(folder / "in.fasta", *names)
    return ScoreConfig(fasta, **{"model": str(model), "out_dir": folder / "out", "pictures": 0, **options})


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def read_all(result: Scores) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (result.scores, result.tables) if path}


def test_the_table_and_the_arrays_agree(tmp_path: Path, model: Path) -> None:
    result = score(configure(tmp_path, model))
    rows = read_rows(result.scores)
    assert result.files == tuple(tmp_path / "out" / f"in_scores.{suffix}" for suffix in ("tsv", "h5", "json"))
    assert (result.num_proteins, result.num_scores) == (3, len(rows)) == (3, 19 * (22 + 12 + 26))
    assert result.proteins == list(SEQUENCES)
    for name, sequence in SEQUENCES.items():
        own = [row for row in rows if row["protein"] == name]
        table_TA, log_prob_TA = result.table(name), result.log_probabilities(name)
        assert table_TA.shape == (len(sequence), 20)
        assert result.sequence(name) == sequence
        for row in own:
            place, mutant = int(row["position"]) - 1, STANDARD_RESIDUES.index(row["mutation"][-1])
            assert row["mutation"] == f"{sequence[place]}{place + 1}{STANDARD_RESIDUES[mutant]}"
            assert float(row["score"]) == pytest.approx(table_TA[place, mutant], abs=1e-6)
            assert float(row["mutant_probability"]) == pytest.approx(np.exp(log_prob_TA[place, mutant]), rel=1e-3)
            assert row["window"] == f"1-{len(sequence)}"
        best = max(own, key=lambda row: float(row["score"]))
        assert best["rank"] == "1"
        assert sorted(int(row["rank"]) for row in own)[-1] <= len(own)
        # an independent way: the notebooks' function, which masks every seventh residue, here one at a time
        odds_TA = residue_odds(load_model(model)[0], sequence, np.zeros(33))
        assert np.isfinite(odds_TA).all()
    np.testing.assert_allclose(result.column("score"), [float(row["score"]) for row in rows])
    assert result.column("mutation")[0] == "M1L"
    with refused("scores.column", name="scor"):
        result.column("scor")
    with refused("scores.protein", protein="four"):
        result.table("four")
    with refused("scores.protein", protein=3):
        result.table(3)


def test_tolerated_positions_are_those_of_the_highest_mean(tmp_path: Path, model: Path) -> None:
    result = score(configure(tmp_path, model, "one"))
    mean_T = result.table().sum(1) / 19
    names = [f"{residue}{place}" for place, residue in enumerate(SEQUENCES["one"], 1)]
    assert result.most_tolerated.split() == [names[place] for place in np.argsort(-mean_T)[:5]]
    assert result.least_tolerated.split() == [names[place] for place in np.argsort(mean_T)[:5]]
    assert score(configure(tmp_path, model, name="all")).most_tolerated is None
    # a position is not both, and a single one is neither
    three = score(configure(tmp_path, model, "one", mutations="M1A,K2A,A4W", name="three"))
    order = np.array(names)[[0, 1, 3]][np.argsort(-mean_T[[0, 1, 3]])]
    assert (three.most_tolerated, three.least_tolerated) == (order[0], order[2])
    single = score(configure(tmp_path, model, "one", mutations="M1A", name="single"))
    assert (single.most_tolerated, single.least_tolerated) == (None, None)


def test_many_mutations_on_the_command_line(tmp_path: Path, model: Path) -> None:
    sequence = SEQUENCES["one"]
    names = [f"{own}{place}{new}" for place, own in enumerate(sequence, 1) for new in "AWGKDE" if new != own]
    assert len(",".join(names)) > 255  # no file can have such a name
    result = score(configure(tmp_path, model, "one", mutations=",".join(names)))
    assert result.column("mutation").tolist() == names
    for text in ("M1A", ",".join(names)):
        with refused("mutations.no-wild-type"):
            score(ScoreConfig(mutations=text, model=str(model), out_dir=tmp_path / "none"))
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").iterdir())


def test_the_provenance_has_the_file_of_the_variants(tmp_path: Path, model: Path) -> None:
    (tmp_path / "list.txt").write_text("M1A\nK2A\n")
    result = score(configure(tmp_path, model, "one", mutations=str(tmp_path / "list.txt")))
    found = json.loads(result.manifest.read_text())["provenance"]["inputs"]["variants"]
    assert found["sha256"] == hashlib.sha256(b"M1A\nK2A\n").hexdigest()
    # the same variants from the command line are the same run
    assert score(configure(tmp_path, model, "one", mutations="M1A,K2A")).scores == result.scores


def test_mutants_in_place_of_a_wild_type_are_recognised(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wild = SEQUENCES["one"]
    mutants = [f"{wild[:place]}A{wild[place + 1 :]}" for place in (2, 8, 15)]
    path = tmp_path / "mutants.fasta"
    path.write_text("".join(f">m{place}\n{sequence}\n" for place, sequence in enumerate([*mutants, wild[:-1]])))

    def run(**options) -> str:
        caplog.clear()
        score(ScoreConfig(path, model=str(model), out_dir=tmp_path / "out", **options))
        return " ".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)

    assert "the 4 proteins differ from the first by at most 2 residues, like mutants" in run()
    assert run(sequences=True, name="sequences") == ""
    path.write_text(path.read_text() + ">other\n" + wild[::-1] + "\n")
    assert run(name="different") == ""


def test_variants_keep_their_order_and_their_text(tmp_path: Path, model: Path) -> None:
    result = score(configure(tmp_path, model, "one", mutations="K2A,M1A:K2A,A4W", format="csv"))
    rows = read_rows(result.scores)
    assert [row["mutation"] for row in rows] == ["K2A", "M1A:K2A", "A4W"]
    assert [row["position"] for row in rows] == ["2", "1:2", "4"]
    assert rows[1]["wild_type_probability"].count(":") == 1
    scores = [float(row["score"]) for row in rows]
    assert [row["rank"] for row in rows] == [str(1 + sum(other > own for other in scores)) for own in scores]
    table_TA = result.table()
    assert np.isnan(table_TA).all(1).tolist() == [place not in (0, 1, 3) for place in range(22)]
    alone = score(configure(tmp_path, model, "one", name="all"))
    np.testing.assert_allclose(table_TA[[0, 1, 3]], alone.table()[[0, 1, 3]], atol=1e-5)


def test_likelihoods_of_whole_proteins(tmp_path: Path, model: Path) -> None:
    exact = score(configure(tmp_path, model, sequences=True))
    rows = read_rows(exact.scores)
    assert [(row["protein"], row["residues"]) for row in rows] == [("one", "22"), ("two", "13"), ("three", "26")]
    assert [row["passes"] for row in rows] == ["22", "12", "26"], "X is not read"
    log_prob_TA = score(configure(tmp_path, model, name="table")).log_probabilities("one")
    own = [log_prob_TA[place, STANDARD_RESIDUES.index(residue)] for place, residue in enumerate(SEQUENCES["one"])]
    assert float(rows[0]["mean_log_likelihood"]) == pytest.approx(np.mean(own), abs=1e-6)
    assert float(rows[0]["pseudo_perplexity"]) == pytest.approx(np.exp(-np.mean(own)), rel=1e-6)
    fast = score(configure(tmp_path, model, sequences=True, fast=True, passes=4, sample=2, name="fast"))
    estimates = read_rows(fast.scores)
    assert [row["passes"] for row in estimates] == ["4", "4", "4"]
    checked = [row["exact_mean_log_likelihood"] for row in estimates]
    assert [bool(cell) for cell in checked] == [True, False, True]
    means = [[float(row["mean_log_likelihood"]) for row in each] for each in (estimates, rows)]
    assert float(checked[0]) == pytest.approx(means[1][0], abs=1e-6)
    errors = [abs(means[0][index] - means[1][index]) for index in (0, 2)]
    assert fast.mean_error == pytest.approx(np.mean(errors), abs=1e-6)
    assert 1e-7 < fast.mean_error < 0.05
    assert exact.mean_error is None
    every = score(configure(tmp_path, model, "one", sequences=True, fast=True, passes=22, name="every"))
    assert float(read_rows(every.scores)[0]["mean_log_likelihood"]) == pytest.approx(means[1][0], abs=1e-6)
    with refused("scores.no-tables"):
        exact.table()


def test_a_second_run_does_not_load_the_model(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = score(configure(tmp_path, model))
    content = read_all(first)
    monkeypatch.setattr("esm2kit.scoring.score.load_encoder", None)
    with caplog.at_level(logging.INFO, "esm2kit"):
        assert score(configure(tmp_path, model)) == first
        assert score(configure(tmp_path, model, passes=3)) == first, "only the estimate has passes"
    assert "already exists" in caplog.text
    assert read_all(first) == content
    monkeypatch.undo()
    again = score(configure(tmp_path, model, out_dir=tmp_path / "again", workers=1))
    assert again.scores.read_bytes() == first.scores.read_bytes(), "the same on any number of workers"
    restarted = score(configure(tmp_path, model, restart=True))
    assert restarted.scores.read_bytes() == first.scores.read_bytes()


def test_other_settings_do_not_replace_files(tmp_path: Path, model: Path) -> None:
    first = score(configure(tmp_path, model))
    content = read_all(first)
    for options, differing in (
        ({"strategy": "wt-marginals"}, ["strategy"]),
        ({"untrained_seed": 1}, ["model", "untrained_seed"]),
        ({"batch_tokens": 7}, ["batch_tokens"]),
    ):
        with refused("score.file-exists", differing=differing):
            score(configure(tmp_path, model, **options))
    with refused("score.file-exists", differing=["fasta"]):
        score(configure(tmp_path, model, "one", "two"))
    with refused("score.file-exists", differing=["fasta", "mutations"]):
        score(configure(tmp_path, model, "one", mutations="M1A"))
    assert read_all(first) == content
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "in_scores.tsv").write_text("mine")
    with refused("score.file-exists", differing=[]):
        score(configure(tmp_path, model, out_dir=tmp_path / "other"))
    assert (tmp_path / "other" / "in_scores.tsv").read_text() == "mine"
    replaced = score(configure(tmp_path, model, restart=True, strategy="wt-marginals"))
    assert replaced.strategy == "wt-marginals"
    assert replaced.scores.read_bytes() != content["in_scores.tsv"]


class Stop(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: type[BaseException] = Stop) -> list[int]:
    """Let the computation fail after some batches; returns the number of passes of each batch that was computed."""
    original, computed = masked_passes.compute_batch, []

    def compute(encoder, batch):
        if len(computed) == batches:
            raise error
        computed.append(len(batch))
        return original(encoder, batch)

    monkeypatch.setattr(masked_passes, "compute_batch", compute)
    return computed


@pytest.mark.parametrize("options", [{}, {"sequences": True, "fast": True, "passes": 3}, {"strategy": "pseudo-ppl"}])
def test_a_stopped_run_resumes_where_it_stopped(
    options: dict, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options.get("strategy"):
        options = options | {"mutations": "M1A,K2A:T3W"}
    names = ["one"] if "mutations" in options else []
    settings = {"batch_tokens": 60, "workers": 1, **options}
    whole = score(configure(tmp_path, model, *names, out_dir=tmp_path / "whole", **settings))
    computed = stop_after(monkeypatch, 5)
    with pytest.raises(Stop):
        score(configure(tmp_path, model, *names, **settings))
    assert len(computed) == 5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["in_scores.part"], "nothing half made"
    with refused("score.run-exists", differing=["precision"]):
        score(configure(tmp_path, model, *names, **settings, precision="bfloat16"))
    monkeypatch.undo()
    kept = len(Journal(tmp_path / "out" / "in_scores.part" / "values.bin").counts)
    assert kept > 0
    computed = stop_after(monkeypatch, 10**6)
    result = score(configure(tmp_path, model, *names, **settings))
    total = sum(1 for _ in masked_passes.split_passes(_steps(configure(tmp_path, model, *names, **settings)), 60))
    assert len(computed) == total - kept, "what the journal has is not computed again"
    assert result.scores.read_bytes() == whole.scores.read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in result.files)


def _steps(config: ScoreConfig):
    from esm2kit.scoring.score import ScoreJob

    return ScoreJob(config, [Path(config.fasta)], config.mutations, Path("unused")).scan.steps()


def test_an_interrupt_is_reported_and_loses_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stop_after(monkeypatch, 3, KeyboardInterrupt)
    fasta = write_fasta(tmp_path / "in.fasta")
    arguments = [
        "score",
        str(fasta),
        "--model",
        str(model),
        "--out_dir",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--pictures",
        "0",
    ]
    arguments += ["--batch_tokens", "60"]
    assert main(arguments) == 130
    assert "Run the same command again to resume" in capsys.readouterr().err
    monkeypatch.undo()
    computed = stop_after(monkeypatch, 10**6)
    assert main(arguments) == 0
    assert sum(computed) < 60
    assert json.loads(capsys.readouterr().out)["num_scores"] == 1140


def test_a_killed_run_resumes(tmp_path: Path, model: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta")
    with open(fasta, "a", encoding="utf-8") as file:
        file.write(f">long\n{SEQUENCES['one'] * 30}\n")
    arguments = [sys.executable, "-m", "esm2kit", "score", str(fasta), "--model", str(model), "--workers", "1"]
    whole = [*arguments, "--out_dir", str(tmp_path / "whole")]
    killed = [*arguments, "--out_dir", str(tmp_path / "killed")]
    subprocess.run(whole, check=True, capture_output=True)
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "killed" / "in_scores.part" / "values.bin"
    end = time.monotonic() + 120
    while not (journal.exists() and journal.stat().st_size > 20_000) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was still running"
    assert list((tmp_path / "killed").glob("*.tsv")) == []
    done = subprocess.run(killed, check=True, capture_output=True, text=True)
    assert "resuming" in done.stderr
    one, two = ((tmp_path / name / "in_scores.tsv").read_bytes() for name in ("whole", "killed"))
    assert one == two


def test_the_journal_keeps_whole_batches_only(tmp_path: Path) -> None:
    path = tmp_path / "values.bin"
    journal, batches = Journal(path), [np.arange(3, dtype=np.float32), np.ones(1, np.float32), np.zeros(5, np.float32)]
    for values in batches:
        journal.append(values)
    journal.close()
    content = path.read_bytes()
    values = JournalValues(path)
    np.testing.assert_array_equal(values.read(2), [0, 1])
    np.testing.assert_array_equal(values.read(4), [2, 1, 0, 0])
    assert values.read(0).shape == (0,)
    with pytest.raises(EOFError):
        values.read(4)
    starts = np.cumsum([0] + [16 + each.nbytes for each in batches])
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        journal = Journal(path)
        journal.close()
        expected = int((starts <= cut).sum()) - 1
        assert len(journal.counts) == expected
        assert path.read_bytes() == content[: starts[expected]]
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        journal = Journal(path)
        journal.close()
        assert len(journal.counts) == int((starts <= place).sum()) - 1, "a damaged batch and those after it"


@pytest.mark.parametrize("suffix", ["tsv", "h5", "json"])
def test_damage_is_found(suffix: str, tmp_path: Path, model: Path) -> None:
    result = score(configure(tmp_path, model))
    assert check(CheckConfig(tmp_path / "out")).startswith("3 files (")
    path = next(path for path in result.files if path.suffix == f".{suffix}")
    assert check(CheckConfig(path)).startswith("3 files (" if suffix == "json" else "1 file (")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for place in (tmp_path / "out", path):
        with refused("check.damaged") as error:
            check(CheckConfig(place))
        assert str(path) in str(error.value)
    with refused("file.damaged", path=path):
        score(configure(tmp_path, model))
    path.unlink()
    if suffix != "json":
        with refused("file.missing", path=path):
            score(configure(tmp_path, model))
    assert score(configure(tmp_path, model, restart=True)).files == result.files


def test_the_hdf5_file_says_what_it_is(tmp_path: Path, model: Path) -> None:
    result = score(configure(tmp_path, model, "one", strategy="mutant-marginals"))
    with h5py.File(result.tables) as file:
        assert file.attrs["residues"] == STANDARD_RESIDUES
        assert file.attrs["strategy"] == "mutant-marginals"
        provenance = json.loads(file.attrs["provenance"])
        assert provenance["stage"] == "score"
        assert set(provenance["inputs"]) == {"fasta", "model"}
        assert list(file["0"]) == ["log_odds"]
        assert file["0"].attrs["original_id"] == "one"
    with refused("scores.no-table", name="entropy", strategy="mutant-marginals"):
        result.entropy()
    manifest = json.loads(result.manifest.read_text())
    assert manifest["provenance"]["config"]["strategy"] == "mutant-marginals"
    assert manifest["summary"]["num_scores"] == 22 * 19


def test_positions_and_an_offset(tmp_path: Path, model: Path) -> None:
    whole = score(configure(tmp_path, model, "one"))
    result = score(configure(tmp_path, model, "one", positions="31-32,40", offset=30, name="some"))
    rows = read_rows(result.scores)
    assert [row["mutation"] for row in rows][::19] == ["M31L", "K32L", "R40L"]
    assert {row["window"] for row in rows} == {"31-52"}
    assert {row["position"] for row in rows} == {"31", "32", "40"}
    np.testing.assert_allclose(result.table()[[0, 1, 9]], whole.table()[[0, 1, 9]], atol=1e-5)
    names = np.array(["M31", "K32", "R40"])[np.argsort(-result.table()[[0, 1, 9]].sum(1))]
    assert (result.most_tolerated, result.least_tolerated) == (names[0], names[2])
    listed = score(configure(tmp_path, model, "one", mutations="M31L", offset=30, name="listed"))
    assert float(read_rows(listed.scores)[0]["score"]) == pytest.approx(float(rows[0]["score"]), abs=1e-5)


def test_windows_of_a_long_protein_are_named(tmp_path: Path, model: Path) -> None:
    result = score(configure(tmp_path, model, "three", max_residues=10, mutations="M1A,V10A,L26A,M1A:L26A"))
    assert [row["window"] for row in read_rows(result.scores)] == ["1-11", "4-15", "16-26", "1-11:16-26"]


def test_a_journal_of_other_batches_is_not_used(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 5)
    settings = {"batch_tokens": 60, "workers": 1}
    with pytest.raises(Stop):
        score(configure(tmp_path, model, **settings))
    monkeypatch.undo()
    path = tmp_path / "out" / "in_scores.part" / "values.bin"
    path.unlink()
    journal = Journal(path)
    journal.append(np.zeros(33, np.float32))  # the first batch has two passes
    journal.close()
    with refused("file.damaged", path=path):
        score(configure(tmp_path, model, **settings))
    assert score(configure(tmp_path, model, **settings, restart=True)).num_scores == 1140


def test_what_is_not_scored_is_said(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "esm2kit"):
        result = score(configure(tmp_path, model))
    assert "1 residue is not among the 20 standard ones and is not scored" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "esm2kit"):
        alone = score(configure(tmp_path, model, "one", name="alone"))
    assert "standard" not in caplog.text
    assert f"most tolerated positions: {alone.most_tolerated}" in caplog.text
    with caplog.at_level(logging.INFO, "esm2kit"):
        fast = score(configure(tmp_path, model, sequences=True, fast=True, sample=2, name="fast"))
    assert f"the estimate is off by {fast.mean_error:.2g} per residue on average" in caplog.text
    assert result.num_scores == 1140
    (tmp_path / "x.fasta").write_text(">x\nXXXX\n", encoding="utf-8")
    for options in ({}, {"sequences": True}):
        with refused("score.nothing"):
            score(ScoreConfig(tmp_path / "x.fasta", model=str(model), out_dir=tmp_path / "none", **options))
    assert not list((tmp_path / "none").iterdir())


def test_bad_input_is_refused(tmp_path: Path, model: Path) -> None:
    with refused("score.both", found=["sequences", "mutations"]):
        configure(tmp_path, model, sequences=True, mutations="M1A")
    for strategy in ("wt-marginals", "mutant-marginals"):
        with refused("score.sequences-strategy", strategy=strategy):
            configure(tmp_path, model, sequences=True, strategy=strategy)
    configure(tmp_path, model, sequences=True, strategy="pseudo-ppl")
    with refused("mutations.no-table", found="activity"):
        score(configure(tmp_path, model, measured="activity", name="measured"))
    with refused("score.fast"):
        configure(tmp_path, model, fast=True)
    with refused("score.mask-together", strategy="wt-marginals"):
        configure(tmp_path, model, mask_together=True, strategy="wt-marginals")
    with refused("config.choice", name="strategy", found="wildtype"):
        configure(tmp_path, model, strategy="wildtype")
    with refused("option.range", name="passes", found=0):
        configure(tmp_path, model, passes=0)
    with refused("fasta.absent"):
        ScoreConfig(tmp_path / "none.fasta").check_inputs()
    with refused("model.unknown", name="esm3"):
        configure(tmp_path, "esm3").check_inputs()
    (tmp_path / "twice.fasta").write_text(">a\nMK\n>a\nMR\n")
    with refused("score.ambiguous-id", id="a", records=(1, 2)):
        score(ScoreConfig(tmp_path / "twice.fasta", model=str(model), out_dir=tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())
