"""Shared fixtures: where the real data is, and small models."""

import logging
import os
from pathlib import Path

import pytest
import torch

from esm2kit.preprocessing.preprocess import PreprocessConfig, preprocess

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The larger real data: ESM2KIT_SHARED_DATA, by default ../shared/data from the repository's root."""
    folder = Path(os.environ.get("ESM2KIT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the larger real data is not at {folder}; set ESM2KIT_SHARED_DATA to run this")
    return folder


@pytest.fixture(scope="session")
def sample() -> Path:
    return ROOT / "data" / "sample"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two-core machines run the tests; one thread keeps sums in one order and processes out of each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_level_of_an_earlier_test() -> None:
    """The command line sets how much our log says, by its rank; the next test in this process begins without."""
    logging.getLogger("esm2kit").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    """data/sample, preprocessed."""
    out_dir = tmp_path_factory.mktemp("dataset")
    preprocess(
        PreprocessConfig(
            train_fasta=sample / "uniref50_train_filt.fasta",
            sampler_fasta=sample / "ur90_ur50_sampler.fasta",
            mapping=sample / "mapping.tsv",
            valid_fasta=sample / "uniref50_valid.fasta",
            out_dir=out_dir,
            leakage_identity=0.0,
        )
    )
    return out_dir
