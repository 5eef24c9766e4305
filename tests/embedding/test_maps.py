"""Maps of embeddings: header fields, neighbours and retained neighbours agree with scikit-learn and NumPy."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics.pairwise import cosine_similarity
from support.errors import refused

from esm2kit.embedding import maps
from esm2kit.sequences.fasta import Record

GENERATOR = np.random.default_rng(0)
UNIPROT = "sp|P69905|HBA_HUMAN Hemoglobin subunit alpha OS=Homo sapiens (Human) OX=9606 GN=HBA1 PE=1 SV=2"
UNIREF = "UniRef50_P69905 Hemoglobin subunit alpha n=12 Tax=Catarrhini TaxID=9526 RepID=HBA_HUMAN"


def records(*descriptions: str) -> list[Record]:
    return [Record(text.split()[0], text, "MKT" * (index + 1)) for index, text in enumerate(descriptions)]


def test_header_fields_of_uniprot_uniref_and_flip() -> None:
    assert maps.header_fields(UNIPROT) == {
        "OS": "Homo sapiens (Human)", "OX": "9606", "GN": "HBA1", "PE": "1", "SV": "2",
    }  # fmt: skip
    assert maps.header_fields(UNIREF) == {"n": "12", "Tax": "Catarrhini", "TaxID": "9526", "RepID": "HBA_HUMAN"}
    assert maps.header_fields("Sequence0 TARGET=-1.5 SET=train VALIDATION=False")["TARGET"] == "-1.5"
    assert maps.header_fields("lonely") == {}
    assert maps.header_fields("a EMPTY= B=1") == {"EMPTY": "", "B": "1"}


@given(
    st.dictionaries(st.from_regex(r"[A-Za-z]\w{0,5}", fullmatch=True), st.sampled_from(["x", "two words", "a/b", "-1"]))
)
def test_header_fields_are_parsed_back(fields: dict[str, str]) -> None:
    text = " ".join(["id", *(f"{name}={value}" for name, value in fields.items())])
    assert maps.header_fields(text) == fields


def test_the_fields_that_can_colour_a_map() -> None:
    found = records("a OS=Homo sapiens OX=9606 TM=40.5", "b OS=Mus musculus OX=10090 TM=38", "c TM=1e1")
    assert maps.field_counts(found) == {"OS": 2, "OX": 2, "TM": 3, "residues": 3}
    assert maps.colours(found, "OS").tolist() == ["Homo sapiens", "Mus musculus", "not given"]
    assert maps.colours(found, "OX").tolist() == ["9606", "10090", "not given"], "taxon numbers are identifiers"
    assert maps.colours(found, "TM").tolist() == [40.5, 38.0, 10.0]
    assert maps.colours(found, "residues").tolist() == [3.0, 6.0, 9.0]
    with refused("map.field", name="GN"):
        maps.colours(found, "GN")
    assert maps.colours(records("a TARGET=0", "b TARGET=1"), "TARGET").tolist() == ["0", "1"], (
        "few integers are classes"
    )
    many = records(*(f"p{number} n={number}" for number in range(20)))
    assert maps.colours(many, "n").dtype == float
    assert maps.colours(records("a X=nan", "b X=1.5"), "X").tolist() == ["nan", "1.5"]


def test_less_frequent_labels_are_merged() -> None:
    labels_P = np.array([f"g{number:02d}" for number in range(20) for _ in range(20 - number)])
    shown, rest = maps.grouped(labels_P)
    assert rest == "12 others"
    assert sorted(set(shown)) == sorted(["12 others", *(f"g{number:02d}" for number in range(8))])
    assert (shown == rest).sum() == sum(range(1, 13))
    few, rest = maps.grouped(np.array(["a", "not given", "b"]))
    assert (few.tolist(), rest) == (["a", "not given", "b"], "not given")
    numbers_P = np.arange(30.0)
    assert maps.grouped(numbers_P)[0] is numbers_P


@settings(max_examples=30, deadline=None)
@given(num_proteins=st.integers(3, 40), seed=st.integers(0, 9), count=st.integers(1, 5))
def test_neighbours_match_an_exhaustive_search(num_proteins: int, seed: int, count: int) -> None:
    count = min(count, num_proteins - 1)
    vectors_PD = np.random.default_rng(seed).normal(size=(num_proteins, 6)) + 3
    similarity_PP = cosine_similarity(vectors_PD - vectors_PD.mean(0))
    np.fill_diagonal(similarity_PP, -np.inf)
    rows = np.arange(num_proteins)[:: max(1, seed)]
    neighbours, cosine = maps.nearest(vectors_PD, rows, count)
    np.testing.assert_allclose(cosine, -np.sort(-similarity_PP[rows])[:, :count], atol=1e-9)
    np.testing.assert_allclose(np.take_along_axis(similarity_PP[rows], neighbours, 1), cosine, atol=1e-9)


def test_a_protein_is_never_its_own_neighbour() -> None:
    vectors_PD = np.repeat(GENERATOR.normal(size=(4, 5)), 6, axis=0)
    neighbours, cosine = maps.nearest(vectors_PD, range(24), 3)
    assert not (neighbours == np.arange(24)[:, None]).any()
    np.testing.assert_allclose(cosine, 1, atol=1e-9)
    assert (neighbours // 6 == np.arange(24)[:, None] // 6).all(), "the nearest have the same vector"


def test_pca_gives_the_principal_plane() -> None:
    plane_PD = GENERATOR.normal(size=(80, 2)) @ GENERATOR.normal(size=(2, 7)) + 5
    projection = maps.project(plane_PD)
    distances = [np.linalg.norm(points[:, None] - points[None], axis=2) for points in (plane_PD, projection.xy_P2)]
    np.testing.assert_allclose(*distances, atol=1e-9)
    values = np.linalg.svd(plane_PD - plane_PD.mean(0), compute_uv=False) ** 2
    shares = [
        f"component {number} ({share:.0%} of the variance)" for number, share in enumerate(values / values.sum(), 1)
    ]
    assert list(projection.axes) == shares[:2]
    noise = maps.project(GENERATOR.normal(size=(300, 60)))
    assert noise.kept < 0.35, "two of sixty equal directions retain few neighbours"
    with refused("map.too-few", found=3):
        maps.project(plane_PD[:3])


def test_the_share_of_retained_neighbours_matches_a_direct_count(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors_PD = GENERATOR.normal(size=(50, 3))
    projection = maps.project(vectors_PD)
    centred = vectors_PD - vectors_PD.mean(0)
    similarity_PP = cosine_similarity(centred) - 9 * np.eye(50)
    near_PP = np.linalg.norm(projection.xy_P2[:, None] - projection.xy_P2[None], axis=2) + 99 * np.eye(50)
    kept = [
        len(set(np.argsort(-similarity_PP[row])[:10]) & set(np.argsort(near_PP[row])[:10])) / 10 for row in range(50)
    ]
    np.testing.assert_allclose(projection.kept, np.mean(kept))
    monkeypatch.setattr(maps, "MAX_QUERIES", 20)
    rows = maps.queries(50)
    assert len(set(rows.tolist())) == 20
    np.testing.assert_allclose(maps.project(vectors_PD).kept, np.mean([kept[row] for row in rows]))


def test_umap_is_called_with_its_settings_or_reported_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {}

    class UMAP:
        def __init__(self, **settings: object) -> None:
            arguments.update(settings)

        def fit_transform(self, vectors_PD: np.ndarray) -> np.ndarray:
            return vectors_PD[:, :2]

    module = ModuleType("umap")
    module.UMAP = UMAP
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "umap", module)
    vectors_PD = GENERATOR.normal(size=(9, 4))
    projection = maps.project(vectors_PD, "umap", seed=3)
    assert arguments == {"n_neighbors": 8, "metric": "cosine", "random_state": 3, "n_jobs": 1}
    assert projection.axes == ("UMAP 1", "UMAP 2")
    np.testing.assert_array_equal(projection.xy_P2, vectors_PD[:, :2])
    monkeypatch.setattr(maps, "find_spec", lambda name: None)
    with refused("package.missing", name="umap-learn"):
        maps.project(vectors_PD, "umap")
    with refused("map.method", name="t-sne"):
        maps.project(vectors_PD, "t-sne")


@pytest.mark.skipif(find_spec("umap") is None, reason="umap-learn is not installed: pip install umap-learn")
def test_umap_separates_groups() -> None:
    centres = np.repeat(GENERATOR.normal(size=(3, 20)) * 10, 30, axis=0)
    projection = maps.project(centres + GENERATOR.normal(size=centres.shape), "umap")
    neighbours, _ = maps.nearest(projection.xy_P2, range(90), 5, metric="euclidean")
    assert (neighbours // 30 == np.arange(90)[:, None] // 30).all()
    assert projection.kept > 0.3


def test_agreement_and_its_value_by_chance() -> None:
    labels_P = np.array(["a"] * 10 + ["b"] * 30)
    vectors_PD = np.where(labels_P == "a", 1.0, -1.0)[:, None] * [3.0, 1.0, 0.0] + GENERATOR.normal(size=(40, 3)) / 50
    share, low, high = maps.agreement(vectors_PD, labels_P)
    assert share == 1
    wilson = binomtest(40, 40).proportion_ci(method="wilson")
    np.testing.assert_allclose((low, high), (wilson.low, wilson.high), atol=1e-6)
    mixed, low, high = maps.agreement(GENERATOR.normal(size=(40, 3)), labels_P)
    wilson = binomtest(round(mixed * 40), 40).proportion_ci(method="wilson")
    np.testing.assert_allclose((low, high), (wilson.low, wilson.high), atol=1e-6)
    pairs = [(one, two) for one in range(40) for two in range(40) if one != two]
    same = np.mean([labels_P[one] == labels_P[two] for one, two in pairs])
    np.testing.assert_allclose(maps.chance_agreement(labels_P), same)


def test_letter_shares_are_relative_counts() -> None:
    shares_PL = maps.letter_shares([Record("a", "a", "AAC"), Record("b", "b", "WXZZ")])
    assert shares_PL.shape == (2, 26)
    np.testing.assert_allclose(shares_PL.sum(1), 1)
    np.testing.assert_allclose(shares_PL[0, [0, 2]], [2 / 3, 1 / 3])
    np.testing.assert_allclose(shares_PL[1, [22, 23, 25]], [1 / 4, 1 / 4, 1 / 2])


def test_explained_variance_is_one_minus_the_share_within_groups() -> None:
    labels_N = GENERATOR.choice(list("ACDE"), 200)
    values_ND = GENERATOR.normal(size=(200, 5)) + (labels_N == "A")[:, None] * 2
    within = sum(((rows := values_ND[labels_N == name]) - rows.mean(0)).__pow__(2).sum() for name in "ACDE")
    share, chance = maps.explained_variance(labels_N, values_ND)
    np.testing.assert_allclose(share, 1 - within / ((values_ND - values_ND.mean(0)) ** 2).sum())
    np.testing.assert_allclose(chance, 3 / 199)
    shares = [maps.explained_variance(GENERATOR.permutation(labels_N), values_ND)[0] for _ in range(200)]
    np.testing.assert_allclose(np.mean(shares), chance, rtol=0.2), "random groups have this share"


def test_the_name_of_a_protein_in_its_header() -> None:
    assert maps.protein_name(UNIPROT) == "Hemoglobin subunit alpha"
    assert maps.protein_name(UNIREF) == "Hemoglobin subunit alpha"
    assert maps.protein_name("P1 TARGET=3 SET=train") == ""
    assert maps.protein_name("P1 plain words") == "plain words"
    assert maps.protein_name("lonely") == ""


def test_a_number_that_some_proteins_lack_stays_a_number() -> None:
    found = records(*(f"p{number} TM={40 + number / 2}" for number in range(12)), "q")
    values_P = maps.colours(found, "TM")
    assert values_P[:12].tolist() == [40 + number / 2 for number in range(12)]
    assert np.isnan(values_P[12])
    assert maps.halves(values_P).tolist() == ["up to it"] * 6 + ["above the median"] * 6 + ["not given"]
    words = np.array(["a", "b"])
    assert maps.halves(words) is words


def test_the_default_field_groups_or_measures_the_proteins() -> None:
    assert maps.default_field(records(*(f"p{number} OS=Homo" for number in range(4)))) == "residues", "one value"
    assert maps.default_field(records(*(f"p{number} GN=G{number}" for number in range(8)))) == "residues", "all differ"
    found = records(*(f"p{number} GN=G{number} OS={'AB'[number % 2]}" for number in range(8)))
    assert maps.default_field(found) == "OS"
    assert maps.default_field(found, {"class": list("xxxxyyyy")}) == "class", "a table comes first"
    assert maps.default_field(found, {"empty": [None] * 7 + ["x"]}) == "OS"


def test_names_of_fields(tmp_path: Path) -> None:
    assert maps.field_name("OS") == "organism"
    assert maps.field_name("residues") == "length in residues"
    assert maps.field_name("my column") == "my column"
    assert maps.field_name("TARGET", tmp_path / "lab" / "mine.fasta") == "target", "a folder is not a task"
    (tmp_path / "tasks.yaml").write_text("")
    assert maps.field_name("TARGET", tmp_path / "domain_of_life" / "sampled.fasta") == "domain of life"


def test_tsne_keeps_groups_together_and_is_reproducible() -> None:
    centres = np.repeat(np.eye(3, 20) * 8, 20, axis=0)
    vectors_PD = centres + GENERATOR.normal(size=(60, 20))
    projection = maps.project(vectors_PD, "tsne", seed=3)
    groups = np.repeat(list("abc"), 20)
    assert maps.agreement(projection.xy_P2, groups)[0] > 0.9
    assert projection.axes == ("t-SNE 1", "t-SNE 2")
    np.testing.assert_array_equal(projection.xy_P2, maps.project(vectors_PD, "tsne", seed=3).xy_P2)
    assert maps.project(vectors_PD[::15], "tsne").xy_P2.shape == (4, 2), "as few as a map allows"


def test_agreements_leave_out_proteins_without_a_value() -> None:
    vectors_PD = np.repeat(np.eye(2, 6), 6, axis=0) + 0.01 * GENERATOR.normal(size=(12, 6))
    words = np.array(list("aaaaaabbbbbb"), dtype="<U9")
    shares = maps.agreements({"good": vectors_PD, "bad": GENERATOR.normal(size=(12, 6))}, words)
    assert shares["good"] == maps.agreement(vectors_PD, words)
    assert shares["good"][0] == 1.0
    assert list(shares) == ["good", "bad", "chance"]
    assert shares["chance"][0] == pytest.approx(5 / 11)
    numbers = np.array([*range(6), *range(10, 16)], dtype=float)
    numbers[3] = np.nan
    known = np.isfinite(numbers)
    assert maps.agreements({"good": vectors_PD}, numbers)["good"] == maps.agreement(
        vectors_PD[known], np.where(numbers[known] > np.nanmedian(numbers), "above", "up to")
    )
    words[3:] = maps.NOT_GIVEN
    assert maps.agreements({"good": vectors_PD}, words) == {}, "three proteins"


def test_the_neighbours_of_one_protein() -> None:
    vectors_PD = GENERATOR.normal(size=(6, 4))
    near_K, cosine_K = maps.neighbours(vectors_PD, 2, 3)
    expected, similar = maps.nearest(vectors_PD, [2], 3)
    assert near_K.tolist() == expected[0].tolist()
    assert cosine_K.tolist() == similar[0].tolist()
    assert len(maps.neighbours(vectors_PD[:3], 0, 5)[0]) == 2, "fewer others than requested"
    with refused("map.too-few", found=1):
        maps.neighbours(vectors_PD[:1], 0, 5)
