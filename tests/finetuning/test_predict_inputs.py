"""FASTA input of `predict` as people have it: pipes, standard input, repeated ids, other formats."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.errors import refused
from support.finetune_fixtures import write_tasks, write_tiny_model

from esm2kit.finetuning.config import PredictConfig
from esm2kit.finetuning.finetune import FinetuneConfig, finetune
from esm2kit.finetuning.predict import predict

TEXT = ">a\nMKVLAAGG\n>b first\nMKLLLLLLLL\n>b again\nMKLLLLLLLL\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder / "tiny.safetensors")
    write_tasks(folder / "tasks", 30)
    config = FinetuneConfig(
        task="protein_value",
        data_dir=folder / "tasks",
        model=str(folder / "tiny.safetensors"),
        out_dir=folder / "run",
        max_steps=1,
        accelerator="cpu",
        benchmark=False,
        resamples=100,
    )
    finetune(config)
    return folder / "run"


def read_rows(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


def run_predict(model: Path, fasta: Path, out: Path) -> list[list[str]]:
    predict(PredictConfig(fasta=[fasta], model=str(model), out=out, device="cpu"))
    return read_rows(out)


def test_pipe_process_substitution_and_standard_input(model, tmp_path) -> None:
    plain = tmp_path / "plain.fasta"
    plain.write_text(TEXT)
    expected = run_predict(model, plain, tmp_path / "plain.tsv")
    assert [row[0] for row in expected] == ["id", "a", "b", "b"]
    assert expected[2] == expected[3]
    predict_command = f"{sys.executable} -m esm2kit predict --model {model} --device cpu --out"
    commands = {
        "substitution": f"{predict_command} substitution.tsv <(cat plain.fasta)",
        "stdin": f"cat plain.fasta | {predict_command} stdin.tsv -",
        "config": f"{predict_command} config.tsv --config <(echo 'fasta: [plain.fasta]')",
    }
    for name, command in commands.items():
        subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path, timeout=300)
        assert read_rows(tmp_path / f"{name}.tsv") == expected
    named = tmp_path / "named.fifo"
    os.mkfifo(named)
    with subprocess.Popen(["cp", plain, named]) as writer:
        assert run_predict(model, named, tmp_path / "named.tsv") == expected
    assert writer.returncode == 0
    copies = {path.name.rsplit("_", 1)[0] for path in tmp_path.glob("*_input_*.fasta")}
    assert copies == {"substitution_input", "stdin_input", "named_input"}


def test_an_id_with_two_sequences_is_refused_before_the_work(model, tmp_path) -> None:
    fasta, other = tmp_path / "x.fasta", tmp_path / "y.fasta"
    fasta.write_text(TEXT)
    other.write_text(">c\nMKV\n>a\nMKVLAAG\n")
    with refused("predict.ambiguous-id", id="a", records=(1, 5)):
        predict(PredictConfig(fasta=[fasta, other], model=str(model), out=tmp_path / "x.tsv", device="cpu"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.fasta", "y.fasta"]
    with refused("sequence.alignment", found="-"):
        other.write_text(">a\nMKV\n" * 3000 + ">b\nMK-V\n")
        run_predict(model, other, tmp_path / "x.tsv")
    assert not (tmp_path / "x.tsv").exists()


def test_sequences_that_are_no_proteins_are_said(model, tmp_path, caplog) -> None:
    fasta = tmp_path / "x.fasta"
    fasta.write_text(f"{TEXT}>dna\n{'ACGTT' * 4}\n>unknown\nXXXX\n")
    assert len(run_predict(model, fasta, tmp_path / "x.tsv")) == 6
    assert f"{fasta}: 1 of 5 sequences contain only A, C, G, T, U and N" in caplog.text
    assert f"{fasta}: 1 of 5 sequences contain only X" in caplog.text
    fasta.write_text(f">dna\n{'ACGTT' * 12}\n")
    with refused("sequence.nucleic", found="DNA"):
        run_predict(model, fasta, tmp_path / "x.tsv")
