"""Settings of `esm2kit preprocess`. This module does not import duckdb or pyarrow."""

from dataclasses import dataclass
from pathlib import Path

from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths


@dataclass(frozen=True)
class PreprocessConfig:
    """Build a training dataset from FASTA files and, optionally, sequence clusters.

    Each FASTA option takes one file, several files or a folder, plain or compressed (.gz, .zst).

    Args:
        train_fasta: Records to train on. With mapping, the UniRef50 representatives of the train clusters.
        out_dir: Output folder of the dataset.
        sampler_fasta: Records to sample from, with mapping: all UniRef90 members and all UniRef50 representatives.
        mapping: The mapping.tsv of esm2nv: a header line, then lines of `UR50 id <TAB> UR90 id,UR90 id,...`.
        cluster_tsv: MMseqs2 clusters of train_fasta, as lines of `representative <TAB> member`. Pass two files for two
            levels, the finer level first. Default: each record is its own cluster.
        valid_fasta: Records of the validation set. Default: val_size clusters of train_fasta.
        test_fasta: Records of the test set. Default: test_size clusters of train_fasta.
        val_size: Clusters to hold out for validation, as a number (integer) or a share (below 1, such as 0.01).
        test_size: Clusters to hold out for testing, as a number (integer) or a share (below 1, such as 0.01).
        seed: Random seed of the held-out clusters.
        leakage_identity: Sequence identity from which a held-out record is reported as close to the train set. Requires
            MMseqs2. 0 turns the search off, which takes hours for UniRef.
        memory_limit_gb: Memory limit in GB, at least 0.5.
        threads: Threads of the join and of MMseqs2. Default: all cores available to this process.
        overwrite: Replace a dataset that is damaged or was built from other inputs or settings.
    """

    train_fasta: Path | list[Path]
    out_dir: Path = Path("dataset")
    sampler_fasta: Path | list[Path] | None = None
    mapping: Path | None = None
    cluster_tsv: Path | list[Path] | None = None
    valid_fasta: Path | list[Path] | None = None
    test_fasta: Path | list[Path] | None = None
    val_size: int | float = 0
    test_size: int | float = 0
    seed: int = 0
    leakage_identity: float = 0.5
    memory_limit_gb: float = 4.0
    threads: int | None = None
    overwrite: bool = False

    option_groups = OptionGroups(
        usual="train_fasta out_dir val_size test_size cluster_tsv",
        data="valid_fasta test_fasta sampler_fasta mapping seed leakage_identity",
        hardware="threads memory_limit_gb",
        output="overwrite",
    )

    def __post_init__(self) -> None:
        expand_paths(self)
