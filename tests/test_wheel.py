"""The wheel: it contains the data files, and a stage runs from it without the source tree."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2

SHAPE = ESM2Config(2, 16, 2)


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, without the leftovers of an earlier build."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, folder)
    shutil.copytree(root / "esm2kit", folder / "esm2kit", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "."]
    subprocess.run(command, cwd=folder, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a new environment that has access to this one's packages but not to the source tree."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True)
    # searched after the wheel; the .pth files of a folder that is added this way, as of editable installs, are ignored
    (Path(target) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_data_files_are_in_the_wheel(wheel: Path, root: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    tree = {str(path.relative_to(root)) for path in (root / "esm2kit").rglob("*") if path.is_file()}
    assert {name for name in tree if "__pycache__" not in name} <= packed


def test_the_installed_wheel_shows_help_and_embeds(python: Path, tmp_path: Path) -> None:
    def run(*words: str | Path) -> str:
        command = [python, "-m", "esm2kit", *words]
        return subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True).stdout

    assert "embed" in run("--help")
    code = "import esm2kit; print(esm2kit.__file__)"
    found = subprocess.run([python, "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(python.parents[1]), "not the source tree's"
    model = tmp_path / "model.safetensors"
    state = ESM2.initialised(SHAPE, seed=0).state_dict()
    write_checkpoint(model, {f"model.{name}": tensor for name, tensor in state.items()}, {"model": asdict(SHAPE)})
    (tmp_path / "three.fasta").write_text(">a\nMKV\n>b\nLAG\n>c\nMKTAYIAK\n")
    run("embed", "three.fasta", "--model", model, "--device", "cpu", "--workers", "1")
    with EmbeddingReader(tmp_path / "embeddings" / "three_embeddings.h5") as reader:
        assert reader.matrix().shape == (3, 16)
