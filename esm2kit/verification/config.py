"""Options of `esm2kit verify`. Does not import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from esm2kit.core.errors import InputError, check_choices, check_range, suggest_name
from esm2kit.core.files import check_output_folder
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.models.config import MODEL_NAMES, SIZES, check_model_name, complete_model_names


@dataclass(frozen=True)
class VerifyConfig:
    """Check that this installation computes what was published for an official model.

    Every check has an expected value, the value found, a tolerance and a verdict. What cannot be checked, such as the
    weights without a network, is listed with the reason.

    Args:
        model: Official name or its short form (8M, 35M, 150M, 650M, 3B, 15B).
        weights: Local copy of the official weights: Hugging Face folder, fair-esm .pt or esm2kit checkpoint. Default:
            downloaded from the Hugging Face hub, unless they are in its cache.
        structures: PDB or mmCIF file, or a folder of them, for the precision of predicted contacts. pdb downloads eight
            small entries of the Protein Data Bank. Default: not checked.
        full: Also compare a probe and a fine-tuned model with published scores. Downloads a FLIP task; fine-tuning
            takes hours on a CPU.
        out_dir: Folder for `verify.json` and the files of the checks.
        golden: YAML file with reference outputs of the model. Default: those of esm2kit, where it has some.
        fasta: Proteins whose pseudo-perplexity is computed. Default: the validation proteins of the sample data.
        proteins: Number of these proteins, the first of the file.
        task: FLIP task of full.
        split: Split of this task.
        data_dir: Folder of the FLIP task folders, for full.
        margin: Allowed difference of a score of full from its published value, for the differences of the protocols.
        resamples: Bootstrap replicates for the intervals of full.
        device: Device of the model. auto uses a GPU if there is one. The precision is always float32.
    """

    model: str = "esm2_t6_8M_UR50D"
    weights: Path | None = None
    structures: Path | None = None
    full: bool = False
    out_dir: Path = Path("verify")
    golden: Path | None = None
    fasta: Path | None = None
    proteins: int = 10
    task: str = "gb1"
    split: str = "three_vs_rest"
    data_dir: Path = Path("flip")
    margin: float = 0.05
    resamples: int = 1000
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    option_groups = OptionGroups(
        usual="model weights structures full out_dir",
        data="golden fasta proteins task split data_dir",
        evaluation="margin resamples",
        hardware="device",
    )

    def __post_init__(self) -> None:
        expand_paths(self)
        complete_model_names(self, "model")
        check_choices(self)
        check_range(self, "proteins", at_least=1)
        check_range(self, "margin", at_least=0, at_most=1)
        check_range(self, "resamples", at_least=100, hint="fewer replicates give no 95% interval")
        if self.model not in SIZES:
            raise InputError(
                f"model '{self.model}' is not an official ESM-2, whose published values verify compares with; "
                f"{suggest_name(self.model, MODEL_NAMES)}. A local copy of its weights is passed as --weights.",
                code="verify.model",
                name=self.model,
            )

    @property
    def downloads_structures(self) -> bool:
        """Whether the structures are entries of the Protein Data Bank, and not a folder with the name pdb."""
        return self.structures == Path("pdb") and not self.structures.exists()

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: that the given files exist.

        Raises:
            InputError: One of them does not exist, or the output folder cannot be written to.
        """
        from esm2kit.sequences.fasta import find_fasta_files  # slow import
        from esm2kit.sequences.structures import find_structures

        check_output_folder(self.out_dir)
        if self.weights is not None:
            check_model_name(str(self.weights))
        if self.weights is not None and not self.weights.exists():
            raise InputError(
                f"{self.weights}: no such file or folder. Check weights.", code="verify.absent", path=self.weights
            )
        if self.structures is not None and not self.downloads_structures:
            find_structures(self.structures)
        if self.fasta is not None:
            find_fasta_files(self.fasta)
        if self.golden is not None and not self.golden.is_file():
            raise InputError(f"{self.golden}: no such file. Check golden.", code="verify.absent", path=self.golden)
