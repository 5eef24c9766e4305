"""Help and the messages of mistyped commands appear without the imports that take seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from esm2kit.cli.commands import STAGES

SLOW = (
    "torch",
    "lightning",
    "matplotlib",
    "scipy",
    "sklearn",
    "duckdb",
    "pandas",
    "IPython",
    "ipywidgets",
    "transformers",
)
PROGRAM = f"""
import contextlib, io, json, sys
from esm2kit.cli.main import main
for words in json.loads(sys.argv[1]):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main(words)
        except SystemExit as exit:
            code = exit.code
    slow = [name for name in {SLOW} if name in sys.modules]
    print(json.dumps([code, printed.getvalue(), slow]))
"""


def run(commands: list[list[str]], folder: Path) -> list[tuple[int, str, list[str]]]:
    """Run commands one after the other in one process: exit code, output, and the slow modules that are loaded."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)], cwd=folder, capture_output=True, text=True, check=True
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_help_of_every_stage(tmp_path: Path) -> None:
    commands = [[name, "--help"] for name in STAGES] + [["help", name] for name in STAGES] + [["--help"], ["-V"]]
    commands += [[name, "--help-all"] for name in STAGES]
    for words, (code, output, slow) in zip(commands, run(commands, tmp_path), strict=True):
        assert (code, slow) == (0, []), words
        assert output, words


def test_mistyped_options_of_every_stage(tmp_path: Path) -> None:
    commands = [[name, "--outdir", "x"] for name in STAGES] + [["embd"], ["finetune", "--epochs", "two"]]
    for words, (code, output, slow) in zip(commands, run(commands, tmp_path), strict=True):
        assert (code, slow) == (2, []), words
        assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("embed my.fasta --model esm2_t6", "did you mean 'esm2_t6_8M_UR50D'?"),
        ("embed your.fasta --model 8M", "your.fasta: no such file"),
        ("benchmark gb1 --model nowhere.pt", "model 'nowhere.pt' is neither a file"),
        ("benchmark gb1 --model 8MB", "did you mean '8M'?"),
        ("finetune gb1 --model nowhere.pt", "model 'nowhere.pt' is neither a file"),
        ("pretrain nowhere -o run --model 8MB", "did you mean '8M'?"),
        ("pretrain nowhere -o run --init_from nowhere.pt", "model 'nowhere.pt' is neither a file"),
        ("pretrain nowhere -o run", "nowhere does not exist. Create it with"),
        ("export nowhere.pt --out x", "model 'nowhere.pt' is neither a file"),
        ("predict your.fasta --model run --out x.tsv", "your.fasta: no such file"),
        ("check nowhere", "nowhere does not exist"),
        ("download 8MB", "did you mean '8M'?"),
        ("run smal", "did you mean 'small'?"),
    ],
)
def test_inputs_that_do_not_exist(words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "my.fasta").write_text(">a\nMKV\n")
    ((code, output, slow),) = run([words.split()], tmp_path)
    assert (code, slow) == (2, [])
    assert message in output
    assert len(output.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.fasta"], "nothing is written"


def test_slow_modules_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "my.fasta").write_text(">a\nMKV\n")
    ((code, output, slow),) = run([["embed", "my.fasta", "--untrained_seed", "0", "--repr_layers", "99"]], tmp_path)
    assert code == 2
    assert "layer 99 does not exist" in output
    assert "torch" in slow
