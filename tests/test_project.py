"""Checks of the repository: dependencies, lock file, command-line help, and no paths of a machine in the files."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from esm2kit.cli.commands import STAGES, import_object
from esm2kit.cli.main import main, summarise
from esm2kit.embedding.embed import EmbedResult


def tracked(root: Path) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    return [root / name for name in listing.split("\0") if name and (root / name).is_file()]


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def package_name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_conda_installs_the_same_packages(root: Path) -> None:
    environment = yaml.safe_load((root / "environment.yml").read_text())
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    pip = next(item for item in environment["dependencies"] if isinstance(item, dict))["pip"]
    assert pip == ["-e .[notebooks]"], "packages are listed in pyproject.toml and nowhere else"
    assert sorted(map(package_name, conda)) == ["pip", "python"]


def test_conda_and_project_require_the_same_python(root: Path, project: dict) -> None:
    environment = yaml.safe_load((root / "environment.yml").read_text())
    assert f"python{project['requires-python']}" in environment["dependencies"]


def test_the_lock_file_contains_every_dependency(root: Path, project: dict) -> None:
    locked = dict(re.findall(r"^([\w.-]+)==([\w.]+)(?: ; .*)?$", (root / "requirements.lock").read_text(), re.M))
    required = project["dependencies"] + project["optional-dependencies"]["notebooks"]
    required += project["optional-dependencies"]["dev"] + project["optional-dependencies"]["docs"]
    missing = {package_name(requirement) for requirement in required} - {name.lower() for name in locked}
    assert not missing, f"run `make lock`: {missing} are not in requirements.lock"
    assert locked["torch"] == "2.13.0"
    assert not [name for name in locked if name.startswith("nvidia")], "the lock file must not require CUDA"


def test_contributing_explains_every_dependency(root: Path, project: dict) -> None:
    text = (root / "CONTRIBUTING.md").read_text()
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    missing = {package_name(item) for group in groups for item in group if f"`{package_name(item)}`" not in text}
    missing -= {"esm2kit"}  # the extra `all` names other extras
    assert not missing, f"CONTRIBUTING.md must explain why each package is needed: {missing}"


# imported only if the user requests a feature and has installed the package
OPTIONAL = {"anndata": "anndata", "pandas": "pandas", "umap": "umap-learn", "wandb": "wandb"}
# `verify` compares with them
OPTIONAL |= {"esm": "fair-esm", "transformers": "transformers"}
# this package, and google.colab, which only Colab has
OWN = {"esm2kit", "google"}
# started by the notebooks, not imported
PROGRAMS = {"ipykernel", "jupyterlab"}


def imported_packages(sources: Iterable[str]) -> set[str]:
    """Distributions whose modules some Python sources import, at whatever place; Python's own left out."""
    distributions = {module: found[0] for module, found in packages_distributions().items()} | OPTIONAL
    modules = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.partition(".")[0])
    return {package_name(distributions[module]) for module in modules - sys.stdlib_module_names - OWN}


def test_imports_and_declared_dependencies_agree(root: Path, project: dict) -> None:
    notebook_package = root / "esm2kit" / "notebook"
    paths = sorted((root / "esm2kit").rglob("*.py"))
    library = imported_packages(path.read_text() for path in paths if not path.is_relative_to(notebook_package))
    jupyter = imported_packages(path.read_text() for path in paths if path.is_relative_to(notebook_package))
    cells = imported_packages(
        "".join(cell["source"])
        for path in (root / "notebooks").glob("*.ipynb")
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code"
    )
    required = set(map(package_name, project["dependencies"]))
    notebooks = set(map(package_name, project["optional-dependencies"]["notebooks"]))
    assert library - set(OPTIONAL.values()) == required
    optional = set(OPTIONAL.values())
    assert (jupyter | cells) - required - optional == notebooks - PROGRAMS - optional
    assert set(OPTIONAL.values()) <= {
        package_name(item) for group in project["optional-dependencies"].values() for item in group
    }


def test_the_diagram_of_the_packages_is_current(root: Path) -> None:
    packages = runpy.run_path(str(root / "docs" / "packages.py"))
    assert packages["PICTURE"].read_text() == packages["picture"](), "run `python docs/packages.py`"


def test_no_file_contains_a_path_of_a_machine(root: Path) -> None:
    # concatenated, so that the pattern does not match this file
    paths = re.compile("|".join(("/wor" + "k/", "/roo" + "t/", "/hom" + "e/", "/op" + "t/wheels")))
    for path in tracked(root):
        if path.suffix in {".py", ".md", ".ipynb", ".yaml", ".yml", ".toml", ".lock", ""} and path.name != "LICENSE":
            found = paths.search(path.read_text(errors="replace"))
            assert not found, f"{path.relative_to(root)} contains a path of a machine: {found[0]}"


def test_no_unfinished_work(root: Path) -> None:
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")))
    for path in tracked(root):
        if path.suffix in {".py", ".ipynb", ".md"}:
            assert not marks.search(path.read_text()), f"{path.relative_to(root)} contains a mark for unfinished work"


def test_no_large_files(root: Path) -> None:
    assert not [path for path in tracked(root) if path.stat().st_size > 1_000_000]


# run the command line, then print the CPU seconds and whether torch was imported
TIMED_HELP = """
import resource, sys
from esm2kit.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, "torch" in sys.modules)
"""


def run_help(*words: str) -> tuple[str, float, bool]:
    """Return the output of `--help`, the CPU seconds it takes, and whether it imports torch."""
    command = [sys.executable, "-c", TIMED_HELP, *words, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text, _, last = shown.strip().rpartition("\n")
    seconds, torch = last.split()
    return text, float(seconds), torch == "True"


def test_help_takes_half_a_second_and_lists_every_stage() -> None:
    text, seconds, torch = run_help()
    assert not torch
    assert seconds < 0.5
    assert all(f"  {name}" in text for name in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_a_stage_does_not_import_torch(stage: str) -> None:
    text, _, torch = run_help(stage)
    assert not torch
    assert STAGES[stage].example in text


def test_the_library_and_its_configurations_do_not_import_torch() -> None:
    code = "import sys, esm2kit; [getattr(esm2kit, name) for name in esm2kit.__all__ if name.endswith('Config')]"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=False)
    assert done.returncode == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_lists_every_target(root: Path) -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=root, capture_output=True, text=True, check=True)
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(), re.M)
    assert sorted(listed) == sorted(targets.split())
    assert all(len(line.split()) > 2 for line in done.stdout.splitlines()), "a target without a description"


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_is_documented(stage: str) -> None:
    import dataclasses

    config = import_object(STAGES[stage].config)
    for field in dataclasses.fields(config):
        described = re.search(rf"^\s+{field.name}: \S", config.__doc__, re.M)
        assert described, f"{config.__name__}.{field.name} has no description"
    assert config.__dataclass_params__.frozen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "unknown stage 'pretrian'; did you mean 'pretrain'?"),
        (["pretrain", "--max_stesp", "3"], "unknown parameter --max_stesp; did you mean --max_steps?"),
        (["pretrain", "--max_steps", "many"], "max_steps"),
        (["pretrain", "--data", "nowhere", "--out_dir", "{tmp}/x"], "nowhere"),
        (["preprocess", "--train_fasta", "nowhere.fasta", "--out_dir", "{tmp}/x"], "nowhere.fasta"),
        (["embed", "--fasta", "nowhere.fasta", "--out_dir", "{tmp}/x"], "nowhere.fasta"),
        (["benchmark", "--task", "gb2", "--data_dir", "{tmp}", "--out_dir", "{tmp}/x"], "gb2"),
        (["run", "--tier", "huge"], "unknown tier 'huge'"),
        (["download", "esm2_t6"], "is neither a model nor 'flip'"),
        (["export", "--model", "nowhere.pt", "--out", "{tmp}/x"], "nowhere.pt"),
    ],
)
def test_bad_input_gives_one_line_and_writes_no_files(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    messages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("esm2kit: ")]
    assert len(messages) == 1
    assert message in messages[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_named_tuple_is_summarised_by_field_name() -> None:
    summary = json.loads(summarise(EmbedResult(Path("a_embeddings.h5"), None, 5, [Path("a_embeddings.h5")])))
    assert summary == {
        "embeddings": "a_embeddings.h5",
        "hiddens": None,
        "num_proteins": 5,
        "files": ["a_embeddings.h5"],
    }


def test_on_a_terminal_the_summary_is_a_path() -> None:
    result = {"finished": True, "predictions": "run/predictions.npz", "html": Path("run/report.html")}
    assert summarise(result, on_terminal=True) == "report: run/report.html"
    assert summarise(result | {"html": None}, on_terminal=True) == "predictions: run/predictions.npz"
    assert summarise({"step": 3}, on_terminal=True) == ""
    result["files"] = ["run/finetuned.safetensors", "run/report.html"]
    assert summarise(result, on_terminal=True) == "wrote: run/finetuned.safetensors\nreport: run/report.html"
    result["files"] += [f"run/seed={seed}/metrics.csv" for seed in range(4)]
    assert summarise(result, on_terminal=True) == "wrote: 5 files in run\nreport: run/report.html"
    assert summarise("two\nlines", on_terminal=True) == "two\nlines"


def test_the_address_is_one_setting(root: Path, project: dict) -> None:
    """Clone lines, links, the Colab notebook and CITATION.cff show the address of pyproject.toml."""
    address = runpy.run_path(str(root / "docs" / "address.py"))
    repository = project["urls"]["Repository"]
    assert address["read_shown"]() == repository, "run `python docs/address.py`"
    assert all(url.startswith(repository) for url in project["urls"].values())
    name = repository.removeprefix("https://").partition("/")[2]
    colab = f"https://colab.research.google.com/github/{name}/blob/main/notebooks/colab/my_proteins.ipynb"
    for path in ("README.md", "notebooks/colab/my_proteins.ipynb"):
        text = (root / path).read_text(encoding="utf-8")
        assert colab in text
        assert repository in text.replace(colab, "")
    own = re.compile(r"(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+/esm2kit)(?![\w-])")
    for path in tracked(root):
        if path.suffix in {".md", ".ipynb", ".cff", ".toml", ".py"} and path.name != "address.py":
            assert set(own.findall(path.read_text(encoding="utf-8"))) <= {name}, path


def test_a_new_address_is_written_everywhere(root: Path) -> None:
    replace = runpy.run_path(str(root / "docs" / "address.py"))["replace_address"]
    old, new = "https://github.com/a/b", "https://github.com/lab/kit"
    colab = "https://colab.research.google.com/github"
    text = f"{old} {old}/issues {old}-c git+{old}.git {colab}/a/b/blob/main/x github/a/b"
    changed = f"{new} {new}/issues {old}-c git+{new}.git {colab}/lab/kit/blob/main/x github/a/b"
    assert replace(text, old, new) == changed


def test_licence_and_citation_agree(root: Path, project: dict) -> None:
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"] == "MIT"
    assert "MIT License" in (root / "LICENSE").read_text(encoding="utf-8")
    assert [item["doi"] for item in citation["references"]] == ["10.1126/science.ade2574"]
    for page in ("README.md", "docs/citing.md"):
        text = " ".join((root / page).read_text(encoding="utf-8").split())
        assert "MIT licence" in text
        assert "weights" in text
        assert "10.1126/science.ade2574" in text


def test_the_workflows_use_the_make_targets_and_files_that_exist(root: Path) -> None:
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(encoding="utf-8"), re.M)
    jobs = yaml.safe_load((root / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    made = {word for line in lines for word in re.findall(r"\bmake (\w+)", line)}
    assert made == {"check", "dist", "walkthrough"}
    assert made < set(targets.split())
    systems = {job["runs-on"] for job in jobs.values()} | set(jobs["install"]["strategy"]["matrix"]["os"])
    assert {"ubuntu-latest", "macos-latest", "windows-latest"} <= systems
    for line in lines:
        for path in re.findall(r"\b(?:tests|\.ci)/[\w/.]+|requirements\.lock", line):
            assert (root / path).exists(), path
