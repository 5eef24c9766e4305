"""The result of `esm2kit score`: its files, and their tables as arrays."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from esm2kit.core.checksums import read_sealed_json, read_sealed_manifest
from esm2kit.core.errors import InputError, suggest_name

REMEDY = "run `esm2kit score` again with --restart true"
DELIMITERS = {".tsv": "\t", ".csv": ","}


def find_comparison(manifest: Path) -> Path:
    """Return the path of the comparison with measured values next to a run's manifest."""
    return manifest.with_name(f"{manifest.name.removesuffix('_scores.json')}_assay.json")


@dataclass(frozen=True)
class Scores:
    """Files of a run, and their content on demand.

    Args:
        scores: the table, one row per variant, or per protein with `sequences`.
        tables: HDF5 file with the table of every single substitution of each protein. None with `sequences`.
        manifest: JSON file with the settings, the provenance and the checksums of the other files.
        strategy: how the variants were scored; `exact` or `estimate` with `sequences`.
        model: name of the model.
        num_proteins: proteins of the FASTA.
        num_scores: rows of the table.
        most_tolerated: positions with the highest mean log-odds of their substitutions, if there is one protein.
        least_tolerated: positions with the lowest, the lowest first.
        mean_error: mean absolute error of the estimate of `fast`, per residue. None if nothing was estimated.
        files: all files.
        page: HTML page with the verdict, the pictures and the tables. None without pictures.
        pictures: heat maps of the proteins, as PNG and SVG.
        structures: structures with the scores in the column of B factors.
        assay: JSON file of the comparison with measured values, if there are some, see `read_assay`.
    """

    scores: Path
    tables: Path | None
    manifest: Path
    strategy: str
    model: str
    num_proteins: int
    num_scores: int
    most_tolerated: str | None
    least_tolerated: str | None
    mean_error: float | None
    files: tuple[Path, ...]
    assay: Path | None = None
    page: Path | None = None
    pictures: tuple[Path, ...] = ()
    structures: tuple[Path, ...] = ()

    @classmethod
    def read(cls, manifest: Path) -> "Scores":
        """Open the result of a finished run.

        Args:
            manifest: its `<name>_scores.json`.

        Returns:
            The result.

        Raises:
            InputError: a file is missing or damaged.
        """
        manifest = Path(manifest)
        recorded = read_sealed_manifest(manifest, REMEDY)
        summary = recorded["summary"]
        paths = [manifest.with_name(name) for name in recorded["checksums"]]
        tables = next((path for path in paths if path.suffix == ".h5"), None)
        assay = find_comparison(manifest)
        return cls(
            scores=paths[0],
            tables=tables,
            manifest=manifest,
            files=(*paths, manifest),
            assay=assay if assay.is_file() else None,
            **summary,
        )

    def read_assay(self) -> dict[str, Any]:
        """Read the comparison with measured values.

        Returns:
            `assays`, a list with the `rows` of each (`model` and baselines -> metric -> value, low, high), the
            differences `model_minus_baseline`, `better_baselines` and `verdict`; and `summary`, the averages of several
            assays, otherwise None.

        Raises:
            InputError: the variants have no measured values, or the file is damaged.
        """
        if self.assay is None:
            raise InputError(
                f"{self.scores} was not compared with measured values. Score a table that has a column of them.",
                code="scores.no-assay",
            )
        return read_sealed_json(self.assay, REMEDY)

    @property
    def proteins(self) -> list[str]:
        """The ids of the proteins, in the order of the FASTA."""
        if self.tables is None:
            return self.column("protein").tolist()
        with h5py.File(self.tables) as file:
            return [file[str(index)].attrs["original_id"] for index in range(len(file))]

    def column(self, name: str) -> np.ndarray:
        """Read a column of the table.

        Args:
            name: of the column, such as `mutation` or `score`.

        Returns:
            (rows,) numbers if all cells are numbers, otherwise text.

        Raises:
            InputError: there is no such column.
        """
        with open(self.scores, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter=DELIMITERS[self.scores.suffix])
            if name not in (rows.fieldnames or ()):
                raise InputError(
                    f"{self.scores} has no column '{name}'; {suggest_name(name, rows.fieldnames or ())}",
                    code="scores.column",
                    name=name,
                )
            cells = np.array([row[name] for row in rows])
        try:
            return cells.astype(float)
        except ValueError:
            return cells

    def table(self, protein: str | int = 0) -> np.ndarray:
        """Read the log-odds of every single substitution of a protein.

        Args:
            protein: its id, or its index in the FASTA.

        Returns:
            (T, 20) float32, in the order of STANDARD_RESIDUES; 0 for the wild type, NaN where no score was computed.

        Raises:
            InputError: there is no such protein, or the run scored whole proteins.
        """
        return self._read("log_odds", protein)

    def log_probabilities(self, protein: str | int = 0) -> np.ndarray:
        """Read the log-probabilities of the residues, (T, 20); only masked-marginals and wt-marginals have them."""
        return self._read("log_probabilities", protein)

    def entropy(self, protein: str | int = 0) -> np.ndarray:
        """Read the entropy of the 20 residues at each position, (T,) in nats, from 0 to ln 20 = 3.0."""
        return self._read("entropy", protein)

    def sequence(self, protein: str | int = 0) -> str:
        """Read the wild type of a protein."""
        with self._open() as file:
            return file[self._find(protein)].attrs["sequence"]

    def _open(self) -> h5py.File:
        if self.tables is None:
            raise InputError(
                f"{self.scores} has scores of whole proteins and no table of substitutions. Run without sequences.",
                code="scores.no-tables",
            )
        return h5py.File(self.tables)

    def _read(self, name: str, protein: str | int) -> np.ndarray:
        with self._open() as file:
            group = file[self._find(protein)]
            if name not in group:
                raise InputError(
                    f"{self.tables} has no {name}: the strategy {self.strategy} does not compute them. Use "
                    "masked-marginals or wt-marginals.",
                    code="scores.no-table",
                    name=name,
                    strategy=self.strategy,
                )
            return group[name][:]

    def _find(self, protein: str | int) -> str:
        """Return the key of a protein."""
        if isinstance(protein, str):
            ids = self.proteins
            if protein in ids:
                return str(ids.index(protein))
        elif 0 <= protein < self.num_proteins:
            return str(protein)
        known = self.proteins[:1000]
        raise InputError(
            f"protein {protein!r} is not in {self.tables}; {suggest_name(str(protein), known)}",
            code="scores.protein",
            protein=protein,
        )
