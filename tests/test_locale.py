"""In a locale without UTF-8, files have the same bytes, and text that the terminal cannot show is escaped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.finetune_fixtures import write_tiny_model

from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.finetuning.config import FinetuneConfig
from esm2kit.finetuning.finetune import finetune

LETTERS = "LAGVSERTIDPKQNFYMHWC"
# one process for all stages, because most of the time of a stage is the import of torch
STAGES = """
import json, os, sys
from esm2kit.cli.main import main
print(sys.getfilesystemencoding(), sys.stdout.encoding)
for command in json.load(open("commands.json", encoding="utf-8")):
    code = main(command)
    assert code == 0, (command[0], code)
code = main(["embed", os.fsdecode("séq.fasta".encode())])
assert code == 2
print("über")
print("é", file=sys.stderr)
"""
LOCALES = {
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "utf8": {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"},
}


def write_inputs(folder: Path) -> None:
    """Write 36 proteins with ids and labels outside ASCII as a FASTA file, a table of clusters and a task."""
    generator = np.random.default_rng(5)
    proteins = ["".join(generator.choice(list(LETTERS), int(generator.integers(10, 40)))) for _ in range(36)]
    ids = [f"prøtein{number}_β" for number in range(36)]
    records = [f">{name} Ärzte\n{protein}\n" for name, protein in zip(ids, proteins, strict=True)]
    (folder / "seq.fasta").write_text("".join(records), encoding="utf-8")
    rows = [f"{ids[number - number % 3]}\t{ids[number]}\n" for number in range(36)]
    (folder / "clusters.tsv").write_text("".join(rows), encoding="utf-8")
    sets = ("train", "train", "train", "train", "val", "test")
    labels = [f"{name},{protein},{('höch', 'ниже')[protein.count('L') > 1]},{sets[number % 6]}\n"
              for number, (name, protein) in enumerate(zip(ids, proteins, strict=True))]  # fmt: skip
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own.csv").write_text("id,sequence,target,set\n" + "".join(labels), encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.CompletedProcess]]:
    """Run five stages in both locales; return the folder and the process of each."""
    root = tmp_path_factory.mktemp("locale")
    write_inputs(root)
    model = str(write_tiny_model(root / "m.safetensors"))
    task = {"data_dir": root, "task": "tasks", "accelerator": "cpu", "benchmark": False, "resamples": 100}
    finetune(FinetuneConfig(model=model, out_dir=root / "tuned", max_steps=4, **task))
    found = {}
    for name, environment in LOCALES.items():
        out = root / f"{name}"
        few = ["--untrained", "false", "--baselines", '["majority"]', "--seeds", "0", "--resamples", "100"]
        commands = [
            ["embed", "seq.fasta", "--model", model, "--out_dir", f"{out}/embed", "--device", "cpu"],
            [
                "preprocess",
                "seq.fasta",
                "--cluster_tsv",
                "clusters.tsv",
                "--val_size",
                "3",
                "--out_dir",
                f"{out}/dataset",
            ],
            ["predict", "seq.fasta", "--model", "tuned", "--out", f"{out}/out.tsv", "--device", "cpu"],
            ["predict", "seq.fasta", "--model", "tuned", "--out", f"{out}/out.csv", "--device", "cpu"],
            ["benchmark", "tasks", "--data_dir", ".", "--model", model, "--out_dir", f"{out}/benchmark", *few],
        ]
        (root / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONIO"))}
        (root / "stages.py").write_text(STAGES, encoding="utf-8")
        command = [sys.executable, "stages.py"]
        done = subprocess.run(command, cwd=root, env=plain | environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
        found[name] = out, done
    return found


def test_a_terminal_without_utf8_shows_escapes(runs: dict) -> None:
    assert runs["ascii"][1].stdout.splitlines()[0] == b"ascii ascii", "the locale of this test has no UTF-8"
    assert runs["ascii"][1].stdout.splitlines()[-1] == rb"\xfcber"
    assert runs["ascii"][1].stderr.splitlines()[-1] == rb"\xe9"
    assert runs["utf8"][1].stdout.splitlines()[-1] == "über".encode()


@pytest.mark.parametrize(
    "file", ["out.tsv", "out.csv", "dataset/train.arrow", "dataset/valid.arrow", "benchmark/predictions.npz"]
)
def test_files_have_the_same_bytes_in_every_locale(runs: dict, file: str) -> None:
    ascii_bytes, utf8_bytes = ((runs[name][0] / file).read_bytes() for name in ("ascii", "utf8"))
    assert ascii_bytes == utf8_bytes


def test_an_argument_that_the_locale_cannot_represent_is_named(runs: dict) -> None:
    """Under UTF-8 the same argument is a file that does not exist."""
    assert rb"'s\xe9q.fasta'" in runs["ascii"][1].stderr.splitlines()[-2]
    assert b"set LC_ALL=C.UTF-8" in runs["ascii"][1].stderr.splitlines()[-2]
    assert "séq.fasta" in runs["utf8"][1].stderr.decode().splitlines()[-2]
    assert b"LC_ALL" not in runs["utf8"][1].stderr.splitlines()[-2]


def test_files_contain_the_ids_and_labels(runs: dict) -> None:
    lines = (runs["ascii"][0] / "out.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "id\tprediction\tp_höch\tp_ниже"
    assert lines[1].split("\t")[0] == "prøtein0_β"
    readers = [EmbeddingReader(next((runs[name][0] / "embed").glob("*.h5"))) for name in LOCALES]
    for reader in readers:
        with reader:
            assert list(reader.ids[:2]) == ["prøtein0_β", "prøtein1_β"]
    pages = [(runs[name][0] / "benchmark" / "report.html").read_text(encoding="utf-8") for name in LOCALES]
    assert all("ниже" in page for page in pages)
