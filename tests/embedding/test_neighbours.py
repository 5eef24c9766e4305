"""`esm2kit neighbours`: exact search, reliability index, transferred labels, simpler methods, and refused input."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit import EmbedConfig, EmbeddingReader, NeighboursConfig, embed, find_neighbours
from esm2kit.cli.check import CheckConfig, check
from esm2kit.cli.main import main
from esm2kit.embedding import neighbours as stage
from esm2kit.embedding import search
from esm2kit.embedding.search import Vectors, compute_centre, find_nearest
from esm2kit.embedding.transfer import (
    VECTORS,
    Labels,
    choose_labels,
    compute_reliability,
    evaluate_transfer,
    transfer_labels,
)
from esm2kit.sequences.homologs import Hits

LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
MODEL = "tiny.safetensors"


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("tile", [(1, 1), (3, 7), (64, 64)])
@pytest.mark.parametrize("centred", [True, False])
def test_neighbours_equal_an_exhaustive_search_in_any_tiles(
    tile: tuple[int, int], centred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "QUERY_ROWS", tile[0])
    monkeypatch.setattr(search, "REFERENCE_ROWS", tile[1])
    generator = np.random.default_rng(0)
    queries, references = generator.normal(3, 1, (10, 16)), generator.normal(3, 1, (50, 16))
    centre = compute_centre(Vectors.from_array(references)) if centred else None
    found = find_nearest(Vectors.from_array(queries), Vectors.from_array(references), 6, centre)
    shift = references.mean(0) if centred else 0.0
    brute = NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(references - shift)
    distances, rows = brute.kneighbors(queries - shift)
    np.testing.assert_array_equal(found.rows_QK, rows)
    np.testing.assert_allclose(found.scores_QK, 1 - distances, atol=6e-7)


@pytest.mark.parametrize("tile", [1, 2, 100])
def test_ties_are_in_the_order_of_the_reference(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "REFERENCE_ROWS", tile)
    references = np.array([[0.0, 1], [1, 0], [2, 0], [1, 1e-9], [-1, 0], [0, 0], [3, 0]])
    queries = np.array([[5.0, 0]])
    found = find_nearest(Vectors.from_array(queries), Vectors.from_array(references), 7)
    assert found.rows_QK.tolist() == [[1, 2, 3, 6, 0, 5, 4]], "a vector of zeros has a cosine of 0"
    assert found.scores_QK.tolist() == [[1, 1, 1, 1, 0, 0, -1]]


def test_groups_are_excluded_and_missing_neighbours_are_marked() -> None:
    vectors = Vectors.from_array(np.eye(3))
    found = find_nearest(vectors, vectors, 3, None, np.array([0, 1, 9]), np.array([0, 0, 2]))
    assert found.rows_QK.tolist() == [[2, -1, -1], [1, 0, 2], [2, 0, 1]]


def test_a_reference_of_one_vector_has_no_centre() -> None:
    with refused("neighbours.one-vector", found=2):
        compute_centre(Vectors.from_array(np.ones((2, 3))))


def test_the_reliability_index_is_that_of_gopredsim() -> None:
    labels = Labels("family", "class", ("a", "b"), np.array([0.0, 1.0, 1.0, 0.0]))
    hits = Hits(np.array([[0, 1, 2], [3, 1, -1]]), np.array([[0.9, 0.5, 0.6], [0.8, -0.4, 0.0]]))
    # sum of the similarities of the hits with the label / number of hits; negative ones count as 0
    expected = [[0.9 / 3, 1.1 / 3, 1.1 / 3], [0.8 / 2, 0.0, 0.0]]
    np.testing.assert_allclose(compute_reliability(labels, hits), expected)
    found = transfer_labels(labels, hits)
    assert found.values_Q.tolist() == [1.0, 0.0], "two hits outweigh a nearer one"
    np.testing.assert_allclose(found.reliability_Q, [1.1 / 3, 0.4])
    values = Labels("Tm", "value", (), np.array([40.0, 50.0, 60.0, 70.0]))
    found = transfer_labels(values, hits)
    np.testing.assert_allclose(found.values_Q, [(0.9 * 40 + 0.5 * 50 + 0.6 * 60) / 2.0, 70.0])
    np.testing.assert_allclose(found.reliability_Q, [2.0 / 3, 0.8 / 2])
    nothing = transfer_labels(values, Hits(np.full((1, 2), -1), np.zeros((1, 2))))
    assert np.isnan(nothing.values_Q).all()


def test_classes_values_and_columns_are_told_apart() -> None:
    columns = {
        "family": ["a", None, "b"],
        "Tm (C)": ["40", "41.5", None],
        "class": ["1", "2", "1"],
        "mixed": ["x", "1", "2"],
    }
    found = choose_labels(columns, "tm", None)
    assert (found.column, found.type) == ("Tm (C)", "value")
    np.testing.assert_array_equal(found.values_R, [40, 41.5, np.nan])
    assert choose_labels(columns, "class", None).type == "class", "few integers"
    assert choose_labels(columns, "class", "value").values_R.tolist() == [1, 2, 1]
    family = choose_labels(columns, "family", None)
    assert [family.format(value) for value in family.values_R] == ["a", "", "b"]
    assert choose_labels({"only": ["a"]}, None, None).column == "only"
    with refused("neighbours.target", target=None):
        choose_labels(columns, None, None)
    with refused("neighbours.target", target="pH"):
        choose_labels(columns, "pH", None)
    with refused("neighbours.number", column="mixed", found="x"):
        choose_labels(columns, "mixed", "value")


def test_leaving_out_equals_scikit_learn_and_the_verdict_names_the_better_method() -> None:
    generator = np.random.default_rng(4)
    truth = generator.integers(0, 3, 60)
    good = np.eye(3)[truth] + generator.normal(0, 0.35, (60, 3))
    noise = generator.normal(0, 1, (60, 3))
    labels = Labels("family", "class", ("a", "b", "c"), truth.astype(float))
    rows = np.arange(60)
    hits = {
        name: find_nearest(*(Vectors.from_array(values),) * 2, 5, None, rows, rows)
        for name, values in ((VECTORS, noise), ("composition", good), ("alignment", noise))
    }
    found = evaluate_transfer(labels, rows, hits, 200)
    for name, values in ((VECTORS, noise), ("composition", good)):
        correct = []
        for row in rows:
            others = rows != row
            knn = KNeighborsClassifier(5, metric="cosine", weights=lambda distance: np.maximum(1 - distance, 0))
            correct.append(knn.fit(values[others], truth[others]).predict(values[[row]])[0] == truth[row])
        assert found.scores[name].interval.value == pytest.approx(np.mean(correct), abs=1e-9)
    assert found.differences["composition"].high < 0
    assert (
        "The simpler composition and most frequent class are better than the vectors: use one of them." in found.verdict
    )
    assert "not distinguishable from alignment" in found.verdict
    swapped = evaluate_transfer(labels, rows, {VECTORS: hits["composition"], "composition": hits[VECTORS]}, 200)
    assert "The vectors are better than composition and most frequent class." in swapped.verdict
    assert sum(each["num_proteins"] for each in swapped.bins) == 60
    expected = np.average(
        [each["expected"] for each in swapped.bins], weights=[each["num_proteins"] for each in swapped.bins]
    )
    assert expected == pytest.approx(swapped.scores[VECTORS].interval.value)
    lowest = [each["lowest"] for each in swapped.bins]
    assert lowest == sorted(lowest, reverse=True)
    assert swapped.find_expected(1.0) == swapped.bins[0]["expected"]
    assert swapped.find_expected(0.0) == swapped.bins[-1]["expected"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shutil, "which", lambda name: None)  # MMseqs2 may not be installed
    generator = np.random.default_rng(0)
    families = ["".join(generator.choice(LETTERS, 40)) for _ in range(3)]

    def mutate(sequence: str, share: float) -> str:
        return "".join(generator.choice(LETTERS) if generator.random() < share else letter for letter in sequence)

    reference = {f"sp|P6900{row:02d}|R{row}": mutate(families[row % 3], 0.2) for row in range(24)}
    queries = {f"q{row}": mutate(families[row], 0.3) for row in range(3)} | {"same": list(reference.values())[4]}
    for name, records in (("known", reference), ("my", queries)):
        text = "".join(f">{key} text\n{value}\n" for key, value in records.items())
        (tmp_path / f"{name}.fasta").write_text(text, encoding="utf-8")
    rows = "".join(f"P6900{row:02d},f{row % 3},{40 + 10 * (row % 3) + row / 10}\n" for row in range(24) if row != 7)
    (tmp_path / "labels.csv").write_text(f"protein,family,Tm\n{rows}", encoding="utf-8")
    write_tiny_model(tmp_path / MODEL)
    return tmp_path


def build_config(folder: Path, **options) -> NeighboursConfig:
    given = {"reference": folder / "known.fasta", "model": str(folder / MODEL), "out_dir": folder / "out"}
    return NeighboursConfig(folder / "my.fasta", **(given | {"resamples": 50} | options))


def test_a_search_in_a_fasta(folder: Path) -> None:
    made = find_neighbours(build_config(folder, k=4))
    assert (made.num_proteins, made.num_reference, made.num_identical, made.verdict) == (4, 24, 1, None)
    written = {path for path in (folder / "out").iterdir() if not path.name.startswith(".")}
    assert set(made.files) == written
    with (
        EmbeddingReader(folder / "out" / "known_embeddings.h5") as known,
        EmbeddingReader(folder / "out" / "my_embeddings.h5") as mine,
    ):
        shift = known.matrix().mean(0, dtype=np.float64)
        brute = NearestNeighbors(n_neighbors=4, metric="cosine", algorithm="brute").fit(known.matrix() - shift)
        distances, expected = brute.kneighbors(mine.matrix() - shift)
        ids = known.ids
    rows = read_rows(made.neighbours)
    assert [row["neighbour"] for row in rows] == [ids[row] for row in expected.ravel()]
    np.testing.assert_allclose([float(row["cosine"]) for row in rows], 1 - distances.ravel(), atol=2e-6)
    assert [row["rank"] for row in rows] == list("1234") * 4
    nearest = {row["query"]: row for row in read_rows(made.nearest)}
    same = nearest["same"]
    assert (same["nearest"], same["cosine"], same["in_reference"], same["identity"]) == (
        ids[4],
        "1.000000",
        "yes",
        "1.0000",
    )
    assert same["nearest_by_composition"] == same["nearest_by_alignment"] == ids[4]
    for number in range(3):
        row = int(nearest[f"q{number}"]["nearest_by_alignment"].partition("|R")[2])
        assert row % 3 == number, "an alignment finds the family"
        assert float(nearest[f"q{number}"]["identity_by_alignment"]) > 0.5
    assert "nearest_by_mmseqs" not in same
    before = {path: path.read_bytes() for path in made.files}
    assert find_neighbours(build_config(folder, k=4)) == made
    find_neighbours(build_config(folder, k=4, restart=True))
    assert {path: path.read_bytes() for path in made.files[:4]} == {path: before[path] for path in made.files[:4]}
    with refused("neighbours.file-exists", differing=["k"]):
        find_neighbours(build_config(folder, k=3))
    assert check(CheckConfig(folder / "out")).startswith("5 files")
    made.nearest.write_bytes(made.nearest.read_bytes().replace(b"same", b"Same"))
    with refused("check.damaged"):
        check(CheckConfig(folder / "out"))


def test_labels_are_transferred_and_identical_proteins_excluded(folder: Path) -> None:
    config = build_config(folder, labels=folder / "labels.csv", target="family", exclude_identical=True)
    made = find_neighbours(config)
    assert (made.num_reference, made.num_identical) == (23, 1), "one has no label"
    assert made.verdict is not None
    assert made.verdict.startswith("family, leaving each of 23 reference proteins out: accuracy of vectors ")
    hits = [row for row in read_rows(made.neighbours) if row["query"] == "same"]
    assert {row["identical"] for row in hits} == {"no"}
    family = {f"sp|P6900{row:02d}|R{row}": f"f{row % 3}" for row in range(24)}
    for row in hits:
        assert row["family"] == family[row["neighbour"]]
        alike = sum(max(0.0, float(hit["cosine"])) for hit in hits if hit["family"] == row["family"])
        assert float(row["reliability"]) == pytest.approx(alike / 5, abs=1e-4)
    nearest = {row["query"]: row for row in read_rows(made.nearest)}
    assert nearest["same"]["in_reference"] == "yes", "although it was left out"
    best = max(hits, key=lambda hit: float(hit["reliability"]))
    assert (nearest["same"]["family"], nearest["same"]["reliability"]) == (best["family"], best["reliability"])
    assert [nearest[f"q{number}"]["family_by_alignment"] for number in range(3)] == ["f0", "f1", "f2"]
    summary = json.loads(made.summary.read_text(encoding="utf-8"))["summary"]
    scores = summary["leave_one_out"]["scores"]
    assert list(scores) == ["vectors", "composition", "alignment", "most frequent class"]
    assert scores["alignment"]["value"] == 1.0
    assert "alignment" in made.verdict
    values = find_neighbours(replace(config, target="tm", name="values"))
    expected = [float(row["Tm_by_alignment"]) for row in read_rows(values.nearest)]
    np.testing.assert_allclose(expected, [41.2, 51.2, 61.2, 51.2], atol=1.5)
    assert "expected_error" in read_rows(values.nearest)[0]


def test_a_file_of_vectors_as_reference(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = str(folder / MODEL)
    options = {"model": model, "repr_layers": [1], "untrained_seed": 3, "layout": "packed"}
    vectors = embed(EmbedConfig(folder / "known.fasta", folder / "vectors", **options))
    by_file = find_neighbours(build_config(folder, reference=vectors.embeddings, model=None))
    with EmbeddingReader(folder / "out" / "my_embeddings.h5") as reader:
        assert reader.attributes["layer"] == 1
        assert reader.attributes["settings"]["model"] == reader.attributes["provenance"]["model"]["sha256"]
        assert reader.attributes["provenance"]["model"]["untrained_seed"] == 3
    assert {row["in_reference"] for row in read_rows(by_file.nearest)} == {"yes", "no"}
    assert read_rows(by_file.nearest)[0]["identity"], "the FASTA of the vectors was found"
    (folder / "known.fasta").rename(folder / "moved.fasta")
    config = build_config(folder, reference=vectors.embeddings, model=None, name="moved")
    alone = find_neighbours(config)
    assert "pass its FASTA file by --reference_fasta" in caplog.text
    assert read_rows(alone.nearest)[0]["identity"] == ""
    assert [row["cosine"] for row in read_rows(alone.nearest)] == [row["cosine"] for row in read_rows(by_file.nearest)]
    found = find_neighbours(replace(config, reference_fasta=folder / "moved.fasta", name="given"))
    assert found.nearest.read_text() == by_file.nearest.read_text()
    with refused("neighbours.reference-fasta", missing="sp|P690000|R0"):
        find_neighbours(replace(config, reference_fasta=folder / "my.fasta", name="wrong"))


def test_vectors_of_another_kind_are_refused(folder: Path) -> None:
    model = str(folder / MODEL)
    made = embed(EmbedConfig(folder / "known.fasta", folder / "v", model=model, per_residue=True, bos=True))
    other = write_tiny_model(folder / "other.safetensors", seed=1)
    with refused("neighbours.model", found="tiny", expected="other"):
        find_neighbours(build_config(folder, reference=made.embeddings, model=str(other)))
    with refused("neighbours.pooling", found="none"):
        find_neighbours(build_config(folder, reference=made.hiddens))
    with refused("neighbours.pooling", found="bos"):
        find_neighbours(build_config(folder, reference=folder / "v" / "known_bos_embeddings.h5"))
    with refused("neighbours.precision", found="float32", expected="bfloat16"):
        find_neighbours(build_config(folder, reference=made.embeddings, precision="bfloat16"))
    with refused("embeddings.absent"):
        build_config(folder, reference=folder / "none.h5").check_inputs()
    with refused("neighbours.no-labels", name="target"):
        build_config(folder, target="Tm")
    with refused("table.absent"):
        find_neighbours(build_config(folder, labels=folder / "none.csv"))
    with refused("neighbours.target"):
        find_neighbours(build_config(folder, labels=folder / "labels.csv"))
    assert not list((folder / "out").glob("my_*")), "refused before the queries were embedded"


def test_an_interrupt_leaves_no_table_and_the_next_call_the_same_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = find_neighbours(build_config(folder, name="whole")).neighbours.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage, "compute_identity", interrupt)
        with pytest.raises(KeyboardInterrupt):
            find_neighbours(build_config(folder))
    assert not list((folder / "out").glob("my_ne*"))
    assert find_neighbours(build_config(folder)).neighbours.read_bytes() == expected


def test_the_command_with_queries_named_like_the_reference(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "sub").mkdir()
    (folder / "known.fasta").rename(folder / "sub" / "my.fasta")
    monkeypatch.chdir(folder)
    command = f"neighbours my.fasta --reference sub/my.fasta --model {MODEL} --candidates 0 --no-centre -o out"
    assert main(command.split()) == 0
    result = json.loads(capfd.readouterr().out)
    names = [
        "my_embeddings.h5",
        "my_reference_embeddings.h5",
        "my_neighbours.tsv",
        "my_nearest.tsv",
        "my_neighbours.json",
    ]
    assert result["files"] == [f"out/{name}" for name in names]
    assert "nearest_by_alignment" not in read_rows(folder / "out" / "my_nearest.tsv")[0]
