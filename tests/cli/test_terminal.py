"""What a person sees on a terminal: a progress bar, little else, and the paths of the output last."""

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from support.finetune_fixtures import write_tasks, write_tiny_model

COLUMNS = 100
# without the pauses, a run of a second shows a bar
IMPATIENT = """
import sys
from esm2kit.core import progress
from esm2kit.cli.main import main
progress.SECONDS_BETWEEN_REDRAWS = progress.SECONDS_BETWEEN_LINES = 0.0
sys.exit(main())
"""


def run_on_terminal(words: list[str], folder: Path, program: str = IMPATIENT) -> tuple[str, str, int]:
    """Run a command on a pseudo-terminal.

    Returns:
        All that was written, the lines that stay on the screen, and the exit code.
    """
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "ESM2KIT_VERBOSITY")}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words], cwd=folder, stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 1 << 16)
        except OSError:  # the last writer has closed the terminal
            break
    os.close(master)
    text = shown.decode()
    # a line that ends in \r alone is drawn over by the next one
    kept = [line.split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return text, "\n".join(line for line in kept if line.strip()), process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    write_tiny_model(folder / "tiny.safetensors")
    write_tasks(folder / "tasks", proteins=48)
    (folder / "my.fasta").write_text("".join(f">p{number}\n{'MKVLAG' * 20}\n" for number in range(300)))
    return folder


EMBED = ["embed", "my.fasta", "--model", "tiny.safetensors", "--logits", "--no-per-protein"]


def test_a_bar_on_a_terminal(folder: Path) -> None:
    text, kept, code = run_on_terminal([*EMBED, "-o", "bar"], folder)
    assert code == 0, text
    bars = re.findall(r"\r([█▉▊▋▌▍▎▏ ]{20} +\d+% tiny: embedded [\d,]+ of 36,000 residues, [^\r]*)", text)
    assert len(bars) > 3
    assert all(len(bar) <= COLUMNS for bar in bars)
    shares = [int(re.search(r"(\d+)%", bar)[1]) for bar in bars]
    assert shares == sorted(shares)
    lines = kept.splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith("tiny: embedded 36,000 of 36,000 residues, ")
    assert lines[1] == "wrote: bar/my_logits.h5"


def test_no_bar_in_a_file_or_in_quiet_mode(folder: Path) -> None:
    _, kept, code = run_on_terminal([*EMBED, "-o", "quiet", "-q"], folder)
    assert (kept, code) == ("wrote: quiet/my_logits.h5", 0)
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, *EMBED, "-o", "lines"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "\r" not in done.stderr
    assert "█" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) > 3
    assert all(line.startswith("tiny: embedded ") for line in lines)
    assert json.loads(done.stdout)["files"] == ["lines/my_logits.h5"]


@pytest.mark.parametrize(("words", "shows_details"), [([], False), (["-v"], True), (["--verbose"], True)])
def test_details_are_shown_on_request(words: list[str], shows_details: bool, folder: Path) -> None:
    """On a terminal a benchmark shows the task, a line per score, and the report."""
    task = ["benchmark", "protein_value", "--data_dir", "tasks", "--model", "tiny.safetensors", "--baselines", "mean"]
    out_dir = f"bench{''.join(words)}"
    _, kept, code = run_on_terminal(
        [*task, "--seeds", "0", "--resamples", "100", "--no-untrained", "-o", out_dir, *words], folder
    )
    assert code == 0
    assert ("mean: fitting" in kept) == shows_details
    assert ("penalty" in kept) == shows_details
    assert "tiny, ridge: spearman " in kept
    assert kept.splitlines()[-1] == f"report: {out_dir}/report.html"


def test_an_error_has_a_line_of_its_own(folder: Path) -> None:
    """The bar of an interrupted computation is removed before the message."""
    program = IMPATIENT.replace("sys.exit(main())", "").strip() + "\n"
    program += """
import logging
from esm2kit.core.errors import InputError
from esm2kit.cli import main as command
def stop(*_):
    bar = progress.Progress(logging.getLogger("esm2kit.test"), "counted", "things", 10)
    bar.update(3)
    bar.update(4)
    raise InputError("no more things. Count fewer.", code="test.things")
command._run = stop
sys.exit(main(["embed"]))
"""
    text, kept, code = run_on_terminal([], folder, program)
    assert " 40% counted 4 of 10 things, " in text
    assert (kept, code) == ("esm2kit: no more things. Count fewer.", 2)
