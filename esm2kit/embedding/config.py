"""What `esm2kit embed` is asked for; without torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from esm2kit.core.errors import InputError, check_choices, check_range


@dataclass(frozen=True)
class EmbedConfig:
    """What to embed, with which model, and into what.

    Args:
        fasta: FASTA file (plain, .gz or .zst), several of them, or a folder; ids must tell different sequences apart.
        out_dir: folder for `<name>_embeddings.h5` (per protein) and `<name>_hiddens.h5` (per residue).
        name: what the files are called; the first FASTA's, less .fasta (.fa, .faa, .fas), .gz, .zst, if not given.
        model: official name, hub repository, fair-esm .pt, Hugging Face folder, our checkpoint, or a distributed one.
        repr_layers: layers to keep, 0 (the embedding) to num_layers; negative ones count from the last.
        per_protein: write the mean over the residues' vectors.
        per_residue: write every residue's vector.
        bos: write the vector of the BOS token, one a protein, into `<name>_bos_embeddings.h5`.
        logits: write the masked-LM logits of every residue, 33 each, into `<name>_logits.h5`.
        untrained_seed: use the model's architecture with fresh weights from this seed: the baseline.
        long_proteins: what to do with proteins over max_residues: error names them, truncate keeps their start, window
            embeds overlapping windows and averages residues that lie in several.
        max_residues: longest stretch the model sees at once; ESM-2 was trained on 1022.
        window_overlap: residues that neighbouring windows share, below max_residues.
        dtype: float32 or float16, as stored.
        key: what names a dataset: the protein's index, the sequence's hash (as biotrainer looks it up), or the id.
        layout: one dataset a protein, or packed arrays with offsets (fastest to read).
        precision: float32 is exact; bfloat16 and int8 (CPU) are faster and approximate.
        device: auto takes a GPU if there is one.
        workers: single-thread workers on the CPU; one a core if not given.
        batch_tokens: tokens that go through the model together; 1024 on a CPU, 32768 on a GPU if not given.
        restart: throw an unfinished run of the same name away and replace finished files, whatever their settings.
    """

    fasta: Path | list[Path]
    out_dir: Path = Path("embeddings")
    name: str | None = None
    model: str = "esm2_t6_8M_UR50D"
    repr_layers: list[int] = field(default_factory=lambda: [-1])
    per_protein: bool = True
    per_residue: bool = False
    bos: bool = False
    logits: bool = False
    untrained_seed: int | None = None
    long_proteins: Literal["error", "truncate", "window"] = "error"
    max_residues: int = 1022
    window_overlap: int = 256
    dtype: Literal["float32", "float16"] = "float32"
    key: Literal["index", "hash", "id"] = "index"
    layout: Literal["datasets", "packed"] = "datasets"
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int | None = None
    batch_tokens: int | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if not (self.per_protein or self.per_residue or self.bos or self.logits):
            raise InputError("nothing to write: set per_protein, per_residue, bos or logits", code="embed.nothing")
        if not self.repr_layers:
            raise InputError(
                "repr_layers is empty: name at least one layer, as [-1] for the last", code="embed.no-layers"
            )
        if self.max_residues < 1 or not 0 <= self.window_overlap < self.max_residues:
            raise InputError(
                f"window_overlap {self.window_overlap} must be 0 or more and below max_residues {self.max_residues}",
                code="option.range",
                name="window_overlap",
                found=self.window_overlap,
            )
        check_range(self, "workers", "batch_tokens", at_least=1, hint="leave it out for what fits the machine")
        if self.layout == "packed" and self.key != "index":
            raise InputError(
                f"key {self.key} names datasets, the packed layout has none: leave one of them out",
                code="embed.key",
                key=self.key,
                layout=self.layout,
            )
