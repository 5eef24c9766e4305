"""The JSON result of a stage lists every file that the stage wrote for its user."""

import json
import os
from pathlib import Path

import pytest
from support.finetune_fixtures import write_tasks, write_tiny_model

from esm2kit.cli.main import main

# what a stage keeps for itself, to resume or to recognise finished work
OWN = ("checkpoints", "cache", "embeddings", "rows", "proteins.fasta", ".lock", ".download.lock", "tensorboard")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    write_tiny_model(folder / "tiny.safetensors")
    write_tasks(folder / "tasks", proteins=48)
    letters = "ACDEFGHIKLMNPQRSTVWY"
    records = (f">p{number}\nMKV{letters[number % 20] * 9}{letters[number // 20] * 9}\n" for number in range(60))
    (folder / "my.fasta").write_text("".join(records))
    return folder


def list_written(folder: Path) -> set[str]:
    """List the files of a folder and the folders of exports, without those that a stage keeps for itself."""
    found = (
        path for path in folder.rglob("*") if path.is_file() and not set(path.relative_to(folder).parts) & set(OWN)
    )
    return {str(path.parent if path.parent.name == "huggingface" else path) for path in found}


TASK = "protein_value --data_dir tasks --model tiny.safetensors --resamples 100"
REPORT = ("report.json", "report.html", "predictions.npz")
FINETUNE = f"finetune {TASK} --epochs 1 --no-benchmark"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("embed my.fasta --model tiny.safetensors --logits --no-per_protein", {"my_logits.h5"}),
        ("embed my.fasta --model tiny.safetensors --bos --per_residue --repr_layers 0 1", None),
        ("contacts my.fasta --model tiny.safetensors --values coupling --pictures 1", {"my_contacts.h5", "p0.png"}),
        ("neighbours my.fasta --reference my.fasta --model tiny.safetensors --candidates 0", None),
        ("split my.fasta --method random", {"split.csv", "leakage.html", "leakage.json"}),
        ("preprocess my.fasta --val_size 5 --leakage_identity 0", None),
        (f"benchmark {TASK} --baselines mean --no-untrained", {*REPORT, "mean.safetensors", "tiny-ridge.safetensors"}),
        (FINETUNE, {"finetuned.safetensors", "metrics.csv", "predictions.npz", "finetune.json"}),
        (f"{FINETUNE} --mode lora --merge --seeds 0 1", None),
        (f"{FINETUNE} --head hf --export_hf", None),
        (f"finetune {TASK} --epochs 1", None),
        ("compare benchmark_0 benchmark_1", {"comparison.json", "comparison.html"}),
    ],
)
def test_every_file_is_listed(
    command: str,
    expected: set[str] | None,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    if command.startswith("compare"):
        for seed in ("0", "1"):
            words = ["--baselines", "none", "--no-untrained", "--seed", seed, "-o", f"benchmark_{seed}"]
            assert main([*f"benchmark {TASK}".split(), *words]) == 0
        capfd.readouterr()
    out_dir = f"out{len(os.listdir())}"
    assert main([*command.split(), "-o", out_dir]) == 0
    result = json.loads(capfd.readouterr().out)
    assert set(result["files"]) == list_written(Path(out_dir))
    if expected is not None:
        assert {Path(path).name for path in result["files"]} == expected


@pytest.mark.parametrize("name", ["predictions.tsv", "predictions.h5"])
def test_the_files_of_predict(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main([*FINETUNE.split(), "-o", "model"]) == 0
    capfd.readouterr()
    Path("predicted").mkdir(exist_ok=True)
    before = list_written(Path("predicted"))
    assert main(["predict", "my.fasta", "--model", "model", "-o", f"predicted/{name}"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert set(result["files"]) == list_written(Path("predicted")) - before
    assert f"predicted/{name}" in result["files"]


def test_an_unreachable_hub_is_reported_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["embed", str(folder / "my.fasta"), "--model", "8M", "-o", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.count("cannot be reached") == 1
    assert "facebook/esm2_t6_8M_UR50D" in line
