"""Options of `esm2kit embed`. Does not import torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from esm2kit.core.errors import InputError, check_choices, check_range, suggest_name
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.models.config import check_model_name, check_ways, complete_model_names

# How the rows of a protein become one vector; -> part of the file name. "mean+max" has twice the width.
POOLINGS = {"mean": "", "max": "max_", "bos": "bos_", "mean+max": "mean_max_"}


def check_poolings(names: Sequence[str], allowed: Collection[str]) -> None:
    """Check names of poolings.

    Args:
        names: the names.
        allowed: the names that the stage has.

    Raises:
        InputError: there is none, one is unknown, or one is listed twice.
    """
    wrong = next((name for name in names if name not in allowed), None)
    if wrong is not None or not names:
        reason = "pooling is empty" if wrong is None else f"pooling cannot be {wrong!r}"
        raise InputError(
            f"{reason}; {suggest_name(wrong or '', allowed)}",
            code="option.pooling",
            found=list(names),
            allowed=tuple(allowed),
        )
    if len(set(names)) < len(names):
        raise InputError(
            f"pooling has a name twice: {', '.join(names)}. Remove one.", code="option.pooling-twice", found=list(names)
        )


@dataclass(frozen=True)
class EmbedConfig:
    """Embed proteins with a model and write HDF5 files.

    Args:
        fasta: FASTA file (plain, .gz or .zst), several files, or a folder. Different sequences need different ids.
        out_dir: Folder for `<name>_embeddings.h5` (per protein) and `<name>_hiddens.h5` (per residue).
        name: Prefix of the output files. Default: name of the first FASTA file without its suffixes.
        model: Official name or its short form (8M, 35M, 150M, 650M, 3B, 15B), hub repository, fair-esm .pt, Hugging
            Face folder, esm2kit checkpoint, or distributed checkpoint.
        repr_layers: Layers to write, from 0 (token embedding) to num_layers. Negative numbers count from the last.
        per_protein: Write one vector per protein, as pooling describes.
        pooling: How the residue vectors of a protein become one: mean, max (the largest value of each dimension), bos
            (the vector of the BOS token) or mean+max (both, one after the other); several give several files. Of a
            long protein, the rows are averaged over its windows first.
        per_residue: Write one vector per residue.
        bos: Write the vector of the BOS token, one per protein, to `<name>_bos_embeddings.h5`.
        logits: Write the masked-LM logits, 33 per residue, to `<name>_logits.h5`.
        untrained_seed: Use the model's architecture with random weights from this seed, as a baseline. Default: trained
            weights.
        long_proteins: Handling of proteins longer than max_residues: error stops and lists them, truncate embeds their
            first residues, window embeds overlapping windows and averages residues that are in several.
        max_residues: Maximum number of residues per model input. ESM-2 was trained on up to 1022.
        window_overlap: Residues that adjacent windows share. Must be below max_residues.
        dtype: Data type of the stored values.
        key: Name of each dataset: index of the protein, hash of the sequence (as in biotrainer), or id.
        layout: One dataset per protein, or packed arrays with offsets, which are the fastest to read.
        precision: Precision of the model. float32 is exact; bfloat16 (CPU and CUDA) and int8 (CPU) are faster and
            approximate. auto is bfloat16 on a CUDA GPU that has it and float32 elsewhere; it keeps the float32 of an
            unfinished run and of existing files.
        device: Device of the model. auto uses a GPU if there is one.
        devices: Number of GPUs, or of processes on a CPU. Each embeds a share of the proteins.
        workers: Single-threaded workers on the CPU. Default: one per core.
        batch_tokens: Tokens per model input. Default: 1024 on a CPU, 32768 on a GPU.
        compile: Compile the layers, on a CUDA GPU. auto does so if the run is long enough to repay it.
        layer_by_layer: Read each layer of the model when it is used, instead of loading the whole model. Default: if
            the model does not fit in the free memory of the device.
        shard: Divide the layers of the model over the devices, which then compute their shares together. auto does so
            with GPUs if the model does not fit on one of them but does on all.
        restart: Delete an unfinished run of the same name and replace finished files, whatever their settings.
    """

    fasta: Path | list[Path]
    out_dir: Path = Path("embeddings")
    name: str | None = None
    model: str = "esm2_t6_8M_UR50D"
    repr_layers: list[int] = field(default_factory=lambda: [-1])
    per_protein: bool = True
    pooling: list[str] = field(default_factory=lambda: ["mean"])
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
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    workers: int | None = None
    batch_tokens: int | None = None
    compile: bool | Literal["auto"] = "auto"
    layer_by_layer: bool | None = None
    shard: bool | Literal["auto"] = "auto"
    restart: bool = False

    option_groups = OptionGroups(
        usual="fasta model out_dir per_protein per_residue long_proteins",
        model="repr_layers pooling untrained_seed max_residues window_overlap",
        hardware="device devices precision workers batch_tokens compile layer_by_layer shard",
        output="name bos logits dtype key layout restart",
    )

    def __post_init__(self) -> None:
        expand_paths(self)
        complete_model_names(self, "model")
        check_choices(self)
        check_poolings(self.pooling, POOLINGS)
        if not self.per_protein and self.pooling != ["mean"]:
            raise InputError(
                f"pooling {', '.join(self.pooling)} makes one vector per protein, but per_protein is off. Omit one of "
                "them.",
                code="embed.pooling-unused",
                pooling=self.pooling,
            )
        if not (self.per_protein or self.per_residue or self.bos or self.logits):
            raise InputError("nothing to write. Set per_protein, per_residue, bos or logits.", code="embed.nothing")
        if not self.repr_layers:
            raise InputError(
                "repr_layers is empty. Specify at least one layer, such as [-1] for the last.", code="embed.no-layers"
            )
        check_range(self, "max_residues", "devices", at_least=1)
        check_ways(self.shard, self.layer_by_layer)
        if self.long_proteins == "window" and not 0 <= self.window_overlap < self.max_residues:
            raise InputError(
                f"window_overlap must be at least 0 and below max_residues {self.max_residues}, "
                f"found {self.window_overlap}",
                code="option.range",
                name="window_overlap",
                found=self.window_overlap,
            )
        check_range(self, "workers", "batch_tokens", at_least=1, hint="omit it to use the default for this machine")
        if self.layout == "packed" and self.key != "index":
            raise InputError(
                f"key '{self.key}' names datasets, which the packed layout does not have. Omit key or layout.",
                code="embed.key",
                key=self.key,
                layout=self.layout,
            )

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: the name of the model, and that the FASTA exists.

        Raises:
            InputError: One of them does not exist.
        """
        check_model_name(self.model)
        from esm2kit.sequences.fasta import find_fasta_files  # slow import

        find_fasta_files(self.fasta)


@dataclass(frozen=True)
class MapConfig:
    """Draw the proteins of a FASTA file as a map of their embeddings, coloured by a measurement.

    The embeddings are computed first, unless out_dir already has them.

    Args:
        fasta: FASTA file (plain, .gz or .zst), several files, or a folder, with at least four proteins; or a table that
            has their sequences, as FLIP, ProteinGym and others publish them, coloured by its targets.
        model: Official name or its short form (8M, 35M, 150M, 650M, 3B, 15B), hub repository, fair-esm .pt, Hugging
            Face folder, esm2kit checkpoint, or distributed checkpoint.
        labels: Table of measurements or classes per protein: CSV, TSV or Excel (.xlsx), or a folder with a table per
            set.
        id: Column of labels with the ids of the FASTA file. Default: the column that names most of the proteins.
        colour_by: Column of labels, field of the FASTA headers (such as OS), or residues for the length. Default: the
            first that groups or measures the proteins.
        method: Projection: pca, tsne or umap. umap requires the umap-learn package.
        out_dir: Folder for `<name>_embeddings.h5`, `<name>_map.html`, `<name>_map.svg` and `<name>_map.csv`.
        name: Prefix of the output files. Default: name of the first FASTA file without its suffixes.
        format: File format of the picture.
        long_proteins: Handling of proteins longer than 1022 residues: error stops and lists them, truncate embeds their
            first residues, window embeds overlapping windows and averages residues that are in several.
        seed: Seed of the projections tsne and umap.
        device: Device of the model. auto uses a GPU if there is one.
        devices: Number of GPUs, or of processes on a CPU, for the embeddings.
    """

    fasta: Path | list[Path]
    model: str = "esm2_t6_8M_UR50D"
    labels: Path | None = None
    id: str | None = None
    colour_by: str | None = None
    method: Literal["pca", "tsne", "umap"] = "pca"
    out_dir: Path = Path("embeddings")
    name: str | None = None
    format: Literal["svg", "png", "pdf"] = "svg"
    long_proteins: Literal["error", "truncate", "window"] = "error"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1

    option_groups = OptionGroups(
        usual="fasta labels colour_by model method out_dir",
        data="id",
        model="long_proteins",
        hardware="device devices",
        output="name format seed",
    )

    def __post_init__(self) -> None:
        expand_paths(self)
        complete_model_names(self, "model")
        check_choices(self)
        check_range(self, "seed", at_least=0)
        check_range(self, "devices", at_least=1)

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: the name of the model, and that the FASTA exists.

        Raises:
            InputError: One of them does not exist.
        """
        self.embed_config().check_inputs()

    def embed_config(self) -> EmbedConfig:
        """Build the configuration that computes the embeddings."""
        return EmbedConfig(
            self.fasta,
            self.out_dir,
            self.name,
            self.model,
            long_proteins=self.long_proteins,
            device=self.device,
            devices=self.devices,
        )


@dataclass(frozen=True)
class ConvertConfig:
    """Write embeddings as NPY, CSV, Parquet or AnnData, for other programs.

    Args:
        embeddings: File of `esm2kit embed`, with vectors per protein or per residue.
        format: npy (with a .tsv of the ids next to it), csv, parquet, or h5ad (AnnData, for Scanpy; requires the
            anndata package).
        out: Output file; it must not exist yet. Default: the input's name with the suffix of the format.
        labels: Table whose columns are added to the ids: CSV, TSV or Excel (.xlsx).
        id: Column of labels with the ids of the proteins. Default: the column that names most of the proteins.
    """

    embeddings: Path
    format: Literal["npy", "csv", "parquet", "h5ad"] = "csv"
    out: Path | None = None
    labels: Path | None = None
    id: str | None = None

    option_groups = OptionGroups(usual="embeddings format out labels", data="id")

    def __post_init__(self) -> None:
        expand_paths(self)
        check_choices(self)

    def check_inputs(self) -> None:
        """Check what can be checked before slow imports: that the embeddings exist.

        Raises:
            InputError: They do not exist.
        """
        if not self.embeddings.exists():
            raise InputError(
                f"{self.embeddings} does not exist. Create it with `esm2kit embed`.",
                code="embeddings.absent",
                path=self.embeddings,
            )


@dataclass(frozen=True)
class NeighboursConfig:
    """Find the most similar reference proteins of each protein, and transfer their labels.

    Proteins are compared by the cosine of their mean vectors, next to what simpler methods find. The vectors are
    computed first, unless out_dir already has them.

    Args:
        fasta: FASTA file of the queries (plain, .gz or .zst), several files, or a folder.
        reference: Proteins to search: an HDF5 file of `esm2kit embed`, or a FASTA file, which is embedded.
        labels: Table of classes or values of the reference proteins: CSV, TSV or Excel (.xlsx). Only proteins with a
            label are searched.
        target: Column of labels to transfer. Default: the only one.
        target_type: Type of the labels: class or value. Default: value if all are numbers, except a few different
            integers.
        id: Column of labels with the ids of the reference. Default: the column that names most of the proteins.
        k: Number of neighbours.
        exclude_identical: Leave out reference proteins with the same sequence as the query.
        centre: Subtract the mean vector of the reference first, because all vectors of a model have a large common
            component.
        reference_fasta: FASTA file of the proteins of an HDF5 reference, which identities, compositions and alignments
            require. Default: the file that was embedded, if it still exists.
        candidates: Number of reference proteins that are aligned with each query, chosen by their shared words of three
            residues. 0 makes no alignments.
        model: Official name or its short form (8M, 35M, 150M, 650M, 3B, 15B), hub repository, fair-esm .pt, Hugging
            Face folder, esm2kit checkpoint, or distributed checkpoint. Default: the model of an HDF5 reference, or
            esm2_t6_8M_UR50D.
        long_proteins: Handling of proteins longer than 1022 residues: error stops and lists them, truncate embeds their
            first residues, window embeds overlapping windows and averages residues that are in several. Default: as in
            an HDF5 reference, or error.
        device: Device of the model. auto uses a GPU if there is one.
        devices: Number of GPUs, or of processes on a CPU, for the embeddings.
        precision: Precision of the model. auto is that of an HDF5 reference, or bfloat16 on a CUDA GPU that has it and
            float32 elsewhere.
        batch_tokens: Tokens per model input. Default: 1024 on a CPU, 32768 on a GPU.
        resamples: Bootstrap resamples of the reference proteins, for the intervals.
        seed: Seed of the resamples, and of the sample of reference proteins that are left out one by one.
        out_dir: Folder for the tables, the summary and the vectors.
        name: Prefix of the output files. Default: name of the first FASTA file without its suffixes.
        restart: Replace finished files, whatever their settings.
    """

    fasta: Path | list[Path]
    reference: Path
    labels: Path | None = None
    target: str | None = None
    target_type: Literal["class", "value"] | None = None
    id: str | None = None
    k: int = 5
    exclude_identical: bool = False
    centre: bool = True
    reference_fasta: Path | None = None
    candidates: int = 20
    model: str | None = None
    long_proteins: Literal["error", "truncate", "window"] | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    batch_tokens: int | None = None
    resamples: int = 1000
    seed: int = 0
    out_dir: Path = Path("embeddings")
    name: str | None = None
    restart: bool = False

    option_groups = OptionGroups(
        usual="fasta reference labels target k exclude_identical out_dir",
        data="reference_fasta id target_type",
        model="model long_proteins",
        evaluation="centre candidates resamples seed",
        hardware="device devices precision batch_tokens",
        output="name restart",
    )

    def __post_init__(self) -> None:
        expand_paths(self)
        complete_model_names(self, "model")
        check_choices(self)
        check_range(self, "k", "devices", "resamples", at_least=1)
        check_range(self, "candidates", "seed", at_least=0)
        check_range(self, "batch_tokens", at_least=1, hint="omit it to use the default for this machine")
        for name in ("target", "target_type", "id"):
            if self.labels is None and getattr(self, name) is not None:
                raise InputError(
                    f"{name} is for a table of labels, but there is none. Pass one with --labels, or omit --{name}.",
                    code="neighbours.no-labels",
                    name=name,
                )

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: the name of the model, and that the files exist.

        Raises:
            InputError: One of them does not exist.
        """
        if self.model is not None:
            check_model_name(self.model)
        from esm2kit.sequences.fasta import find_fasta_files  # slow import

        find_fasta_files(self.fasta)
        if self.reference_is_hdf5() and not self.reference.is_file():
            raise InputError(
                f"{self.reference} does not exist. Create it with `esm2kit embed`, or pass a FASTA file.",
                code="embeddings.absent",
                path=self.reference,
            )
        if not self.reference_is_hdf5():
            find_fasta_files(self.reference)
        if self.reference_fasta is not None:
            find_fasta_files(self.reference_fasta)

    def reference_is_hdf5(self) -> bool:
        """Return whether the reference has the name of an HDF5 file."""
        return self.reference.suffix.lower() in (".h5", ".hdf5")
