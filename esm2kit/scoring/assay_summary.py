"""Averages over several assays, by protein and group, as ProteinGym computes them.

The assays of one protein and one type of selection are averaged first, then the proteins of a type, then the types.
Otherwise a protein with many assays would count more than others.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.scoring.assay import METRIC_NAMES, MODEL, AssayReport, intervals_to_json
from esm2kit.scoring.baselines import BASELINE_NAMES
from esm2kit.scoring.proteingym import AVERAGES, NUM_ASSAYS, find_assay
from esm2kit.scoring.variants import ENTRY_NAME
from esm2kit.tasks.metrics import Interval, compute_interval, nan_to_none
from esm2kit.tasks.tables import is_numeric, read_table

# Columns of ProteinGym's reference file and their names here; the first one is the type of the average.
PROTEINGYM_GROUPS = {
    "coarse_selection_type": "selection type", "taxon": "taxon", "MSA_Neff_L_category": "alignment depth",
}  # fmt: skip
ASSAY_COLUMNS, PROTEIN_COLUMNS = ("dms_id", "assay", "dms_filename", "name", "file"), ("uniprot_id", "protein")
MAX_GROUPS = 20  # a column with more different texts is no group


class AssayGroup(NamedTuple):
    """What an assay is averaged with.

    Args:
        protein: entry name or id of its protein.
        groups: kind of group -> group, such as taxon -> Human. The first kind is the type of the average.
    """

    protein: str
    groups: dict[str, str]


def find_groups(names: Sequence[str], path: Path | None = None) -> dict[str, AssayGroup]:
    """Find the protein and the groups of assays.

    Args:
        names: of the assays: their files without suffixes.
        path: a table with a column of these names, of the proteins (`UniProt_ID` or `protein`), and of groups, such as
            ProteinGym's reference file. None uses what ProteinGym publishes, and the names of other files.

    Returns:
        Assay -> its group.

    Raises:
        InputError: the table has no column of names, or an assay is missing.
    """
    if path is not None:
        return _read_groups(names, path)
    found = {}
    for name in names:
        published, entry = find_assay(name), ENTRY_NAME.match(name)
        groups = (published.selection_type, published.taxon, published.msa_depth) if published else ()
        protein = published.uniprot_id if published else entry[1] if entry else name
        found[name] = AssayGroup(protein, dict(zip(PROTEINGYM_GROUPS.values(), groups, strict=False)))
    return found


def _read_groups(names: Sequence[str], path: Path) -> dict[str, AssayGroup]:
    table = read_table(path)
    lower = [column.casefold().strip() for column in table.columns]
    assay = next((lower.index(column) for column in ASSAY_COLUMNS if column in lower), None)
    if assay is None:
        raise InputError(
            f"{path} has no column with the names of the assays; it needs 'DMS_id' or 'assay', and has "
            f"{', '.join(map(repr, table.columns))}.",
            code="groups.no-column",
            path=path,
        )
    protein = next((lower.index(column) for column in PROTEIN_COLUMNS if column in lower), None)
    rows = {row[assay].removesuffix(".csv"): row for row in table.rows}
    if missing := [name for name in names if name not in rows]:
        raise InputError(
            f"{path} has no row for assay {missing[0]!r}. Add it, or omit groups.",
            code="groups.assay",
            path=path,
            found=tuple(missing),
        )
    kinds = {name: lower.index(name.casefold()) for name in PROTEINGYM_GROUPS if name.casefold() in lower}
    if not kinds:
        kinds = {
            column: place
            for place, column in enumerate(table.columns)
            if place not in (assay, protein)
            and not is_numeric(table.cells(place))
            and len(set(table.cells(place))) <= MAX_GROUPS
        }
    return {
        name: AssayGroup(
            name if protein is None else rows[name][protein],
            {PROTEINGYM_GROUPS.get(kind, kind): rows[name][place] for kind, place in kinds.items()},
        )
        for name in names
    }


@dataclass(frozen=True)
class AssaySummary:
    """Averages over assays.

    Args:
        num_assays: number of assays.
        num_proteins: number of different proteins.
        averages: model or baseline -> metric -> average, with an interval from resampled proteins.
        differences: baseline -> metric -> average of model minus baseline, over the assays that have the baseline.
        groups: kind of group -> group -> model or baseline -> mean Spearman over proteins.
        better: assay -> the baselines that do better than the model.
        published: ProteinGym's averages over its 217 assays, by model.
        verdict: sentences on what the averages show.
    """

    num_assays: int
    num_proteins: int
    averages: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]
    groups: dict[str, dict[str, dict[str, float]]]
    better: dict[str, list[str]]
    published: dict[str, float] = field(default_factory=lambda: dict(AVERAGES))
    verdict: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the summary for JSON; undefined numbers are null."""
        return {
            "num_assays": self.num_assays,
            "num_proteins": self.num_proteins,
            "averages": intervals_to_json(self.averages),
            "model_minus_baseline": intervals_to_json(self.differences),
            "groups": {
                kind: {group: {name: nan_to_none(value) for name, value in row.items()} for group, row in found.items()}
                for kind, found in self.groups.items()
            },
            "assays_with_better_baselines": self.better,
            "published_spearman": {"num_assays": NUM_ASSAYS, **self.published},
            "verdict": list(self.verdict),
        }


def summarise_assays(
    reports: Sequence[AssayReport], groups: Mapping[str, AssayGroup], resamples: int = 1000, seed: int = 0
) -> AssaySummary:
    """Average the metrics of several assays.

    Args:
        reports: one per assay.
        groups: from `find_groups`.
        resamples: bootstrap replicates of the proteins of each type.
        seed: of the bootstrap.

    Returns:
        The averages. An undefined metric, such as AUC without classes, is left out of its average.
    """
    kinds = list(dict.fromkeys(kind for group in groups.values() for kind in group.groups))
    names = list(dict.fromkeys(row for report in reports for row in report.rows))
    averages: dict[str, dict[str, Interval]] = {}
    differences: dict[str, dict[str, Interval]] = {}
    samples = _sample_units(_list_units(reports, groups, kinds[:1]), resamples, seed)
    for name in names:
        of_row, of_difference = {}, {}
        for metric in METRIC_NAMES:
            value_A = np.array([_get(report, name, metric) for report in reports])
            if np.isfinite(value_A).any():
                of_row[metric] = _average(value_A, samples)
                model_A = np.array([_get(report, MODEL, metric) for report in reports])
                of_difference[metric] = _average(model_A - value_A, samples)
        averages[name] = of_row
        if name != MODEL:
            differences[name] = of_difference
    found_groups: dict[str, dict[str, dict[str, float]]] = {}
    for kind in kinds:
        units = _list_units(reports, groups, [kind])
        found_groups[kind] = {
            group: {
                name: _mean_of_means(np.array([_get(report, name, "spearman") for report in reports]), [places])
                for name in names
            }
            for group, places in sorted(units.items())
        }
    better = {report.name: report.better_baselines for report in reports if report.better_baselines}
    summary = AssaySummary(
        len(reports),
        len({group.protein for group in groups.values()}),
        averages,
        differences,
        found_groups,
        better,
    )
    return AssaySummary(**{**vars(summary), "verdict": tuple(_write_verdict(summary))})


def _get(report: AssayReport, row: str, metric: str) -> float:
    return report.rows[row][metric].value if metric in report.rows.get(row, {}) else float("nan")


Units = dict[str, list[list[int]]]  # type -> the assays of each of its proteins


def _list_units(reports: Sequence[AssayReport], groups: Mapping[str, AssayGroup], kinds: Sequence[str]) -> Units:
    units: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, report in enumerate(reports):
        group = groups[report.name]
        units[group.groups.get(kinds[0], "other") if kinds else ""][group.protein].append(place)
    return {kind: list(by_protein.values()) for kind, by_protein in units.items()}


def _sample_units(units: Units, resamples: int, seed: int) -> list[list[list[list[int]]]]:
    """List the point estimate and the bootstrap replicates: of each type, the assays of each sampled protein."""
    generator = np.random.default_rng(seed)
    types = list(units.values())
    return [types] + [
        [[proteins[place] for place in generator.integers(0, len(proteins), len(proteins))] for proteins in types]
        for _ in range(resamples)
    ]


def _mean_of_means(value_A: np.ndarray, types: Sequence[Sequence[Sequence[int]]]) -> float:
    """Average over assays, then over proteins, then over types; what is undefined is left out."""
    means = []
    for proteins in types:
        finite = [value_A[assays][np.isfinite(value_A[assays])] for assays in proteins]
        if found := [float(values.mean()) for values in finite if values.size]:
            means.append(float(np.mean(found)))
    return float(np.mean(means)) if means else float("nan")


def _average(value_A: np.ndarray, samples: Sequence[Sequence[Sequence[Sequence[int]]]]) -> Interval:
    value, *replicates = (_mean_of_means(value_A, types) for types in samples)
    return compute_interval(value, np.array(replicates))


def _write_verdict(summary: AssaySummary) -> list[str]:
    sentences = []
    if summary.better:
        sentences.append(
            f"In {len(summary.better)} of {summary.num_assays} assays a baseline does better than the model: "
            f"{', '.join(list(summary.better)[:5])}{', ...' if len(summary.better) > 5 else ''}."
        )
    else:
        sentences.append(f"In none of the {summary.num_assays} assays does a baseline do better than the model.")
    for name, row in summary.differences.items():
        difference = row.get("spearman")
        if difference is not None and difference.value < 0:
            certain = "" if difference.high < 0 else ", which is within its interval"
            sentences.append(
                f"On average {BASELINE_NAMES.get(name, name)} is better than the model by {-difference.value:.3f} in "
                f"Spearman{certain}."
            )
    return sentences
