"""ProteinGym's published Spearman correlations of ESM-2 and of its site-independent model, by assay and as averages.

The averages are of the 217 assays with substitutions: the mean over the assays of a protein and a type of selection,
then over the proteins of a type, then over the five types. `proteingym.csv` has the assays; the tests compute the
averages from it.

Source: Notin et al. 2023 (ProteinGym), github.com/OATML-Markslab/ProteinGym, commit bb68524, MIT licence:
`benchmarks/DMS_zero_shot/substitutions/Spearman`.
"""

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

AVERAGES = {
    "esm2_t6_8M_UR50D": 0.226, "esm2_t12_35M_UR50D": 0.321, "esm2_t30_150M_UR50D": 0.387, "esm2_t33_650M_UR50D": 0.414,
    "esm2_t36_3B_UR50D": 0.406, "esm2_t48_15B_UR50D": 0.400, "site_independent": 0.359,
}  # fmt: skip
NUM_ASSAYS = 217
TABLE = Path(__file__).with_name("proteingym.csv")


class PublishedAssay(NamedTuple):
    """An assay of ProteinGym.

    Args:
        uniprot_id: entry name of the protein.
        selection_type: Activity, Binding, Expression, OrganismalFitness or Stability.
        taxon: Human, Eukaryote, Prokaryote or Virus.
        msa_depth: Low, Medium or High.
        spearman: model -> Spearman correlation, rounded to three decimals.
    """

    uniprot_id: str
    selection_type: str
    taxon: str
    msa_depth: str
    spearman: dict[str, float]


@cache
def read_assays() -> dict[str, PublishedAssay]:
    """Read the assays by their DMS ids."""
    with open(TABLE, encoding="utf-8", newline="") as file:
        return {
            row["DMS_id"]: PublishedAssay(
                row["UniProt_ID"],
                row["coarse_selection_type"],
                row["taxon"],
                row["MSA_Neff_L_category"],
                {model: float(row[model]) for model in AVERAGES},
            )
            for row in csv.DictReader(file)
        }


def find_assay(name: str) -> PublishedAssay | None:
    """Return the assay with a DMS id, or None if ProteinGym has no such assay."""
    return read_assays().get(name)
