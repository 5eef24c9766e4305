"""Completion in a shell: the script of `esm2kit completion bash`, run by bash itself."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.errors import refused

from esm2kit.cli.commands import STAGES
from esm2kit.cli.completion import CompletionConfig, print_completion


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "esm2kit.bash"
    path.write_text(print_completion(CompletionConfig("bash")))
    return path


def complete(script: Path, line: str, folder: Path) -> list[str]:
    """Return what bash offers for the last word of a command."""
    words = line.split(" ")
    program = f"""
    source {script}
    COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
    COMP_LINE="{line}"; COMP_POINT={len(line)}
    _shtab_esm2kit esm2kit '{words[-1]}' '{words[-2]}'
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    return sorted(word.strip() for word in done.stdout.split())


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("esm2kit fi", ["finetune"]),
        ("esm2kit help pre", ["predict", "preprocess", "pretrain"]),
        ("esm2kit embed --per", ["--per_protein", "--per_residue"]),
        ("esm2kit embed --no-per", ["--no-per_protein", "--no-per_residue"]),
        ("esm2kit embed --precision b", ["bfloat16"]),
        ("esm2kit finetune --mode ", ["frozen", "full", "last_n", "lora"]),
        ("esm2kit benchmark --model 15", ["150M", "15B"]),
        ("esm2kit pretrain --model esm2_t3", ["esm2_t30_150M_UR50D", "esm2_t33_650M_UR50D", "esm2_t36_3B_UR50D"]),
        ("esm2kit completion ", ["bash", "zsh"]),
        ("esm2kit embed --fasta my", ["my.fasta"]),
        ("esm2kit embed -o vec", ["vectors"]),
    ],
)
def test_what_bash_offers(line: str, offered: list[str], script: Path, tmp_path: Path) -> None:
    (tmp_path / "my.fasta").touch()
    (tmp_path / "vectors").mkdir()
    assert complete(script, line, tmp_path) == offered


def test_every_stage_is_completed(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert all(f"_shtab_esm2kit_{name}_option_strings=(-h --help " in text for name in STAGES)
    zsh = print_completion(CompletionConfig("zsh"))
    assert zsh.startswith("#compdef esm2kit")
    assert all(f"_shtab_esm2kit_{name}_options=(" in zsh for name in STAGES)


def test_an_unknown_shell_is_an_error() -> None:
    with refused("config.choice", name="shell", found="fish"):
        CompletionConfig("fish")
