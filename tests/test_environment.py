"""Missing packages, missing metadata and home folders that cannot be written to: one line, or no difference at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.stages import ELSEWHERE, list_commands, write_inputs

from esm2kit.cli.commands import STAGES as REGISTERED
from esm2kit.embedding.hdf5 import EmbeddingReader

# packages that no stage of the command line uses, unless an option names one
OPTIONAL = ["transformers", "esm", "ipywidgets", "IPython", "papermill", "tensorboard", "wandb", "umap"]
STAGES = """
import json, os, pwd, sys
from pathlib import Path
from support.absent import hide_packages
settings = json.loads(sys.argv[1])
if settings["homeless"]:  # as in a container whose user id has no account
    del os.environ["HOME"]
    def unknown(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
    pwd.getpwuid = unknown
hide_packages(settings["modules"], settings["distributions"])
from esm2kit.cli.main import main
for number, command in enumerate(settings["commands"]):
    print(f"-- {number}", file=sys.stderr)
    print(main(command), flush=True)
print([str(path) for path in Path.cwd().rglob("*") if "~" in str(path)])
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    write_inputs(folder)
    return folder


def run_stages(commands: list[list[str]], cwd: Path, environment: dict[str, str], **hidden: object) -> tuple:
    """Run commands in one process; return their exit codes, the text on stderr of each, and the last line of stdout."""
    settings = {"modules": [], "distributions": [], "homeless": False, "commands": commands} | hidden
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_", "MPLCONFIG"))}
    plain["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", STAGES, json.dumps(settings)],
        cwd=cwd, env=plain | environment, capture_output=True, text=True, check=True, encoding="utf-8",
    )  # fmt: skip
    lines = done.stdout.splitlines()
    codes = [int(line) for line in lines if line.isdigit()]
    return codes, [part.partition("\n")[2] for part in done.stderr.split("-- ")[1:]], lines[-1]


@pytest.fixture(scope="module")
def usual(work: Path) -> Path:
    """The results of every stage, with all packages; HOME is a file, so nothing can be written below it."""
    (work / "file").write_text("", encoding="utf-8")
    codes, errors, _ = run_stages(list_commands(work, work / "usual"), work, {"HOME": str(work / "file")})
    assert codes == [0] * len(list_commands(work, work))
    assert not [line for text in errors for line in text.splitlines() if "matplotlib" in line.lower()]
    return work / "usual"


def test_every_stage_of_the_command_line_is_run(tmp_path: Path) -> None:
    """A new stage needs a small command in tests/support/stages.py; the tests here and of devices then run it."""
    assert {command[0] for command in list_commands(tmp_path, tmp_path)} | ELSEWHERE == set(REGISTERED)


def test_no_stage_needs_a_home_folder_or_optional_packages(work: Path, usual: Path, tmp_path: Path) -> None:
    """Every stage gives the same results from a source tree without metadata, optional packages and a home folder."""
    hidden = {"modules": OPTIONAL, "distributions": [*map(str.lower, OPTIONAL), "esm2kit", "fair-esm", "umap-learn"]}
    commands = list_commands(work, tmp_path / "out")
    codes, errors, folders = run_stages(commands, tmp_path, {}, homeless=True, **hidden)
    assert codes == [0] * len(list_commands(work, work))
    assert folders == "[]", "no folder called ~"
    assert not [line for text in errors for line in text.splitlines() if "matplotlib" in line.lower()]
    with EmbeddingReader(next((tmp_path / "out" / "e").glob("*.h5"))) as found:
        with EmbeddingReader(next((usual / "e").glob("*.h5"))) as expected:
            np.testing.assert_array_equal(found.matrix(), expected.matrix())
        assert found.attributes["provenance"]["versions"]["esm2kit"] == "not installed"
    for file in ("p.tsv", "b/predictions.npz", "d/train.arrow", "hf/model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (usual / file).read_bytes(), file


def test_a_missing_package_is_named_with_its_installation(work: Path, usual: Path, tmp_path: Path) -> None:
    """Packages that a stage or an option needs; a stage that does not need them runs as before."""
    commands = list_commands(work, tmp_path / "out")
    logged = [*commands[5], "--data", f"{usual}/d", "--logger", "tensorboard"]
    hidden = {"modules": ["seaborn", "tensorboard", "tensorboardX", "papermill"], "distributions": ["tensorboard"]}
    codes, errors, _ = run_stages([commands[2], logged, ["run"], commands[6]], tmp_path, {}, **hidden)
    assert codes == [2, 2, 2, 0]
    for text, package in zip(errors, ("seaborn", "tensorboard", '"esm2kit[notebooks]"'), strict=False):
        assert "Traceback" not in text
        line = text.strip().splitlines()[-1]
        assert line.startswith("esm2kit: ")
        assert f"`pip install {package}`" in line
    assert not (tmp_path / "out" / "b").exists(), "found before the work"
