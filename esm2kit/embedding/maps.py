"""Looking at embeddings: two-dimensional maps, what to colour them by, and which proteins are neighbours.

A map of two dimensions leaves most of a vector out, so every one here comes with the share of neighbours it kept.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from esm2kit.core.errors import InputError
from esm2kit.sequences.fasta import Record

logger = logging.getLogger(__name__)
Method = Literal["pca", "umap"]
METHODS = ("pca", "umap")
# A value runs to the next name, so that `OS=Homo sapiens (Human) OX=9606` gives both whole.
HEADER_FIELD = re.compile(r"(?:^|\s)([A-Za-z]\w*)=(.*?)(?=\s+[A-Za-z]\w*=|\s*$)")
RESIDUES = "residues"
NOT_GIVEN = "not given"
# Fields whose numbers are names, as an NCBI taxon is.
NUMBERED = ("OX", "TaxID", "PE", "SV")
MAX_GROUPS = 9
MAX_QUERIES = 2_000
Z95 = 1.959964  # of the normal distribution, 95% of it on both sides


class Projection(NamedTuple):
    """A two-dimensional map.

    Args:
        xy_P2: where each protein lies.
        axes: what the two axes are.
        kept: share of the vectors' ten nearest neighbours that are among the ten nearest on the map too.
    """

    xy_P2: np.ndarray
    axes: tuple[str, str]
    kept: float


def header_fields(description: str) -> dict[str, str]:
    """The `NAME=value` fields of a FASTA header, as UniProt, UniRef and FLIP write them."""
    return dict(HEADER_FIELD.findall(description))


def field_counts(records: Sequence[Record]) -> dict[str, int]:
    """What a map can be coloured by -> how many proteins have it: the headers' fields, and `residues`."""
    counts = Counter(name for record in records for name in header_fields(record.description))
    return dict(counts) | {RESIDUES: len(records)}


def colours(records: Sequence[Record], field: str) -> np.ndarray:
    """One field of every protein's header.

    Args:
        records: the proteins.
        field: of the headers, or `residues` for how many a protein has.
    Returns: (P,) floats if every value is a number that measures something; else words, as for a few whole numbers or
        a taxon's, and `not given` where the header lacks the field.
    Raises: InputError for a field that no header has.
    """
    if field == RESIDUES:
        return np.array([float(len(record.sequence)) for record in records])
    found = [header_fields(record.description).get(field, NOT_GIVEN) for record in records]
    if all(value == NOT_GIVEN for value in found):
        known = ", ".join(field_counts(records))
        raise InputError(f"no header has a field {field!r}: colour by one of {known}", code="map.field", name=field)
    try:
        numbers = np.array(found, dtype=float)
    except ValueError:
        return np.array(found)
    few = len(set(found)) <= MAX_GROUPS and (numbers == np.round(numbers)).all()
    return np.array(found) if field in NUMBERED or few or not np.isfinite(numbers).all() else numbers


def grouped(labels_P: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Words with all but the most frequent under one name, so that a legend holds them; numbers as they are.

    Returns: the labels, and the name for the rest (None if there is no rest).
    """
    if np.issubdtype(labels_P.dtype, np.number):
        return labels_P, None
    counts = Counter(labels_P.tolist())
    if len(counts) <= MAX_GROUPS:
        return labels_P, NOT_GIVEN if NOT_GIVEN in counts else None
    frequent = {name for name, _ in counts.most_common(MAX_GROUPS - 1)} - {NOT_GIVEN}
    rest = f"{len(counts) - len(frequent)} others"
    return np.array([label if label in frequent else rest for label in labels_P.tolist()]), rest


def project(vectors_PD: np.ndarray, method: Method = "pca", seed: int = 0) -> Projection:
    """Two dimensions for every protein.

    Args:
        vectors_PD: one vector a protein.
        method: pca, linear and always there; or umap (McInnes et al. 2018), where umap-learn is installed.
        seed: of what is random in it.
    Raises: InputError for fewer than four proteins, an unknown method, or one whose package is absent.
    """
    check_method(method)
    if len(vectors_PD) < 4:
        raise InputError(
            f"{len(vectors_PD)} proteins make no map: give a FASTA of 4 or more",
            code="map.too-few",
            found=len(vectors_PD),
        )
    if method == "pca":
        pca = PCA(2, random_state=seed)
        xy_P2 = pca.fit_transform(vectors_PD)
        shares = pca.explained_variance_ratio_
        axes = tuple(f"component {number} ({share:.0%} of the variance)" for number, share in enumerate(shares, 1))
    else:
        from umap import UMAP  # slow to import, and only here when asked for

        neighbours = min(15, len(vectors_PD) - 1)
        logger.info("UMAP lays out %d proteins; its first call compiles it", len(vectors_PD))
        # one thread: more of them cannot be seeded
        xy_P2 = UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, n_jobs=1).fit_transform(vectors_PD)
        axes = ("UMAP 1", "UMAP 2")
    return Projection(np.asarray(xy_P2), axes, _neighbours_kept(vectors_PD, xy_P2, seed))


def check_method(method: str) -> None:
    """Raise InputError for a method that is unknown or not installed."""
    if method not in METHODS:
        raise InputError(
            f"projection {method!r} is unknown: choose {' or '.join(METHODS)}",
            code="map.method",
            name=method,
            allowed=list(METHODS),
        )
    if method == "umap" and find_spec("umap") is None:
        raise InputError(
            "umap-learn is not installed: pip install umap-learn, or choose pca",
            code="package.missing",
            name="umap-learn",
        )


def _neighbours_kept(vectors_PD: np.ndarray, xy_P2: np.ndarray, seed: int) -> float:
    rows = queries(len(vectors_PD), seed)
    count = min(10, len(vectors_PD) - 1)
    true, _ = nearest(vectors_PD, rows, count)
    drawn, _ = nearest(xy_P2, rows, count, metric="euclidean")
    return float(np.mean([len(np.intersect1d(*pair)) / count for pair in zip(true, drawn, strict=True)]))


def queries(num_proteins: int, seed: int = 0) -> np.ndarray:
    """All proteins' places, or a seeded draw of them where all would take long."""
    if num_proteins <= MAX_QUERIES:
        return np.arange(num_proteins)
    return np.sort(np.random.default_rng(seed).choice(num_proteins, MAX_QUERIES, replace=False))


def nearest(
    vectors_PD: np.ndarray, rows: Sequence[int] | np.ndarray, count: int, metric: str = "cosine"
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest other proteins, the nearest first.

    Args:
        vectors_PD: one vector a protein; for cosine their mean is taken off first, since all of a model's vectors
            share a large part that says nothing.
        rows: whose neighbours.
        count: how many, below the number of proteins.
        metric: cosine or euclidean.
    Returns: (rows, count) places and (rows, count) cosine similarities, or distances.
    """
    points_PD = vectors_PD - vectors_PD.mean(0) if metric == "cosine" else vectors_PD
    rows = np.asarray(rows)
    search = NearestNeighbors(n_neighbors=count + 1, metric=metric, algorithm="brute").fit(points_PD)
    distance, place = search.kneighbors(points_PD[rows])
    # itself is among them, unless more than `count` proteins are the very same
    itself = place == rows[:, None]
    itself[~itself.any(1), -1] = True
    place, distance = (found[~itself].reshape(len(rows), count) for found in (place, distance))
    return place, 1 - distance if metric == "cosine" else distance


def agreement(vectors_PD: np.ndarray, labels_P: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Share of proteins whose nearest neighbour, by cosine, has their label; over a seeded draw of 2,000 at most.

    Returns: the share and the ends of its 95% interval (Wilson 1927, 10.1080/01621459.1927.10502953).
    """
    rows = queries(len(vectors_PD), seed)
    place, _ = nearest(vectors_PD, rows, 1)
    number = len(rows)
    share = float((labels_P[place[:, 0]] == labels_P[rows]).mean())
    middle = (share + Z95**2 / (2 * number)) / (1 + Z95**2 / number)
    half = Z95 / (1 + Z95**2 / number) * np.sqrt(share * (1 - share) / number + Z95**2 / (4 * number**2))
    return share, float(middle - half), float(middle + half)


def chance_agreement(labels_P: np.ndarray) -> float:
    """The same for a neighbour drawn at random among the other proteins."""
    counts = np.unique(labels_P, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(labels_P) * (len(labels_P) - 1)))


def letter_shares(records: Sequence[Record]) -> np.ndarray:
    """(P, 26) shares of the letters A to Z in every protein: what composition alone knows."""
    counts = [np.bincount(np.frombuffer(record.sequence.encode(), np.uint8) - ord("A"), minlength=26)
              for record in records]  # fmt: skip
    return np.array([count / count.sum() for count in counts])


def explained_variance(labels_N: Sequence[str] | np.ndarray, values_ND: np.ndarray) -> tuple[float, float]:
    """How much of the rows' variance their labels tell: the between-group share of it.

    Args:
        labels_N: of every row.
        values_ND: the rows.
    Returns: the share, and what as many groups drawn at random would tell.
    """
    group_N = np.unique(labels_N, return_inverse=True)[1]
    centred_ND = values_ND - values_ND.mean(0)
    sums = np.zeros((group_N.max() + 1, values_ND.shape[1]))
    np.add.at(sums, group_N, centred_ND)
    counts = np.bincount(group_N)
    between = ((sums**2).sum(1) / counts).sum()
    return float(between / (centred_ND**2).sum()), float((len(counts) - 1) / max(len(group_N) - 1, 1))
