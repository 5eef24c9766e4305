"""Options of `esm2kit split`. Does not import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from esm2kit.core.errors import InputError, check_choices, check_range
from esm2kit.core.files import check_output_folder
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths

FRACTIONS = "0.8,0.1,0.1"
PAIR_FRACTIONS = "0.6,0.2,0.2"  # a share s of the proteins keeps s * s of all pairs
TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx", ".xlsm", ".csv.gz", ".tsv.gz")


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(TABLE_SUFFIXES)


@dataclass(frozen=True)
class SplitConfig:
    """Divide proteins into train, validation and test, or into folds, so that similar proteins are in one set.

    The leakage report compares the result with a random split of the same sizes. With --check it describes a split that
    exists, which is not changed.

    Args:
        fasta: FASTA file (plain, .gz or .zst), several files, or a folder. Default: a column of labels holds the
            sequences; such a table can also be passed here. A table or FASTA of pairs of proteins is recognised.
        labels: Table of measurements or classes: CSV, TSV or Excel (file.xlsx:Sheet chooses a sheet). Its columns are
            copied to the result.
        out_dir: Folder for split.csv, leakage.html and leakage.json.
        identity: Least share of equal residues in the columns of an alignment of two similar proteins.
        coverage: Least share of the shorter protein that the alignment covers.
        fractions: Shares of train, validation and test, such as 0.8,0.1,0.1; two numbers are train and test. Default:
            0.8,0.1,0.1, and 0.6,0.2,0.2 of the proteins of pairs.
        folds: Number of folds for cross-validation, instead of fractions.
        method: How similar proteins are found. auto is mmseqs where MMseqs2 is installed and the proteins are not
            peptides, and kmers elsewhere. random keeps only equal sequences together.
        target: Column of labels whose classes, or low and high values, are divided evenly. Default: the only column of
            numbers, or of classes.
        id: Column of labels with the names of the proteins. Default: the column that names most records of fasta.
        seed: Seed of the division.
        check: Table with a column of sets or folds, or FASTA with SET= in its headers, to report on instead of dividing
            proteins. fasta may have its sequences.
        set: Column of check with the sets or folds. Default: a column with such a name.
        restart: Replace files that were made with other settings.
    """

    fasta: Path | list[Path] | None = None
    labels: Path | None = None
    out_dir: Path = Path("split")
    identity: float = 0.5
    coverage: float = 0.8
    fractions: str | None = None
    folds: int | None = None
    method: Literal["auto", "mmseqs", "kmers", "random"] = "auto"
    target: str | None = None
    id: str | None = None
    seed: int = 0
    check: Path | None = None
    set: str | None = None
    restart: bool = False

    option_groups = OptionGroups(
        usual="fasta labels out_dir identity fractions folds check",
        data="coverage method target id set seed",
        output="restart",
    )

    def __post_init__(self) -> None:
        expand_paths(self)
        check_choices(self)
        if isinstance(self.fasta, Path) and self.labels is None and _is_table(self.fasta):
            object.__setattr__(self, "labels", self.fasta)
            object.__setattr__(self, "fasta", None)
        check_range(self, "identity", at_least=0.3, at_most=1)
        check_range(self, "coverage", above=0, at_most=1)
        check_range(self, "folds", at_least=2)
        check_range(self, "seed", at_least=0)
        if self.fasta is None and self.labels is None and self.check is None:
            raise InputError(
                "nothing to divide. Pass a FASTA of proteins, a table of labels with their sequences, or both.",
                code="split.no-input",
            )
        if self.check is not None and self.labels is not None:
            raise InputError(
                f"check '{self.check}' and labels '{self.labels}' are given. Omit labels; the table of check has its "
                "own columns.",
                code="split.check-and-labels",
                path=self.check,
            )
        if self.set is not None and self.check is None:
            raise InputError(
                f"set '{self.set}' is the column of sets to check. Pass their table as --check, or omit set.",
                code="split.set-without-check",
                set=self.set,
            )
        if self.folds is not None and self.fractions is not None:
            raise InputError(
                f"folds {self.folds} and fractions {self.fractions} are given. Omit one of them.",
                code="split.folds-and-fractions",
                folds=self.folds,
                fractions=self.fractions,
            )
        self.parse_fractions()

    def parse_fractions(self) -> dict[str, float]:
        """Return the share of each set that gets proteins, training first.

        Raises:
            InputError: The fractions are not two or three numbers with a sum of 1.
        """
        fractions = FRACTIONS if self.fractions is None else self.fractions
        try:
            numbers = [float(part) for part in fractions.strip("[]() ").replace(" ", ",").split(",") if part]
        except ValueError:
            numbers = []
        sound = len(numbers) in (2, 3) and all(number >= 0 for number in numbers) and abs(sum(numbers) - 1) < 1e-6
        if not sound or not numbers[0] or not any(numbers[1:]):
            raise InputError(
                f"fractions '{fractions}' are not the shares of train, validation and test. Write two or three "
                "numbers with the sum 1, such as 0.8,0.1,0.1 or 0.9,0.1.",
                code="split.fractions",
                found=fractions,
            )
        names = ("train", "validation", "test") if len(numbers) == 3 else ("train", "test")
        return {name: number for name, number in zip(names, numbers, strict=True) if number}

    def check_inputs(self) -> None:
        """Check that the files exist, and that the folder can be written to.

        Raises:
            InputError: One of them does not exist, or the folder cannot be written to.
        """
        from esm2kit.sequences.fasta import find_fasta_files  # slow import

        check_output_folder(self.out_dir)
        if self.fasta is not None:
            find_fasta_files(self.fasta)
        for name in ("labels", "check"):
            path = getattr(self, name)
            if path is not None and not path.exists() and not Path(str(path).rpartition(":")[0]).is_file():
                raise InputError(f"{path}: no such file. Check {name}.", code="split.absent", path=path, name=name)
