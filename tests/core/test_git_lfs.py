"""A git-lfs pointer in place of any file is one line that names git-lfs; weights and tasks have tests of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.errors import refused

from esm2kit.cli.arguments import parse
from esm2kit.core.checksums import FileChecksums, read_npz, read_sealed_json
from esm2kit.core.files import check_git_lfs
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.notebook.runs.tiers import plan_tier
from esm2kit.preprocessing.cluster_tables import read_cluster_tsv

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
READERS: dict[str, Callable[[Path], object]] = {
    "x_embeddings.h5": EmbeddingReader,
    "predictions.npz": lambda path: read_npz(path, "create it again"),
    "report.json": lambda path: read_sealed_json(path, "create it again"),
    "train.arrow": lambda path: FileChecksums(10_000, 1 << 16, "00000000").check(path, "create it again"),
    "clusters.tsv": lambda path: read_cluster_tsv(path, path.with_suffix(".parquet")),
    "config.yaml": lambda path: parse(EmbedConfig, "esm2kit embed", ["--config", str(path)], "fasta"),
    "tier.yaml": lambda path: plan_tier(path.parent, path),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(POINTER, encoding="utf-8")
    with refused("file.git-lfs", path=path):
        READERS[name](path)


def test_a_text_about_git_lfs_is_not_a_pointer(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for text in ("", "version 1", f"# {POINTER}"):
        path.write_text(text, encoding="utf-8")
        check_git_lfs(path)
