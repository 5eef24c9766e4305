"""Inputs from public bug reports, and what they must give."""

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.compare import compare
from esm2kit.benchmarking.config import BenchmarkConfig, CompareConfig
from esm2kit.benchmarking.model_features import drop_missing, read_features
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
from esm2kit.embedding.hdf5 import EmbeddingReader, seal_file
from esm2kit.tasks.data import load_task

QUIET = {"seeds": [0], "resamples": 100, "untrained": False, "baselines": [], "download": False, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors"))


def write_csv(
    path: Path, order: np.ndarray, header: str = "sequence,target,set,validation", num: int = 60
) -> list[str]:
    """Write proteins without ids, in any order; the number of leucines is the target."""
    generator = np.random.default_rng(1)
    rows = []
    for place in range(60):
        letters = generator.choice(list("ACDEFGHIKNPQRSTVWY"), 24)
        letters[: place % 12] = "L"
        kind = "test" if place % 3 == 0 else "train"
        rows.append(f"{''.join(letters)},{place % 12 + 0.5},{kind},{place % 6 == 1}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(["sequence,target,set,validation", *(rows[place] for place in order)]) + "\n", encoding="utf-8"
    )
    return [rows[place].split(",")[0] for place in order]


def run(folder: Path, split: str, **keywords) -> tuple[float, Path]:
    out = keywords.pop("out_dir", folder / f"out_{split}")
    config = BenchmarkConfig("noid", split=split, data_dir=folder, out_dir=out, **QUIET | keywords)
    return benchmark(config).first.metrics["spearman"].value, out


def shuffled() -> np.ndarray:
    return np.random.default_rng(2).permutation(60)


@pytest.mark.parametrize("layout", ["packed", "datasets"])
@pytest.mark.parametrize("probe", ["ridge", "light_attention"])
def test_vectors_of_the_same_proteins_in_another_order_give_the_same_score(tmp_path, model, layout, probe):
    """sacdallago/bio_embeddings#42, tsenoner/protspace#472: ids Sequence0, ... were joined by position."""
    sequences = write_csv(tmp_path / "noid" / "a.csv", np.arange(60))
    write_csv(tmp_path / "noid" / "b.csv", shuffled())
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">Sequence{place}\n{sequence}\n" for place, sequence in enumerate(sequences)))
    per_residue = probe == "light_attention"
    found = embed(EmbedConfig(fasta, tmp_path / "e", model=model, per_residue=True, layout=layout, device="cpu"))
    path, name = (found.hiddens, "hiddens") if per_residue else (found.embeddings, "embeddings")
    data = load_task("noid", "b", tmp_path)
    features = read_features(path, data, per_residue).features
    with EmbeddingReader(path) as reader, closing(features):
        expected = np.concatenate([np.atleast_2d(reader[f"Sequence{place}"]) for place in shuffled()])
        read = features.take(np.arange(len(expected))).numpy()
    np.testing.assert_array_equal(read, expected)
    if not per_residue:
        scores = [run(tmp_path, split, **{name: path}, model=None, probe=probe)[0] for split in "ab"]
        assert scores[1] == pytest.approx(scores[0], abs=1e-6)
        assert scores[0] > 0.5, "the task has a signal that a join by position would lose"


def test_a_protein_with_another_sequence_is_refused_by_name(tmp_path, model):
    sequences = write_csv(tmp_path / "noid" / "a.csv", np.arange(60))
    changed = [*sequences[:7], "M" + sequences[7], sequences[8][::-1], *sequences[9:]]
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">Sequence{place}\n{sequence}\n" for place, sequence in enumerate(changed)))
    path = embed(EmbedConfig(fasta, tmp_path / "e", model=model, device="cpu")).embeddings
    data = load_task("noid", "a", tmp_path)
    with refused("embeddings.sequence", path=path, protein="Sequence7", differ=2, proteins=60):
        run(tmp_path, "a", embeddings=path, model=None)
    assert len(drop_missing(data, path, allow_missing=True).ids) == 58
    # other ids for the same sequences are not a difference
    fasta.write_text("".join(f">sp|A{place}|X\n{sequence}\n" for place, sequence in enumerate(sequences)))
    renamed = embed(EmbedConfig(fasta, tmp_path / "r", model=model, device="cpu")).embeddings
    assert drop_missing(data, renamed, allow_missing=False) is data


def test_one_id_for_two_sequences_reads_the_vector_of_each(tmp_path, model):
    """A task may repeat an id; each record gets the vector of its own sequence."""
    (tmp_path / "twice").mkdir()
    records = [("a", "MKTAYIAK"), ("a", "WWWLLLGG"), ("b", "ACDEFGHI"), ("c", "KLMNPQRS"), ("d", "TVWYACDE")]
    sets = ["train", "train", "train,True", "test", "test"]
    rows = [f"{','.join(records[place])},{place}.5,{sets[place]}" for place in range(5)]
    (tmp_path / "twice" / "s.csv").write_text("id,sequence,target,set,validation\n" + "\n".join(rows) + "\n")
    fasta = tmp_path / "all.fasta"
    fasta.write_text("".join(f">x{place}\n{sequence}\n" for place, (_, sequence) in enumerate(records)))
    path = embed(EmbedConfig(fasta, tmp_path / "e", model=model, device="cpu")).embeddings
    features = read_features(path, load_task("twice", "s", tmp_path), False).features
    with EmbeddingReader(path) as reader:
        np.testing.assert_array_equal(features.take(np.arange(5)).numpy(), reader.matrix())


@pytest.mark.parametrize("ids", ["Sequence{}", "P{:05d}A"])
def test_files_that_do_not_record_sequences_are_joined_by_id_unless_it_is_a_position(tmp_path, model, ids):
    """Files of version 0.1.0."""
    write_csv(tmp_path / "noid" / "a.csv", np.arange(60))
    sequences = write_csv(tmp_path / "noid" / "b.csv", shuffled())
    names = [ids.format(place) for place in range(60)]
    text = (tmp_path / "noid" / "b.csv").read_text().splitlines()
    rows = [f"id,{text[0]}", *(f"{name},{row}" for name, row in zip(names, text[1:], strict=True))]
    (tmp_path / "noid" / "b.csv").write_text("\n".join(rows) + "\n")
    fasta = tmp_path / "b.fasta"
    backwards = zip(names[::-1], sequences[::-1], strict=True)
    fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in backwards))
    path = embed(EmbedConfig(fasta, tmp_path / "e", model=model, device="cpu")).embeddings
    with h5py.File(path, "r+") as file:
        del file.attrs["sequences_00000"]
    seal_file(path)
    data = load_task("noid", "b", tmp_path)
    if ids == "Sequence{}":
        with refused("embeddings.positions", path=path, id="Sequence0"):
            drop_missing(data, path, allow_missing=True)
        return
    features = read_features(path, data, False).features
    with EmbeddingReader(path) as reader:
        np.testing.assert_array_equal(features.take(np.arange(60)).numpy(), reader.matrix(names))


def test_a_benchmark_reads_the_file_that_it_embedded_before_sequences_were_recorded(tmp_path, model):
    write_csv(tmp_path / "noid" / "a.csv", np.arange(60))
    score, out = run(tmp_path, "a", model=model)
    (path,) = (out / "embeddings").glob("*/trained_embeddings.h5")
    with h5py.File(path, "r+") as file:
        del file.attrs["sequences_00000"]
    seal_file(path)
    assert run(tmp_path, "a", model=model)[0] == score
    with EmbeddingReader(path) as reader:
        assert reader._digests is None, "the file was not embedded again"


def test_reports_on_the_same_proteins_in_another_order_are_compared_protein_by_protein(tmp_path, model):
    """Predictions are joined by sequence too, so the paired difference does not depend on the order of the records."""
    other = str(write_tiny_model(tmp_path / "other.safetensors", seed=1))
    for name, order in (("same", np.arange(60)), ("moved", shuffled())):
        write_csv(tmp_path / name / "noid" / "a.csv", order)
    _, a = run(tmp_path / "same", "a", model=model)
    pairs = {}
    for name in ("same", "moved"):
        _, b = run(tmp_path / name, "a", model=other, out_dir=tmp_path / name / "other")
        (found,) = compare(CompareConfig([a, b], tmp_path / name)).pairs
        pairs[name] = [found.comparison.difference, found.comparison.low, found.comparison.high]
    np.testing.assert_allclose(pairs["moved"], pairs["same"], atol=1e-6)
    # the same ids and targets with other sequences are another test set
    text = (tmp_path / "same" / "noid" / "a.csv").read_text()
    (tmp_path / "third" / "noid").mkdir(parents=True)
    text = re.sub(r"^[A-Z]+", lambda found: found[0][::-1], text, flags=re.M)
    (tmp_path / "third" / "noid" / "a.csv").write_text(text)
    _, c = run(tmp_path / "third", "a", model=model)
    different = compare(CompareConfig([a, c], tmp_path / "different"))
    assert not different.pairs
    (line,) = different.unpaired
    assert str(a) in line
    assert str(c) in line
    sections = re.findall("<h2>(.*?)</h2>", different.html.read_text(encoding="utf-8"))
    assert sections == ["noid, a (test set of tiny, ridge #1)", "noid, a (test set of tiny, ridge #2)"]


def test_predictions_of_another_report_are_refused(tmp_path, model):
    """A predictions.npz that was copied from another folder gives a wrong paired difference."""
    write_csv(tmp_path / "noid" / "a.csv", np.arange(60))
    folders = [run(tmp_path, "a", model=model, repr_layer=n, out_dir=tmp_path / f"layer{n}")[1] for n in (0, 1, 2)]
    assert len(compare(CompareConfig(folders[:2], tmp_path / "c")).pairs) == 1
    path = folders[1] / "predictions.npz"
    path.write_bytes((folders[2] / "predictions.npz").read_bytes())
    with refused("report.other-predictions", path=path):
        compare(CompareConfig(folders[:2], tmp_path / "again"))


@pytest.mark.parametrize("ids", ["GFP A{}K", "v{} rep1"])
def test_ids_with_blanks_give_the_same_score_as_ids_without(tmp_path, model, ids):
    """Ids cut at the first blank: klebgenomics/Kleborate#64."""
    predicted = []
    for style in (ids, "p{}"):
        folder = tmp_path / style[:1]
        folder.mkdir()
        write_csv(folder / "t.csv", np.arange(60))
        header, *rows = (folder / "t.csv").read_text().splitlines()
        rows = [f"{style.format(number)},{row}" for number, row in enumerate(rows)]
        (folder / "t.csv").write_text("\n".join([f"id,{header}", *rows]) + "\n")
        benchmark(BenchmarkConfig("t", data_dir=folder, model=model, out_dir=folder / "out", **QUIET))
        with np.load(folder / "out" / "predictions.npz") as found:
            predicted.append(next(found[name] for name in found if name.startswith("predicted/")))
    np.testing.assert_array_equal(*predicted)
    assert np.ptp(predicted[0]) > 0


def test_classes_are_compared_by_their_labels(tmp_path, model):
    """The train set of one report has a class more, which changes the number of every class but not the test set."""
    scores, folders = [], []
    for name, rename in (
        ("few", {}),
        ("more", {"A0": "AAA"}),
        ("swapped", {"high": "low", "low": "high"}),
    ):
        sequences = [row.split(",")[0] for row in write_csv(tmp_path / name / "noid" / "a.csv", np.arange(60))]
        lines = ["id,sequence,target,set,validation"]
        for place, sequence in enumerate(sequences):
            label = "A0" if place % 3 == 2 and place < 12 and name == "more" else "high" if place % 12 > 5 else "low"
            kind = "test" if place % 3 == 0 else "train"
            lines.append(f"p{place},{sequence},{rename.get(label, label)},{kind},{place % 6 == 1}")
        (tmp_path / name / "noid" / "a.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = BenchmarkConfig("noid", split="a", data_dir=tmp_path / name, model=model, **QUIET)
        config = replace(config, out_dir=tmp_path / f"out_{name}")
        scores.append(benchmark(config).first.metrics["accuracy"].value)
        folders.append(config.out_dir)
    few, more, swapped = folders
    (pair,) = compare(CompareConfig([few, more], tmp_path / "c")).pairs
    assert pair.comparison.difference == pytest.approx(scores[0] - scores[1])
    assert not compare(CompareConfig([few, swapped], tmp_path / "d")).pairs


def test_the_same_report_twice_is_not_a_comparison(tmp_path, model):
    write_csv(tmp_path / "noid" / "a.csv", np.arange(60))
    _, out = run(tmp_path, "a", model=model)
    with refused("compare.same-report", path=out / "report.json"):
        compare(CompareConfig([out, out / "report.html"], tmp_path / "c"))
    with refused("report.absent", path=tmp_path / "report.json") as caught:
        compare(CompareConfig([out, tmp_path], tmp_path / "c"))
    assert f"Pass {out}" in str(caught.value)


def test_reports_on_different_tasks_say_that_nothing_was_compared(tmp_path, model, caplog):
    for split, num_proteins in (("a", 60), ("b", 48)):
        write_csv(tmp_path / "noid" / f"{split}.csv", np.arange(num_proteins))
    folders = [run(tmp_path, split, model=model)[1] for split in "ab"]
    found = compare(CompareConfig(folders, tmp_path / "c"))
    assert found.unpaired == ["no two reports are on the same task and split, so no scores were compared"]
    assert found.unpaired[0] in caplog.messages
