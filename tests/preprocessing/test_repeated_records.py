"""Records that repeat another record are named as such, not as records outside the clusters."""

import logging
from pathlib import Path

import pytest

from esm2kit.preprocessing.preprocess import PreprocessConfig, preprocess


def test_repeated_records_without_clusters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fasta, table = tmp_path / "a.fasta", tmp_path / "clusters.tsv"
    fasta.write_text(">a\nMKVL\n>b\nMKLA\n>a\nMKVL\n")
    with caplog.at_level(logging.WARNING):
        preprocess(PreprocessConfig(train_fasta=[fasta], out_dir=tmp_path / "data", leakage_identity=0))
    assert "1 records repeat the id and sequence of another record and are omitted" in caplog.text
    caplog.clear()

    fasta.write_text(">a\nMKVL\n>b\nMKLA\n")
    table.write_text("a\ta\n")
    with caplog.at_level(logging.WARNING):
        preprocess(
            PreprocessConfig(train_fasta=[fasta], cluster_tsv=[table], out_dir=tmp_path / "other", leakage_identity=0)
        )
    assert "1 records are not in any cluster and are omitted" in caplog.text
