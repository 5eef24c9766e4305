"""The notebooks: clean in git, and executed headless with tiny parameters."""

import ast
import builtins
import json
import re
import shutil
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import yaml
from support.errors import refused
from support.finetune_fixtures import write_tiny_model
from support.measurements import write_measurements

from esm2kit import Report, load_labels, read_fasta
from esm2kit.notebook.name_errors import _bound_names
from esm2kit.notebook.runs.manifest import read_manifest
from esm2kit.notebook.runs.run import RunConfig, read_parameters, run
from esm2kit.notebook.runs.tiers import check_parameters

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIERS = sorted((ROOT / "papermill_runs").glob("*.yaml"))

MAX_STATEMENTS, MAX_FUNCTION_LINES, MAX_LINES = 12, 5, 34
PARAMETER = re.compile(r"^(\w+): (str|int|float|bool) = .+  # \S.+$")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def parameters_cell(path: Path) -> Any:
    return next(cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", []))


def test_there_are_eight_notebooks_in_order() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(8)]


@each_notebook
def test_committed_without_outputs_counts_or_papermill_metadata(path: Path) -> None:
    notebook = read(path)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}, f"notebook metadata: {sorted(notebook.metadata)}"
    for number, cell in enumerate(notebook.cells):
        assert set(cell.metadata) <= {"tags", "jupyter"}, f"cell {number} has metadata {sorted(cell.metadata)}"
        assert cell.metadata.get("jupyter", {"source_hidden": True}) == {"source_hidden": True}, f"cell {number}"
        if cell.cell_type == "code":
            assert not cell.outputs, f"cell {number} is committed with its outputs: run nbstripout"
            assert cell.execution_count is None, f"cell {number} is committed with its execution count: run nbstripout"


@each_notebook
def test_one_parameters_cell_of_documented_and_used_literals(path: Path) -> None:
    cells = code_cells(path)
    tagged = [number for number, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [0], f"cells tagged parameters: {tagged}; expected one, before all other code"
    names = []
    for line in cells[0].source.splitlines():
        match = PARAMETER.match(line)
        assert match, f"{line!r} is not `name: type = literal  # description`"
        ast.literal_eval(ast.parse(line).body[0].value)
        names.append(match[1])
    assert list(read_parameters(path)) == names, "papermill reads other parameters than those in the cell"
    # assigning to a parameter does not count as using it
    rest = ast.parse("\n".join(cell.source for cell in cells[1:]))
    used = {node.id for node in ast.walk(rest) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert not set(names) - used, f"never used: {sorted(set(names) - used)}"


@each_notebook
def test_structure(path: Path) -> None:
    notebook = read(path)
    head = notebook.cells[0].source
    assert head.startswith(f"# {path.stem[:2]} · "), "the first cell is the title"
    for word in ("*Needs*", "*Makes*", "*Takes*", "**"):
        assert word in head, f"the title cell has no {word}"
    headings = re.findall(r"^## (.+)$", prose(path), flags=re.M)
    assert headings[-2:] == ["Check", "Next"], f"the last headings are {headings[-2:]}"
    assert "assert " in code_cells(path)[-1].source
    assert f'record("{path.stem}"' in code_cells(path)[-1].source
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or "parameters" in cell.metadata.get("tags", []):
            continue
        assert not re.search(r"^\s*[!%]", cell.source, flags=re.M), f"cell {number} is not pure Python"
        tree = ast.parse(cell.source)
        steps = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
        assert len(steps) <= MAX_STATEMENTS, f"cell {number} has {len(steps)} statements"
        assert len(cell.source.splitlines()) <= MAX_LINES, f"cell {number} has {len(cell.source.splitlines())} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.body[0].lineno + 1
                assert lines <= MAX_FUNCTION_LINES, (
                    f"cell {number}: {node.name} has {lines} lines: move it to the library"
                )


@each_notebook
def test_no_name_is_undefined(path: Path) -> None:
    """`from esm2kit.notebook import *` hides undefined names from ruff."""
    tree = ast.parse("\n".join(cell.source for cell in code_cells(path)))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    known = {*dir(builtins), *_bound_names(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            known |= {each.arg for each in [*node.args.args, node.args.vararg] if each}
    known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    assert not sorted({node.id for node in names} - known)


@each_notebook
def test_the_result_is_shown_first_and_the_plumbing_is_folded(path: Path) -> None:
    notebook = read(path)
    title, cells = notebook.cells[0], code_cells(path)
    assert "](attachment:" in title.source, "no picture of the result before the parameters"
    bar = " · ".join(f"**{other.stem[:2]}**" if other == path else f"[{other.stem[:2]}]({other.name})"
                     for other in NOTEBOOKS)  # fmt: skip
    assert bar in title.source
    imports = [line for cell in cells for line in cell.source.splitlines() if re.match(r"(from|import) ", line)]
    assert imports == ["from esm2kit.notebook import *"]
    folded = [cell for cell in cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert folded == [cell for cell in cells if re.search(r"^from |^Export\(|^record\(", cell.source, flags=re.M)]
    assert not re.search(r"caption = f?[\"']", "\n".join(cell.source for cell in cells)), "a caption in the code"
    words = re.findall(r"\b(?:figures?|tiers?|mind|looks?)\b", prose(path))
    assert not words, f"say it in plain words: {words}"


@each_notebook
def test_links_resolve(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose(path))
    attached = {name for cell in read(path).cells for name in cell.get("attachments", {})}
    for target in targets:
        if target.startswith("attachment:"):
            assert target.partition(":")[2] in attached, f"{target} does not exist"
        elif not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{target} does not exist"
    number = int(path.stem[:2])
    following = [other.name for other in NOTEBOOKS if other.stem.startswith(f"{number + 1:02d}")]
    assert all(name in targets for name in following), f"does not link to {following}"


@each_notebook
def test_no_path_of_this_machine(path: Path) -> None:
    assert not re.search(r"/(work|root|home|tmp|Users)/", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", TIERS, ids=lambda path: path.stem)
def test_tiers_name_known_notebooks_and_parameters(path: Path) -> None:
    tier = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(tier) == [notebook.stem for notebook in NOTEBOOKS], "a tier runs every notebook, in order"
    for name, parameters in tier.items():
        known = read_parameters(ROOT / "notebooks" / f"{name}.ipynb")
        assert set(parameters or {}) <= set(known), f"{name}: {set(parameters) - set(known)}"


# --- executed -------------------------------------------------------------------------------------------------------

TINY = {
    "00_start_here": {},
    "01_preprocess": {},
    "02_pretrain": {
        "max_steps": 8, "warmup_steps": 2, "val_check_interval": 4, "num_layers": 2, "embed_dim": 32,
        "global_batch_size": 4, "must_reach": 2.0,
    },
    "03_embed": {},
    "04_benchmark": {"limit": 12, "seeds": 1, "resamples": 100},
    "05_finetune": {"limit": 8, "epochs": 1, "min_updates": 0, "resamples": 100, "global_batch_size": 4},
    "06_know_how": {"max_steps": 3, "global_batch_size": 8},
    "07_score": {"num_structures": 6},
}  # fmt: skip


def clone(root: Path) -> Path:
    """A folder like a fresh clone, with a tier that takes seconds."""
    (root / "papermill_runs").mkdir()
    # a copy, because `..` of a symbolic link would be this repository, with its runs
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (root / "data").symlink_to(ROOT / "data")
    (root / "papermill_runs" / "tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    return root


@pytest.fixture(scope="module", autouse=True)
def no_official_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache and no network, so that `auto` is the model trained here on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one run of all notebooks, from scratch, with parameters that take seconds."""
    root = clone(tmp_path_factory.mktemp("clone"))
    run(RunConfig(tier="tiny", root=root))
    return next(path for path in (root / "papermill_runs").iterdir() if path.is_dir())


def outputs(folder: Path, name: str) -> list[Any]:
    return [output for cell in code_cells(folder / f"{name}.ipynb") for output in cell.outputs]


def test_every_notebook_is_in_the_tiny_run() -> None:
    assert list(TINY) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("name", TINY)
def test_nothing_on_stderr_and_no_warnings(executed: Path, name: str) -> None:
    for output in outputs(executed, name):
        assert output.get("name") != "stderr", output["text"]
        text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
        assert not re.search(r"Warning:|Traceback|DeprecationWarning", text), text


@pytest.mark.parametrize("name", TINY)
def test_no_bare_widgets_and_no_bare_reprs(executed: Path, name: str) -> None:
    """Without a front end a widget shows its value as HTML, neither a widget view nor `HBox(...)`."""
    for output in outputs(executed, name):
        data = output.get("data", {})
        assert "application/vnd.jupyter.widget-view+json" not in data, data
        plain = data.get("text/plain", "")
        if "image/png" not in data and "text/html" not in data and "text/markdown" not in data:
            assert not re.match(r"^[\[<(]*\w*(Box|Axes|Figure|Text|Dropdown|Layout)\b.*[(>]", plain), plain


@pytest.mark.parametrize(
    "name", ["01_preprocess", "02_pretrain", "03_embed", "04_benchmark", "05_finetune", "07_score"]
)
def test_the_exported_tier_contains_the_parameters_of_the_run(executed: Path, name: str) -> None:
    """The YAML below the widgets is a tier with the parameters of the notebook and the values of this run."""
    shown = [output.get("data", {}).get("text/plain", "") for output in outputs(executed, name)]
    (text,) = [each for each in shown if each.startswith(f"{name}:\n")]
    choices = yaml.safe_load(text)[name]
    ran = read_manifest(executed).notebooks[name].parameters
    assert choices == {parameter: ran[parameter] for parameter in choices}
    assert check_parameters(ROOT, name, choices, read_parameters(ROOT / "notebooks" / f"{name}.ipynb")) == choices


class Images(HTMLParser):
    """Alternative texts of a page's images."""

    def __init__(self) -> None:
        super().__init__()
        self.alternatives: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "img":
            self.alternatives.append(given.get("alt") or "")
        elif given.get("role") == "img":
            self.alternatives.append(given.get("aria-label") or "")


@pytest.mark.parametrize("name", TINY)
def test_every_figure_has_a_caption_and_alternative_text(executed: Path, name: str) -> None:
    shown = outputs(executed, name)
    figures = [
        number
        for number, output in enumerate(shown)
        if '<div class="figure"' in output.get("data", {}).get("text/html", "")
    ]
    assert figures
    for number in figures:
        caption = shown[number + 1]["data"]["text/markdown"]
        assert caption.startswith("*"), f"a figure without a caption: {caption}"
        assert f'aria-label="{escape(caption.replace("*", "").replace("`", ""))}"' in shown[number]["data"]["text/html"]
    page = Images()
    page.feed((executed / f"{name}.html").read_text())
    assert len(page.alternatives) >= len(figures)
    vague = [text for text in page.alternatives if len(text) < 20 or text == "No description has been provided"]
    assert not vague, f"images without a description: {vague}"


# error of a notebook that is run alone with its defaults, before any other
ALONE = {
    "00_start_here": None,
    "01_preprocess": None,
    "02_pretrain": "does not exist: run 01_preprocess first",
    "03_embed": "does not exist: run 02_pretrain first, or choose an official model",
    "04_benchmark": "does not exist: run 02_pretrain first, or choose an official model",
    "05_finetune": "does not exist: run 02_pretrain first, or choose an official model",
    "06_know_how": "does not exist: run 01_preprocess first",
    "07_score": "does not exist: run 02_pretrain first, or choose an official model",
}


@pytest.mark.parametrize(("name", "message"), ALONE.items(), ids=list(ALONE))
def test_a_notebook_run_alone_works_or_names_the_notebook_to_run_first(
    tmp_path: Path, name: str, message: str | None
) -> None:
    root = clone(tmp_path)
    (root / "papermill_runs" / "own.yaml").write_text(yaml.safe_dump({name: {} for name in TINY}))
    if message is None:
        assert "report: " in run(RunConfig(tier="own", root=root, only=name))
    else:
        with refused("run.notebook-failed", notebook=name) as caught:
            run(RunConfig(tier="own", root=root, only=name))
        assert re.match(rf"cell \d+: InputError: \S+ {message}", caught.value.values["error"])
    folder = next(path for path in (root / "papermill_runs").iterdir() if path.is_dir())
    assert f"{name}.html" in {path.name for path in folder.iterdir()}


def test_own_measurements_need_two_paths(tmp_path: Path) -> None:
    """Notebooks 04 and 05 with a FASTA file and a table as a laboratory has them, and predictions of all proteins."""
    root, files = clone(tmp_path), write_measurements(tmp_path / "lab", 40, 1)
    own = {
        "fasta": str(files.fasta),
        "labels": str(files.labels),
        "model": str(write_tiny_model(tmp_path / "model.safetensors")),
    }
    tier = {
        "04_benchmark": own | {"seeds": 1, "resamples": 100},
        "05_finetune": own | {"epochs": 1, "min_updates": 0, "resamples": 100},
    }
    (root / "papermill_runs" / "own.yaml").write_text(yaml.safe_dump(tier))
    run(RunConfig(tier="own", root=root))
    folder = next(path for path in (root / "papermill_runs").iterdir() if path.is_dir())
    made = {name: entry.made for name, entry in read_manifest(folder).notebooks.items()}
    assert list(made["04_benchmark"]) == ["measurements_Tm", "measurements_Tm, by layer"], "no task of the sample"
    report = Report.read(folder / "artefacts" / "benchmark" / "measurements_Tm" / "report.json")
    assert report.task.sizes == load_labels(files.labels, files.fasta).sizes
    table = pd.read_csv(made["05_finetune"]["predictions"].path, sep="\t")
    assert list(table.id) == [record.id for record in read_fasta(files.fasta)]
    captions = [output["data"].get("text/markdown", "") for name in tier for output in outputs(folder, name)
                if "data" in output]  # fmt: skip
    assert any(text.startswith("*measurements_Tm, Spearman on") for text in captions)
    assert any(text.startswith("*Predictions for 40 proteins.* Predicted 40 proteins between") for text in captions)


def test_times_without_output_are_measured(executed: Path) -> None:
    """`esm2kit run` reports the cells that print nothing for long; how long that is depends on the machine."""
    manifest = read_manifest(executed)
    assert any(entry.silent_seconds for entry in manifest.notebooks.values())


@pytest.mark.parametrize("name", TINY)
def test_a_page_needs_no_network_and_has_both_themes(executed: Path, name: str) -> None:
    page = (executed / f"{name}.html").read_text()
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']https?:""", page)
    assert "@import" not in page
    assert "require.js" not in page
    dark = page.split("@media (prefers-color-scheme: dark) {", 1)[1]
    assert "--jp-layout-color0: #111" in dark
    assert 'lang="en"' in page


def test_the_manifest_records_existing_files(executed: Path) -> None:
    manifest = json.loads((executed / "manifest.json").read_text())
    for name, entry in manifest["notebooks"].items():
        assert entry["status"] == "done"
        for made in entry["made"].values():
            assert Path(made["path"]).exists(), f"{name} names {made['path']}, which does not exist"
            assert len(made["sha256"]) == 64, f"{name}: {made['path']}"
    assert (executed.parent / "index.html").exists()
