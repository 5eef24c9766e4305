"""Two-dimensional maps of embeddings, their colours, and nearest neighbours.

Two dimensions lose most of the information in a vector, so each map comes with the share of neighbours that it retains.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from esm2kit.core.errors import InputError
from esm2kit.sequences.fasta import Record
from esm2kit.sequences.headers import JOINER

logger = logging.getLogger(__name__)
Method = Literal["pca", "tsne", "umap"]
METHODS = ("pca", "tsne", "umap")
METHOD_NAMES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
# Names of UniProt's and UniRef's header fields, for a legend.
FIELD_NAMES = {
    "OS": "organism",
    "OX": "taxon number",
    "GN": "gene",
    "PE": "evidence of existence",
    "SV": "version of the sequence",
    "Tax": "taxon",
    "TaxID": "taxon number",
    "n": "members of the cluster",
    "RepID": "representative",
    "SET": "set",
    "VALIDATION": "validation",
}
# A value ends at the next name, so that `OS=Homo sapiens (Human) OX=9606` gives two complete values.
HEADER_FIELD = re.compile(r"(?:^|\s)([A-Za-z]\w*)=(.*?)(?=\s+[A-Za-z]\w*=|\s*$)")
RESIDUES = "residues"
NOT_GIVEN = "not given"
# Fields whose numbers are identifiers or categories, such as an NCBI taxon.
NUMBERED = ("OX", "TaxID", "PE", "SV")
MAX_GROUPS = 9
MAX_QUERIES = 2_000
MIN_PROTEINS = 4
Z95 = 1.959964  # two-sided 95% quantile of the normal distribution


class Projection(NamedTuple):
    """A two-dimensional map.

    Args:
        xy_P2: (P, 2) coordinates of the proteins.
        axes: labels of the two axes.
        kept: share of the ten nearest neighbours of a vector that are also among its ten nearest on the map.
    """

    xy_P2: np.ndarray
    axes: tuple[str, str]
    kept: float


def header_fields(description: str) -> dict[str, str]:
    """Parse the `NAME=value` fields of a FASTA header in the style of UniProt, UniRef and FLIP."""
    return dict(HEADER_FIELD.findall(description.partition(JOINER)[0]))


def protein_name(description: str) -> str:
    """Return the name of a protein in a FASTA header: the text between the id and the first field; may be empty."""
    text = description.partition(JOINER)[0]
    found = HEADER_FIELD.search(text)
    return text[: found.start() if found else None].partition(" ")[2].strip()


def field_counts(
    records: Sequence[Record], columns: Mapping[str, Sequence[str | None]] | None = None
) -> dict[str, int]:
    """Count the proteins per field that can colour a map.

    Args:
        records: the proteins.
        columns: name -> a value per protein, from a table; None is a missing value.

    Returns:
        The columns, then the fields of the headers, then `residues`; each with its number of proteins.
    """
    counts = {name: sum(value is not None for value in values) for name, values in (columns or {}).items()}
    counts |= Counter(name for record in records for name in header_fields(record.description) if name not in counts)
    return counts | {RESIDUES: len(records)}


def default_field(records: Sequence[Record], columns: Mapping[str, Sequence[str | None]] | None = None) -> str:
    """Choose the field that colours a map: the first that groups the proteins or measures them, or else `residues`.

    A field with one value for all proteins, or with another word for almost each protein, is passed over.

    Args:
        records: the proteins.
        columns: as in `field_counts`.

    Returns:
        The name of the field.
    """
    for name in field_counts(records, columns):
        values_P = colours(records, name, columns)
        if np.issubdtype(values_P.dtype, np.number):
            if len(np.unique(values_P[np.isfinite(values_P)])) > 1:
                return name
        elif 1 < len(set(values_P.tolist()) - {NOT_GIVEN}) <= len(records) / 2:
            return name
    return RESIDUES


def field_name(field: str, fasta: str | Path = "") -> str:
    """Name a field for a legend, such as `organism` for OS.

    Args:
        field: a column of a table, a header field, or `residues`.
        fasta: the FASTA file. In a folder of tasks the target has the name of its task.

    Returns:
        The name.
    """
    task = Path(fasta).parent
    if field == "TARGET":
        return task.name.replace("_", " ") if (task.parent / "tasks.yaml").exists() else "target"
    return "length in residues" if field == RESIDUES else FIELD_NAMES.get(field, field)


def colours(
    records: Sequence[Record], field: str, columns: Mapping[str, Sequence[str | None]] | None = None
) -> np.ndarray:
    """Read the values of one field, to colour a map.

    Args:
        records: the proteins.
        field: a column, a header field, or `residues` for the number of residues.
        columns: name -> a value per protein, from a table; None is a missing value. A column takes the place of a
            header field with the same name.

    Returns:
        (P,) floats if all values are numbers, with NaN where a protein has none. Otherwise strings, with `not given`
        where a protein has none. Identifiers, and integers with few distinct values, are strings as well.

    Raises:
        InputError: there is no such field.
    """
    if columns and field in columns:
        found = [NOT_GIVEN if value is None else value for value in columns[field]]
    elif field == RESIDUES:
        return np.array([float(len(record.sequence)) for record in records])
    else:
        found = [header_fields(record.description).get(field, NOT_GIVEN) for record in records]
    given = [value for value in found if value != NOT_GIVEN]
    if not given:
        known = ", ".join(field_counts(records, columns))
        raise InputError(f"no protein has the field {field!r}. Use one of {known}.", code="map.field", name=field)
    try:
        numbers = np.array(given, dtype=float)
    except ValueError:
        return np.array(found)
    few = len(set(given)) <= MAX_GROUPS and (numbers == np.round(numbers)).all()
    if field in NUMBERED or few or not np.isfinite(numbers).all():
        return np.array(found)
    return np.array([np.nan if value == NOT_GIVEN else float(value) for value in found])


def halves(values_P: np.ndarray) -> np.ndarray:
    """Turn numbers into two groups, so that neighbours can be compared; words are returned unchanged.

    Args:
        values_P: (P,) numbers or words.

    Returns:
        (P,) words: `above the median` or `up to it` for numbers, and `not given` for NaN.
    """
    if not np.issubdtype(values_P.dtype, np.number):
        return values_P
    sides = np.where(values_P > np.nanmedian(values_P), "above the median", "up to it")
    return np.where(np.isnan(values_P), NOT_GIVEN, sides)


def grouped(labels_P: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Merge the less frequent labels into one group, so that the legend stays short; numbers are not changed.

    Args:
        labels_P: (P,) strings or numbers.

    Returns:
        The (P,) labels, and the name of the merged group (None if there is none).
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
    """Project embeddings to two dimensions.

    Args:
        vectors_PD: (P, D) one vector per protein.
        method: pca, tsne (van der Maaten and Hinton 2008), or umap (McInnes et al. 2018), which requires umap-learn.
        seed: of the random numbers.

    Returns:
        The map.

    Raises:
        InputError: there are fewer than four proteins, or the method is unknown or not installed.
    """
    check_method(method)
    if len(vectors_PD) < MIN_PROTEINS:
        raise InputError(
            f"a map requires at least {MIN_PROTEINS} proteins, found {len(vectors_PD)}",
            code="map.too-few",
            found=len(vectors_PD),
        )
    if method == "pca":
        pca = PCA(2, random_state=seed)
        xy_P2 = pca.fit_transform(vectors_PD)
        shares = pca.explained_variance_ratio_
        axes = tuple(f"component {number} ({share:.0%} of the variance)" for number, share in enumerate(shares, 1))
    elif method == "tsne":
        perplexity = min(30.0, (len(vectors_PD) - 1) / 3)
        logger.info("computing a t-SNE of %d proteins", len(vectors_PD))
        # cosine over centred vectors, as for the neighbours
        centred_PD = vectors_PD - vectors_PD.mean(0)
        xy_P2 = TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=seed).fit_transform(centred_PD)
        axes = ("t-SNE 1", "t-SNE 2")
    else:
        from umap import UMAP  # slow to import

        neighbours = min(15, len(vectors_PD) - 1)
        logger.info("computing a UMAP of %d proteins; the first call also compiles it", len(vectors_PD))
        # with more than one thread, UMAP is not reproducible
        xy_P2 = UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, n_jobs=1).fit_transform(vectors_PD)
        axes = ("UMAP 1", "UMAP 2")
    return Projection(np.asarray(xy_P2), axes, _neighbours_kept(vectors_PD, xy_P2, seed))


def available_methods() -> tuple[str, ...]:
    """Return the methods whose packages are installed."""
    return tuple(method for method in METHODS if method != "umap" or find_spec("umap") is not None)


def check_method(method: str) -> None:
    """Raise InputError for a method that is unknown or not installed."""
    if method not in METHODS:
        raise InputError(
            f"unknown projection {method!r}. Choose {', '.join(METHODS[:-1])} or {METHODS[-1]}.",
            code="map.method",
            name=method,
            allowed=list(METHODS),
        )
    if method == "umap" and find_spec("umap") is None:
        raise InputError(
            "projection 'umap' requires the umap-learn package: pip install umap-learn, or choose tsne",
            code="package.missing",
            name="umap-learn",
        )


def _neighbours_kept(vectors_PD: np.ndarray, xy_P2: np.ndarray, seed: int) -> float:
    rows = queries(len(vectors_PD), seed)
    count = min(10, len(vectors_PD) - 1)
    in_full, _ = nearest(vectors_PD, rows, count)
    on_map, _ = nearest(xy_P2, rows, count, metric="euclidean")
    return float(np.mean([len(np.intersect1d(*pair)) / count for pair in zip(in_full, on_map, strict=True)]))


def queries(num_proteins: int, seed: int = 0) -> np.ndarray:
    """Return the indices of all proteins, or of a random sample of 2,000 if there are more."""
    if num_proteins <= MAX_QUERIES:
        return np.arange(num_proteins)
    return np.sort(np.random.default_rng(seed).choice(num_proteins, MAX_QUERIES, replace=False))


def nearest(
    vectors_PD: np.ndarray, rows: Sequence[int] | np.ndarray, count: int, metric: str = "cosine"
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest neighbours of proteins.

    For cosine, the mean vector is subtracted first, because all vectors of a model have a large common component.

    Args:
        vectors_PD: (P, D) one vector per protein.
        rows: indices of the proteins whose neighbours are searched.
        count: number of neighbours, below the number of proteins.
        metric: cosine or euclidean.

    Returns:
        (rows, count) indices, nearest first, and (rows, count) cosine similarities or Euclidean distances.
    """
    points_PD = vectors_PD - vectors_PD.mean(0) if metric == "cosine" else vectors_PD
    rows = np.asarray(rows)
    search = NearestNeighbors(n_neighbors=count + 1, metric=metric, algorithm="brute").fit(points_PD)
    distance, neighbours = search.kneighbors(points_PD[rows])
    # a protein is its own neighbour, unless more than `count` others have the same vector
    itself = neighbours == rows[:, None]
    itself[~itself.any(1), -1] = True
    neighbours, distance = (found[~itself].reshape(len(rows), count) for found in (neighbours, distance))
    return neighbours, 1 - distance if metric == "cosine" else distance


def neighbours(vectors_PD: np.ndarray, row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest neighbours of one protein by cosine.

    Args:
        vectors_PD: (P, D) one vector per protein.
        row: index of the protein.
        count: number of neighbours; fewer if there are fewer other proteins.

    Returns:
        Indices, nearest first, and cosine similarities.

    Raises:
        InputError: there is no other protein.
    """
    count = min(count, len(vectors_PD) - 1)
    if count < 1:
        raise InputError("one protein has no neighbours: choose a FASTA file with more", code="map.too-few", found=1)
    found, cosine = nearest(vectors_PD, [row], count)
    return found[0], cosine[0]


def agreements(vectors: Mapping[str, np.ndarray], values_P: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Compute `agreement` for several kinds of vectors, and by chance, over the proteins that have a value.

    Two proteins agree if they have the same word, or numbers on the same side of the median.

    Args:
        vectors: name -> (P, D) one vector per protein.
        values_P: (P,) words, or numbers with NaN for missing ones.

    Returns:
        Name -> share and ends of its 95% interval, then `chance` without one. Empty for fewer than four values.
    """
    groups_P = halves(values_P)
    known_P = groups_P != NOT_GIVEN
    if known_P.sum() < MIN_PROTEINS:
        return {}
    shares = {name: agreement(vectors_PD[known_P], groups_P[known_P]) for name, vectors_PD in vectors.items()}
    return shares | {"chance": (chance_agreement(groups_P[known_P]), np.nan, np.nan)}


def agreement(vectors_PD: np.ndarray, labels_P: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Compute the share of proteins whose nearest neighbour by cosine has the same label.

    Args:
        vectors_PD: (P, D) one vector per protein.
        labels_P: (P,) labels.
        seed: of the sample of at most 2,000 proteins.

    Returns:
        The share and the ends of its 95% interval (Wilson 1927, 10.1080/01621459.1927.10502953).
    """
    rows = queries(len(vectors_PD), seed)
    neighbours, _ = nearest(vectors_PD, rows, 1)
    number = len(rows)
    share = float((labels_P[neighbours[:, 0]] == labels_P[rows]).mean())
    middle = (share + Z95**2 / (2 * number)) / (1 + Z95**2 / number)
    half = Z95 / (1 + Z95**2 / number) * np.sqrt(share * (1 - share) / number + Z95**2 / (4 * number**2))
    return share, float(middle - half), float(middle + half)


def chance_agreement(labels_P: np.ndarray) -> float:
    """Compute the share that `agreement` has for random neighbours."""
    counts = np.unique(labels_P, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(labels_P) * (len(labels_P) - 1)))


def letter_shares(records: Sequence[Record]) -> np.ndarray:
    """Compute the amino-acid composition: (P, 26) shares of the letters A to Z, a baseline for embeddings."""
    counts = [np.bincount(np.frombuffer(record.sequence.encode(), np.uint8) - ord("A"), minlength=26)
              for record in records]  # fmt: skip
    return np.array([count / count.sum() for count in counts])


def explained_variance(labels_N: Sequence[str] | np.ndarray, values_ND: np.ndarray) -> tuple[float, float]:
    """Compute the share of the variance that is between the groups of rows with equal labels.

    Args:
        labels_N: (N,) labels of the rows.
        values_ND: (N, D) rows.

    Returns:
        The share, and its expected value for random groups.
    """
    group_N = np.unique(labels_N, return_inverse=True)[1]
    centred_ND = values_ND - values_ND.mean(0)
    sums = np.zeros((group_N.max() + 1, values_ND.shape[1]))
    np.add.at(sums, group_N, centred_ND)
    counts = np.bincount(group_N)
    between = ((sums**2).sum(1) / counts).sum()
    return float(between / (centred_ND**2).sum()), float((len(counts) - 1) / max(len(group_N) - 1, 1))
