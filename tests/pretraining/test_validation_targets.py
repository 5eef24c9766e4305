"""A validation without masked residues has no loss: a run must not report a perplexity of 1."""

import math
from pathlib import Path

import pytest
from support.errors import refused

from esm2kit.preprocessing.preprocess import PreprocessConfig, preprocess
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain

TINY = {"model": "custom", "num_layers": 1, "embed_dim": 16, "attention_heads": 2, "accelerator": "cpu"}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">p{i}\n{'MKVLAGSTRE' * 3}{'ACDEFGHIKL'[i]}\n" for i in range(10)))
    preprocess(PreprocessConfig(train_fasta=[fasta], out_dir=tmp_path / "data", val_size=3, leakage_identity=0))
    return tmp_path / "data"


def test_a_validation_without_masked_residues_is_refused(dataset: Path, tmp_path: Path) -> None:
    settings = TINY | {"micro_batch_size": 2, "max_steps": 2, "warmup_steps": 1}
    with refused("pretrain.no-targets", mask_prob=1e-9):
        pretrain(PretrainConfig(data=dataset, out_dir=tmp_path / "none", mask_prob=1e-9, **settings))
    assert not list((tmp_path / "none").glob("checkpoints/step=*"))

    result = pretrain(PretrainConfig(data=dataset, out_dir=tmp_path / "run", mask_prob=0.5, **settings))
    assert result["val_loss"] == pytest.approx(math.log(33), abs=0.3)  # close to untrained
