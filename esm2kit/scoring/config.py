"""Options of `esm2kit score`. Does not import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from esm2kit.core.errors import InputError, check_choices, check_range
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.models.config import check_model_name, complete_model_names

Strategy = Literal["masked-marginals", "wt-marginals", "mutant-marginals", "pseudo-ppl"]
# These compute the probabilities of all residues at a position.
ENTROPY_STRATEGIES = ("masked-marginals", "wt-marginals")
# Longest input of one forward pass, with BOS and EOS, as ProteinGym's `model_window`.
SPECIAL_TOKENS = 2
TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx", ".xlsm", ".csv.gz", ".tsv.gz")


def is_table_name(name: str) -> bool:
    """Return whether a file is a table by its name; hidden files and those that Excel has open are not."""
    return name.lower().endswith(TABLE_SUFFIXES) and not name.startswith((".", "~$"))


@dataclass(frozen=True)
class ScoreConfig:
    """Score mutations of proteins, or proteins as a whole, with a model and without labels.

    Args:
        fasta: FASTA file with the wild types (plain, .gz or .zst), several files, or a folder. Different sequences need
            different ids. Or a table of variants that has their wild type, such as one of ProteinGym's, or a folder of
            such tables.
        mutations: Variants to score: mutations separated by commas, such as A42G or A42G:K50R for two at once, or a
            file of them: a text file, a table (CSV, TSV, Excel, as ProteinGym's), or a FASTA of mutated sequences.
            Default: every single substitution.
        positions: Positions whose substitutions are scored, such as 10-40,52. Default: all.
        model: Official name or its short form (8M, 35M, 150M, 650M, 3B, 15B), hub repository, fair-esm .pt, Hugging
            Face folder, esm2kit checkpoint, or distributed checkpoint.
        out_dir: Folder for `<name>_scores.tsv`, `<name>_scores.h5`, `<name>_scores.html` and the other files.
        strategy: How a variant is scored. masked-marginals hides each mutated position of the wild type, wt-marginals
            hides nothing and needs one pass, mutant-marginals reads the mutant, and pseudo-ppl compares the
            pseudo-log-likelihoods of mutant and wild type.
        sequences: Score the proteins themselves instead of mutations: the mean log-likelihood and the pseudo-perplexity
            of each.
        fast: With sequences, hide several residues at once, an estimate. Its error is measured on a sample.
        passes: Forward passes per protein for fast.
        sample: Proteins of which fast also computes the exact value.
        mask_together: With masked-marginals, hide all mutated positions of a variant at once, as in the formula of
            Meier et al. 2021, instead of one at a time, as their program and ProteinGym do.
        offset: What is added to the number of a residue: with 25, the first residue of the FASTA is residue 26.
        column: Column of the mutations or mutated sequences in a table. Default: found by its content.
        measured: Column of the measured values, with which the scores are compared. Default: DMS_score, or the only
            column of numbers.
        alignment: Alignment of homologs (A3M, Stockholm or aligned FASTA), or a folder of them, for site-independent
            frequencies as a baseline in the comparison with measured values.
        groups: Table of the proteins and the groups of several assays, such as ProteinGym's reference file, for
            averages. Default: as ProteinGym groups its assays; others by the names of their files.
        structure: Structure of the protein, as PDB or mmCIF, or a folder of structures. Copies of them get the scores
            as B factors, which viewers show as colours.
        colour_by: Value of a residue in the structure: mean or lowest (worst) score of its substitutions, or entropy of
            the model's guess.
        pictures: Number of proteins with a heat map, as pictures and in the HTML page. With 0 neither is written.
        resamples: Bootstrap replicates for the intervals of the comparison with measured values.
        untrained_seed: Use the model's architecture with random weights from this seed, as a baseline. Default: trained
            weights.
        max_residues: Maximum number of residues per model input. Of a longer protein, a window around the mutation is
            used, as in ProteinGym.
        precision: Precision of the model. auto uses bfloat16 on a CUDA GPU that computes in it and float32 elsewhere.
            float32 is exact; bfloat16 and int8 (CPU) are faster and approximate.
        device: Device of the model. auto uses a GPU if there is one.
        workers: Single-threaded workers on the CPU. Default: one per core.
        batch_tokens: Tokens per model input. Default: 1024 on a CPU, 32768 on a CUDA GPU, 8192 on mps.
        layer_by_layer: Read each layer of the model when it is used, instead of loading the whole model. Default: if
            the model does not fit in the free memory of the device.
        name: Prefix of the output files. Default: name of the first FASTA file without its suffixes.
        format: Format of the table.
        restart: Delete an unfinished run of the same name and replace finished files, whatever their settings.
    """

    fasta: Path | list[Path] | None = None
    mutations: str | None = None
    positions: str | None = None
    model: str = "esm2_t6_8M_UR50D"
    out_dir: Path = Path("scores")
    strategy: Strategy = "masked-marginals"
    sequences: bool = False
    fast: bool = False
    passes: int = 8
    sample: int = 5
    mask_together: bool = False
    offset: int = 0
    column: str | None = None
    measured: str | None = None
    alignment: Path | None = None
    groups: Path | None = None
    structure: Path | None = None
    colour_by: Literal["mean", "worst", "entropy"] = "mean"
    pictures: int = 10
    resamples: int = 1000
    untrained_seed: int | None = None
    max_residues: int = 1022
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    workers: int | None = None
    batch_tokens: int | None = None
    layer_by_layer: bool | None = None
    name: str | None = None
    format: Literal["tsv", "csv"] = "tsv"
    restart: bool = False

    option_groups = OptionGroups(
        usual="fasta mutations positions model out_dir strategy sequences fast structure",
        data="offset column measured alignment groups",
        model="mask_together untrained_seed max_residues",
        evaluation="passes sample resamples",
        hardware="device precision workers batch_tokens layer_by_layer",
        output="name format pictures colour_by restart",
    )

    def __post_init__(self) -> None:
        expand_paths(self)
        complete_model_names(self, "model")
        check_choices(self)
        if self.fasta is None and self.mutations is None:
            raise InputError(
                "nothing to score. Pass a FASTA of proteins, or a table of variants such as one of ProteinGym's.",
                code="score.no-input",
            )
        check_range(self, "max_residues", at_least=2)
        check_range(self, "resamples", at_least=100, hint="fewer replicates give no 95% interval")
        check_range(self, "passes", at_least=1)
        check_range(self, "sample", "untrained_seed", "pictures", at_least=0)
        check_range(self, "workers", "batch_tokens", at_least=1, hint="omit it to use the default for this machine")
        chosen = [name for name in ("sequences", "mutations", "positions") if getattr(self, name)]
        if len(chosen) > 1:
            raise InputError(
                f"{' and '.join(chosen)} choose different things to score. Use one of them.",
                code="score.both",
                found=chosen,
            )
        if self.fast and not self.sequences:
            raise InputError(
                "fast is an estimate for whole proteins. Add --sequences, or use strategy wt-marginals for mutations.",
                code="score.fast",
            )
        if self.sequences and self.strategy in ("wt-marginals", "mutant-marginals"):
            raise InputError(
                f"strategy '{self.strategy}' is for mutations; sequences are scored by their pseudo-log-likelihood. "
                "Omit --strategy, or --sequences.",
                code="score.sequences-strategy",
                strategy=self.strategy,
            )
        if self.structure is not None and self.sequences:
            raise InputError(
                "structure shows the scores of mutations, and sequences scores whole proteins. Omit one of them.",
                code="score.structure-sequences",
            )
        if self.colour_by == "entropy" and self.strategy not in ENTROPY_STRATEGIES:
            raise InputError(
                f"colour_by entropy requires strategy {' or '.join(ENTROPY_STRATEGIES)}, found '{self.strategy}'. "
                "Use colour_by mean.",
                code="score.colour-by",
                strategy=self.strategy,
            )
        if self.mask_together and (self.strategy != "masked-marginals" or self.sequences):
            raise InputError(
                f"mask_together applies to the strategy masked-marginals, found '{self.strategy}'"
                f"{' and sequences' if self.sequences else ''}. Omit it.",
                code="score.mask-together",
                strategy=self.strategy,
            )

    @property
    def max_tokens(self) -> int:
        """Maximum tokens per model input, with BOS and EOS."""
        return self.max_residues + SPECIAL_TOKENS

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: the name of the model, and that the FASTA exists.

        Raises:
            InputError: One of them does not exist.
        """
        check_model_name(self.model)
        self.split_inputs()

    def split_inputs(self) -> tuple[list[Path], str | Path | None]:
        """Find the FASTA files, and the source of the variants, which may also be given as `fasta`.

        Returns:
            The FASTA files, none if the variants have their wild type; and what `read_variants` reads, None without
            variants.

        Raises:
            InputError: a file does not exist, or the variants are given twice.
        """
        from esm2kit.sequences.fasta import find_fasta_files, is_fasta_name  # slow import

        for name in ("alignment", "groups", "structure"):
            path = getattr(self, name)
            if path is not None and not path.exists():
                raise InputError(f"{path}: no such file. Check {name}.", code="score.absent", path=path, name=name)
        if self.fasta is None:
            return [], self.mutations
        path = self.fasta[0] if isinstance(self.fasta, list) and len(self.fasta) == 1 else self.fasta
        if isinstance(path, list):
            return find_fasta_files(path), self.mutations
        path = Path(path)
        is_table = path.is_file() and is_table_name(path.name)
        if path.is_dir():
            names = [file.name for file in path.iterdir()]
            is_table = any(map(is_table_name, names)) and not any(map(is_fasta_name, names))
        if not is_table:
            return find_fasta_files(path), self.mutations
        if chosen := [name for name in ("mutations", "positions", "sequences") if getattr(self, name)]:
            raise InputError(
                f"{path} is a table of variants, and {' and '.join(chosen)} choose other things to score. Pass the "
                "FASTA of the wild type, or omit them.",
                code="score.both",
                found=chosen,
            )
        return [], path
