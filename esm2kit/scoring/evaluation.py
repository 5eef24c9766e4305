"""Compare the scores of a run with measured values: a table of the variants and a JSON file of the metrics."""

import csv
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.core.checksums import FileChecksums, read_sealed_json, read_sealed_manifest, write_sealed_json
from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, sha256_file, to_json
from esm2kit.core.numbers import format_count
from esm2kit.core.progress import Progress
from esm2kit.core.provenance import build_provenance
from esm2kit.scoring.assay import METRIC_NAMES, MODEL, AssayReport, check_measured, evaluate_assay
from esm2kit.scoring.assay_summary import AssayGroup, find_groups, summarise_assays
from esm2kit.scoring.baselines import BASELINE_NAMES, read_site_frequencies, score_baselines
from esm2kit.scoring.config import ScoreConfig
from esm2kit.scoring.proteingym import NUM_ASSAYS
from esm2kit.scoring.scores import DELIMITERS, REMEDY, Scores, find_comparison
from esm2kit.scoring.variants import Variant, VariantSet
from esm2kit.sequences.alphabet import STANDARD_RESIDUES
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.metrics import Interval

logger = logging.getLogger(__name__)
COLUMNS = ("assay", "protein", "mutation", "measured", "is_fit", "score", *BASELINE_NAMES)
SHORT_NAMES = {
    "esm2_t6_8M_UR50D": "8M", "esm2_t12_35M_UR50D": "35M", "esm2_t30_150M_UR50D": "150M", "esm2_t33_650M_UR50D": "650M",
    "esm2_t36_3B_UR50D": "3B", "esm2_t48_15B_UR50D": "15B", "site_independent": "site-independent",
}  # fmt: skip


class Evaluation:
    """The comparison of scores with measured values, checked before the scores are computed.

    Args:
        config: `alignment`, `groups`, `resamples` and `restart`.
        proteins: the wild types.
        sets: the variants of each file.

    Raises:
        InputError: an assay has too few measured values, or the alignment or the groups cannot be read.
    """

    def __init__(self, config: ScoreConfig, proteins: Sequence[Record], sets: Sequence[VariantSet]) -> None:
        self.config, self.proteins = config, proteins
        self.assays = [each for each in sets if each.measured_N is not None]
        self.groups: dict[str, AssayGroup] = {}
        self.frequencies: dict[int, np.ndarray] = {}
        if not self.assays:
            if config.alignment is not None or config.groups is not None:
                raise InputError(
                    "alignment and groups are for the comparison with measured values, and there are none. Pass a "
                    "table with a column of them, or omit alignment and groups.",
                    code="assay.no-values",
                )
            return
        for assay in self.assays:
            check_measured(assay.name, assay.measured_N)
        self.groups = find_groups([assay.name for assay in self.assays], config.groups)
        if config.alignment is not None:
            self.frequencies = read_site_frequencies(config.alignment, proteins)

    def run(self, scores: Scores) -> Scores:
        """Compare the scores of a finished run with the measured values.

        Files that exist from the same scores, measured values and settings are not written again.

        Args:
            scores: the run.

        Returns:
            The run with `<name>_assay.json` and the table that it lists; unchanged if no variant has a measured value.
        """
        path = find_comparison(scores.manifest)
        table = path.with_suffix(scores.scores.suffix)
        if not self.assays:
            _remove_outdated(scores, path)
            return replace(scores, assay=None)
        settings = self._digest_settings(scores)
        if not self._is_finished(path, settings):
            self._write(scores, path, table, settings)
        _log_recorded(read_sealed_json(path, REMEDY))
        return replace(scores, assay=path, files=(*scores.files, table, path))

    def _is_finished(self, path: Path, settings: dict[str, Any]) -> bool:
        """Return whether the same comparison exists; a damaged file is an error, another comparison is replaced."""
        if self.config.restart or not path.is_file():
            return False
        return read_sealed_manifest(path, REMEDY)["settings"] == settings

    def _write(self, scores: Scores, path: Path, table: Path, settings: dict[str, Any]) -> None:
        own = _read_own_scores(scores)
        compared = [_score_assay(assay, self.proteins, own, self.frequencies) for assay in self.assays]
        path.unlink(missing_ok=True)  # of the comparison that this one replaces
        _write_table(table, self.assays, self.proteins, compared)
        reports = _evaluate(self.assays, self.proteins, compared, self.config.resamples)
        summary = summarise_assays(reports, self.groups, self.config.resamples) if len(reports) > 1 else None
        inputs = {name: path for name, path in self._list_inputs().items() if path.is_file()}
        content = {
            "stage": "score",
            "model": scores.model,
            "strategy": scores.strategy,
            "settings": settings,
            "assays": [report.to_json() for report in reports],
            "summary": None if summary is None else summary.to_json(),
            "checksums": {table.name: FileChecksums.compute(table)},
            "provenance": build_provenance("score", self.config, {"scores": scores.scores, **inputs}),
        }
        write_sealed_json(path, content)

    def _list_inputs(self) -> dict[str, Path]:
        inputs = {"alignment": self.config.alignment, "groups": self.config.groups}
        return {name: path for name, path in inputs.items() if path is not None}

    def _digest_settings(self, scores: Scores) -> dict[str, Any]:
        """Return all that determines the comparison."""
        values = hashlib.sha256()
        for assay in self.assays:
            values.update(repr([assay.name, [variant.text for variant in assay.variants]]).encode())
            for array in (assay.measured_N, assay.is_fit_N):
                values.update(b"" if array is None else array.tobytes())
        frequencies = hashlib.sha256()
        for protein, table in sorted(self.frequencies.items()):
            frequencies.update(repr(protein).encode() + table.tobytes())
        groups = to_json({name: group._asdict() for name, group in self.groups.items()})
        return {
            "scores": sha256_file(scores.scores),
            "measured": values.hexdigest(),
            "site_frequencies": frequencies.hexdigest() if self.frequencies else None,
            "groups": groups,
            "resamples": self.config.resamples,
        }


def _remove_outdated(scores: Scores, path: Path) -> None:
    """Remove the comparison of scores that were replaced since."""
    if not path.is_file():
        return
    recorded = read_sealed_json(path, REMEDY)
    if recorded["settings"]["scores"] != sha256_file(scores.scores):
        path.unlink()
        for name in recorded["checksums"]:
            path.with_name(name).unlink(missing_ok=True)


def _read_own_scores(scores: Scores) -> dict[tuple[str, str], float]:
    """Read the scores of the run by protein and mutation."""
    columns = (scores.column("protein"), scores.column("mutation"), scores.column("score"))
    return {(str(protein), str(mutation)): float(score) for protein, mutation, score in zip(*columns, strict=True)}


def _score_assay(
    assay: VariantSet,
    proteins: Sequence[Record],
    own: Mapping[tuple[str, str], float],
    frequencies: Mapping[int, np.ndarray],
) -> dict[str, np.ndarray]:
    """Return the (N,) scores of the model and of the baselines."""
    model_N = np.array([own[proteins[variant.protein].id, variant.text] for variant in assay.variants])
    return {MODEL: model_N, **score_baselines(assay.variants, proteins, frequencies)}


def _write_table(
    path: Path, assays: Sequence[VariantSet], proteins: Sequence[Record], compared: Sequence[dict[str, np.ndarray]]
) -> None:
    with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter=DELIMITERS[path.suffix], lineterminator="\n")
        rows.writerow(COLUMNS)
        for assay, found in zip(assays, compared, strict=True):
            for row, variant in enumerate(assay.variants):
                measured = float(assay.measured_N[row]) if assay.measured_N is not None else float("nan")
                is_fit = "" if assay.is_fit_N is None else int(assay.is_fit_N[row])
                values = [f"{found[name][row]:.7g}" if name in found else "" for name in (MODEL, *BASELINE_NAMES)]
                name = proteins[variant.protein].id
                rows.writerow(
                    [assay.name, name, variant.text, repr(measured) if np.isfinite(measured) else "", is_fit, *values]
                )


def _evaluate(
    assays: Sequence[VariantSet],
    proteins: Sequence[Record],
    compared: Sequence[dict[str, np.ndarray]],
    resamples: int,
) -> list[AssayReport]:
    """Evaluate all assays, with a progress line if there are several."""
    progress = Progress(logger, "compared", "assays", len(assays)) if len(assays) > 1 else None
    reports = []
    for assay, found in zip(assays, compared, strict=True):
        names = list(dict.fromkeys(proteins[variant.protein].id for variant in assay.variants))
        measured_N = assay.measured_N if assay.measured_N is not None else np.empty(0)
        factors = list_factors(assay.variants)
        reports.append(
            evaluate_assay(assay.name, " ".join(names), measured_N, assay.is_fit_N, found, resamples, factors=factors)
        )
        if progress is not None:
            progress.update(progress.done + 1)
    if progress is not None:
        progress.close()
    return reports


def list_factors(variants: Sequence[Variant]) -> list[np.ndarray] | None:
    """List what the bootstrap samples: positions and mutant letters of single substitutions, None for other variants.

    Args:
        variants: N variants.

    Returns:
        (N,) positions and (N,) letters as integers.
    """
    if any(len(variant.substitutions) != 1 for variant in variants):
        return None
    found = [(variant.protein, *variant.substitutions[0]) for variant in variants]
    positions = {place: number for number, place in enumerate(dict.fromkeys(entry[:2] for entry in found))}
    return [
        np.array([positions[entry[:2]] for entry in found]),
        np.array([STANDARD_RESIDUES.index(mutant) for *_, mutant in found]),
    ]


def _log_recorded(recorded: Mapping[str, Any]) -> None:
    """Log the lines of a comparison: per assay, or the averages of several."""
    for assay in recorded["assays"][:1] if recorded["summary"] is None else ():
        variants = format_count(assay["num_variants"], "variant")
        logger.info("%s: Spearman with %s: %s", assay["assay"], variants, _list_rows(assay["rows"]))
        of_model = assay["rows"][MODEL]
        others = [f"{METRIC_NAMES[name]} {_format(of_model[name])}" for name in METRIC_NAMES if name in of_model][1:]
        logger.info("%s: of the model also %s", assay["assay"], ", ".join(others))
        if published := assay.get("published_spearman"):
            found = ", ".join(f"{SHORT_NAMES[name]} {value:.3f}" for name, value in published.items())
            logger.info("%s: ProteinGym's Spearman of ESM-2: %s", assay["assay"], found)
        for sentence in assay["verdict"]:
            logger.info("%s: %s", assay["assay"], sentence)
    if (summary := recorded["summary"]) is not None:
        of = f"{summary['num_assays']} assays of {format_count(summary['num_proteins'], 'protein')}"
        logger.info("average Spearman of %s: %s", of, _list_rows(summary["averages"]))
        published = {name: value for name, value in summary["published_spearman"].items() if name in SHORT_NAMES}
        found = ", ".join(f"{SHORT_NAMES[name]} {value:.3f}" for name, value in published.items())
        logger.info("ProteinGym's averages of ESM-2 over its %d assays: %s", NUM_ASSAYS, found)
        for sentence in summary["verdict"]:
            logger.info("%s", sentence)


def _list_rows(rows: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    return ", ".join(
        f"{BASELINE_NAMES.get(name, name)} {_format(row['spearman'])}"
        for name, row in rows.items()
        if "spearman" in row
    )


def _format(found: Mapping[str, float | None]) -> str:
    """Format a value with its interval, as they are recorded."""
    interval = Interval(*(float("nan") if found[end] is None else float(found[end]) for end in Interval._fields))
    ends = f" [{interval.low:.3f}, {interval.high:.3f}]" if np.isfinite(interval.low) else ""
    return f"{interval.value:.3f}{ends}" if np.isfinite(interval.value) else "undefined"
