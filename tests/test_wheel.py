"""The distributions: their content, and that a stage and a notebook run from the wheel without the source tree."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
from support.check_dist import check_dist, check_sdist, check_wheel

from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2

SHAPE = ESM2Config(2, 16, 2)


@pytest.fixture(scope="module")
def dist(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both distributions, the wheel from the other one, from a copy without leftovers of an earlier build."""
    folder = tmp_path_factory.mktemp("dist") / "source"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "work", "*.egg-info", "__pycache__", "*-[0-9]*", "docs")
    shutil.copytree(root, folder, ignore=skipped)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder.parent / "dist"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder.parent / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (built,) = dist.glob("*.whl")
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


def run(python: Path, folder: Path, *words: str | Path) -> str:
    command = [python, "-m", "esm2kit", *words]
    # nbconvert's templates are data of the environment that has the dependencies
    environment = {"HOME": str(folder), "JUPYTER_PATH": str(Path(sys.prefix, "share", "jupyter"))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write_model(folder: Path) -> Path:
    path = folder / "model.safetensors"
    state = ESM2.initialised(SHAPE, seed=0).state_dict()
    write_checkpoint(path, {f"model.{name}": tensor for name, tensor in state.items()}, {"model": asdict(SHAPE)})
    return path


def test_the_distributions_are_complete(dist: Path) -> None:
    """Metadata, licence, urls, extras, templates, styles, sample data, notebooks, tiers; under 5 MB."""
    assert check_dist(dist) == []


def test_the_check_finds_what_is_missing(wheel: Path, tmp_path: Path) -> None:
    """A wheel without a template, with a changed notebook and with another file is not accepted."""
    changed = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("00_start_here.ipynb"):
                notebook = json.loads(data)
                next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")["outputs"] = [{"a": 1}]
                data = json.dumps(notebook).encode()
            if not name.endswith(("page.html.j2", "LICENSE")):
                target.writestr(name, data.replace(b"esm2kit/issues", b"someone/else"))
        target.writestr("tests/test_own.py", "")
    found = "\n".join(check_wheel(changed))
    assert "esm2kit/templates/page.html.j2 is missing" in found
    assert "00_start_here.ipynb differs from the checkout" in found
    assert "00_start_here.ipynb has outputs" in found
    assert "tests/test_own.py should not be there" in found
    assert "the licence is missing" in found
    assert "METADATA: the urls are" in found


def test_the_source_distribution_lacks_nothing(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    assert check_sdist(path) == []


def test_the_wheel_has_the_reference_outputs_and_the_proteins_of_verify(python: Path, tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "esm2kit", "verify", "8M", "--out_dir", tmp_path / "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr[-3000:]
    checks = json.loads((tmp_path / "out" / "verify.json").read_text())["checks"]
    verdicts = [(check["name"], check["verdict"]) for check in checks[:2]]
    assert verdicts == [("tokens of a sequence", "passed"), ("reading the weights", "could not check")]


def test_the_installed_wheel_shows_help_and_embeds(python: Path, tmp_path: Path) -> None:
    assert "embed" in run(python, tmp_path, "--help")
    code = "import esm2kit; print(esm2kit.__file__)"
    found = subprocess.run([python, "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(python.parents[1]), "not the source tree's"
    model = write_model(tmp_path)
    (tmp_path / "three.fasta").write_text(">a\nMKV\n>b\nLAG\n>c\nMKTAYIAK\n")
    run(python, tmp_path, "embed", "three.fasta", "--model", model, "--device", "cpu", "--workers", "1")
    with EmbeddingReader(tmp_path / "embeddings" / "three_embeddings.h5") as reader:
        assert reader.matrix().shape == (3, 16)


def test_notebooks_run_from_the_wheel_in_an_empty_folder(python: Path, root: Path, tmp_path: Path) -> None:
    """`esm2kit notebooks`, and in its folder the first two notebooks: the sample data becomes a dataset."""
    assert "esm2kit run sample" in run(python, tmp_path, "notebooks", "mine")
    folder = tmp_path / "mine"
    for name in ("notebooks/03_embed.ipynb", "data/sample/mapping.tsv", "papermill_runs/sample.yaml"):
        assert (folder / name).read_bytes() == (root / name).read_bytes()
    (folder / "papermill_runs" / "two.yaml").write_text("00_start_here: {}\n01_preprocess: {}\n")
    run(python, folder, "run", "two")
    (made,) = (folder / "papermill_runs").glob("two-*/artefacts/dataset/manifest.json")
    assert json.loads(made.read_text())["dataset"]["valid"]["records"] == 70
    pages = sorted(path.name for path in made.parents[2].glob("*.html"))
    assert pages == ["00_start_here.html", "01_preprocess.html", "index.html"]


# what Colab has around the cell: its module `files`, and a shell that understands %pip
COLAB = """
import json, sys, types
from IPython.core.interactiveshell import InteractiveShell
package, module, files = (types.ModuleType(name) for name in ("google", "google.colab", "google.colab.files"))
files.upload = lambda: {"my.fasta": open("../my.fasta", "rb").read()}
files.download = lambda path: print("downloaded", path)
package.colab, module.files = module, files
sys.modules |= {"google": package, "google.colab": module, "google.colab.files": files}
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
code = chr(10).join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
model = 'model = "8M"'
assert model in code
InteractiveShell.instance().run_cell(code.replace(model, f"model = {sys.argv[2]!r}")).raise_error()
"""


def test_the_form_for_colab_runs_in_an_empty_folder_with_the_wheel_alone(
    python: Path, wheel: Path, tmp_path: Path
) -> None:
    notebook = tmp_path / "form.ipynb"
    notebook.write_bytes(zipfile.ZipFile(wheel).read("esm2kit/walkthrough/notebooks/colab/my_proteins.ipynb"))
    model = write_model(tmp_path)
    (tmp_path / "my.fasta").write_text("".join(f">p{letter}\nMKTAYIAKQR{letter}\n" for letter in "ACDEFGH"))
    (tmp_path / "empty").mkdir()
    command = [python, "-c", COLAB, notebook, model]
    environment = {"HOME": str(tmp_path), "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "empty" / "esm2kit").iterdir()
    assert f"downloaded {folder.relative_to(tmp_path / 'empty') / 'my_esm2kit.zip'}" in done.stdout
    lines = (folder / "my_vectors.csv").read_text().splitlines()
    assert len(lines) == 8
    assert len(lines[1].split(",")) == 2 + SHAPE.embed_dim
    assert (folder / "my_map.png").stat().st_size > 1000
    assert sorted(zipfile.ZipFile(folder / "my_esm2kit.zip").namelist()) == [
        "my_embeddings.h5", "my_map.csv", "my_map.png", "my_vectors.csv",
    ]  # fmt: skip
