"""Shared fixtures: the folders of the real data, and a preprocessed dataset."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from esm2kit.core.hardware import DEVICE_VARIABLE
from esm2kit.preprocessing.preprocess import PreprocessConfig, preprocess

ROOT = Path(__file__).resolve().parent.parent
# `auto` is the CPU in every test and in the processes that tests start; tests/cuda names its device
os.environ[DEVICE_VARIABLE] = "cpu"
# tests do not measure time: the deadline of 200 ms fails on a busy machine
settings.register_profile("esm2kit", deadline=None)
settings.load_profile("esm2kit")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the larger real data: ESM2KIT_SHARED_DATA, by default ../shared/data next to the repository."""
    folder = Path(os.environ.get("ESM2KIT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the larger real data was not found at {folder}; set ESM2KIT_SHARED_DATA to run this test")
    return folder


@pytest.fixture(scope="session")
def sample() -> Path:
    return ROOT / "data" / "sample"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread, so that sums have a fixed order and parallel processes do not slow each other down."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reset_loggers() -> None:
    """Undo what an earlier test has set: the command line sets log levels, and notebooks let the loggers print."""
    for name in ("esm2kit", "lightning.pytorch", "papermill"):
        source = logging.getLogger(name)
        source.handlers, source.propagate = [], True
        source.setLevel(logging.NOTSET)


def _restore_environment() -> Iterator[None]:
    """Restore the environment variables: Lightning sets MASTER_ADDR, and the command line sets its verbosity."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


# also per module, for what the fixtures of a module set
restore_environment = pytest.fixture(autouse=True)(_restore_environment)
restore_environment_of_module = pytest.fixture(autouse=True, scope="module")(_restore_environment)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    """The preprocessed data/sample."""
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
