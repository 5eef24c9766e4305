"""Options of `esm2kit contacts`. Does not import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from esm2kit.core.errors import check_choices, check_range
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.models.config import check_model_name, complete_model_names


@dataclass(frozen=True)
class ContactsConfig:
    """Predict which residues of each protein are in contact, and compare the predictions with structures.

    Args:
        fasta: FASTA file (plain, .gz or .zst), several files, or a folder. Chains of a complex are separated by ':', as
            in `MKV:GHE`. PDB and mmCIF files are read too, as the observed residues of their protein chains.
        out_dir: Folder for `<name>_contacts.h5`, the pictures and the tables.
        name: Prefix of the output files. Default: name of the first FASTA file without its suffixes.
        model: Official name or its short form (8M, 35M, 150M, 650M, 3B, 15B), hub repository, fair-esm .pt, Hugging
            Face folder, esm2kit checkpoint, or distributed checkpoint.
        structures: PDB or mmCIF file (plain or .gz), or a folder of them. Each protein is compared with the structure
            of its id, or else with the one of its sequence.
        values: contacts are the probabilities of the model's contact head. coupling is the mean attention, corrected by
            the average product, for models whose contact head was never fitted.
        linker: Glycines between the chains of a complex. They are not in the output.
        max_residues: Maximum number of residues per protein, with the linkers. ESM-2 was trained on up to 1022.
        pictures: Number of proteins to draw, first those with a structure.
        format: File format of the pictures.
        dtype: Data type of the stored values.
        precision: Precision of the model. float32 is exact; bfloat16 (CPU and CUDA) is approximate. auto is bfloat16 on
            a CUDA GPU that has it and float32 elsewhere.
        device: Device of the model. auto uses a GPU if there is one.
        batch_tokens: Tokens per model input. Default: 1024 on a CPU, 32768 on a GPU.
        layer_by_layer: Read each layer of the model when it is used, instead of loading the whole model. Default: if
            the model does not fit in the free memory of the device.
        restart: Delete an unfinished run of the same name and replace finished files, whatever their settings.
    """

    fasta: Path | list[Path]
    out_dir: Path = Path("contacts")
    name: str | None = None
    model: str = "esm2_t6_8M_UR50D"
    structures: Path | None = None
    values: Literal["contacts", "coupling"] = "contacts"
    linker: int = 25
    max_residues: int = 1022
    pictures: int = 10
    format: Literal["png", "svg", "pdf"] = "png"
    dtype: Literal["float32", "float16"] = "float32"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    batch_tokens: int | None = None
    layer_by_layer: bool | None = None
    restart: bool = False

    option_groups = OptionGroups(
        usual="fasta structures model out_dir pictures",
        model="values linker max_residues",
        hardware="device precision batch_tokens layer_by_layer",
        output="name format dtype restart",
    )

    def __post_init__(self) -> None:
        expand_paths(self)
        complete_model_names(self, "model")
        check_choices(self)
        check_range(self, "linker", "pictures", at_least=0)
        check_range(self, "max_residues", at_least=1)
        check_range(self, "batch_tokens", at_least=1, hint="omit it to use the default for this machine")

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: the name of the model, and that the files exist.

        Raises:
            InputError: One of them does not exist.
        """
        check_model_name(self.model)
        from esm2kit.sequences.fasta import find_fasta_files  # slow import
        from esm2kit.sequences.structures import find_structures

        find_fasta_files(self.fasta)
        if self.structures is not None:
            find_structures(self.structures)
