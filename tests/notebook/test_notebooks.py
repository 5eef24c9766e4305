"""The notebooks: kept clean in git, and run headless at tiny parameters."""

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from support.errors import refused

from esm2kit.notebook.runs.history import silent_cells
from esm2kit.notebook.runs.manifest import read_manifest
from esm2kit.notebook.runs.run import RunConfig, known_parameters, run
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


def test_there_are_seven_in_order() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(7)]


@each_notebook
def test_committed_without_outputs_counts_or_papermill_metadata(path: Path) -> None:
    notebook = read(path)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}, f"notebook metadata: {sorted(notebook.metadata)}"
    for number, cell in enumerate(notebook.cells):
        assert set(cell.metadata) <= {"tags"}, f"cell {number} carries metadata {sorted(cell.metadata)}"
        if cell.cell_type == "code":
            assert not cell.outputs, f"cell {number} is committed with its outputs: run nbstripout"
            assert cell.execution_count is None, f"cell {number} is committed with its count: run nbstripout"


@each_notebook
def test_one_parameters_cell_of_literals_documented_and_used(path: Path) -> None:
    cells = code_cells(path)
    tagged = [number for number, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [0], f"cells tagged parameters: {tagged}; there must be one, before all other code"
    names = []
    for line in cells[0].source.splitlines():
        match = PARAMETER.match(line)
        assert match, f"{line!r} is not `name: type = literal  # what it is`"
        ast.literal_eval(ast.parse(line).body[0].value)
        names.append(match[1])
    assert list(known_parameters(path)) == names, "papermill reads other parameters than the cell has"
    # a notebook may give a parameter its type by assigning to its own name; that is no use of it
    rest = ast.parse("\n".join(cell.source for cell in cells[1:]))
    used = {node.id for node in ast.walk(rest) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert not set(names) - used, f"never used: {sorted(set(names) - used)}"


@each_notebook
def test_craft(path: Path) -> None:
    notebook = read(path)
    head = notebook.cells[0].source
    assert head.startswith(f"# {path.stem[:2]} · "), "the first cell is the title"
    for word in ("*Needs*", "*Makes*", "*Takes*", "**"):
        assert word in head, f"the title cell lacks {word}"
    headings = re.findall(r"^## (.+)$", prose(path), flags=re.M)
    assert headings[-2:] == ["Check", "Next"], f"ends with {headings[-2:]}"
    assert "assert " in code_cells(path)[-1].source
    assert f'record("{path.stem}"' in code_cells(path)[-1].source
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or "parameters" in cell.metadata.get("tags", []):
            continue
        assert not re.search(r"^\s*[!%]", cell.source, flags=re.M), f"cell {number} leaves Python"
        tree = ast.parse(cell.source)
        steps = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
        assert len(steps) <= MAX_STATEMENTS, f"cell {number} has {len(steps)} statements"
        assert len(cell.source.splitlines()) <= MAX_LINES, f"cell {number} has {len(cell.source.splitlines())} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.body[0].lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"cell {number}: {node.name} has {lines} lines, a library's worth"


@each_notebook
def test_links_resolve(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose(path))
    for target in targets:
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{target} is not there"
    number = int(path.stem[:2])
    following = [other.name for other in NOTEBOOKS if other.stem.startswith(f"{number + 1:02d}")]
    assert all(name in targets for name in following), f"does not lead to {following}"


@each_notebook
def test_nothing_of_this_machine(path: Path) -> None:
    assert not re.search(r"/(work|root|home|tmp|Users)/", path.read_text())


@pytest.mark.parametrize("path", TIERS, ids=lambda path: path.stem)
def test_tiers_name_known_notebooks_and_parameters(path: Path) -> None:
    tier = yaml.safe_load(path.read_text())
    assert list(tier) == [notebook.stem for notebook in NOTEBOOKS], "a tier runs every notebook, in order"
    for name, parameters in tier.items():
        known = known_parameters(ROOT / "notebooks" / f"{name}.ipynb")
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
    "05_finetune": {"limit": 8, "epochs": 1, "layout_steps": 2, "resamples": 100, "global_batch_size": 4},
    "06_know_how": {"max_steps": 3, "global_batch_size": 8},
}  # fmt: skip


def clone(root: Path) -> Path:
    """A folder like a fresh clone, with a tier that takes seconds."""
    (root / "papermill_runs").mkdir()
    for name in ("notebooks", "data"):
        (root / name).symlink_to(ROOT / name)
    (root / "papermill_runs" / "tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    return root


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of all notebooks, from nothing, at parameters that take seconds."""
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
    """Without a front end a widget shows its value as HTML, never a view that nothing can draw, nor `HBox(...)`."""
    for output in outputs(executed, name):
        data = output.get("data", {})
        assert "application/vnd.jupyter.widget-view+json" not in data, data
        plain = data.get("text/plain", "")
        if "image/png" not in data and "text/html" not in data and "text/markdown" not in data:
            assert not re.match(r"^[\[<(]*\w*(Box|Axes|Figure|Text|Dropdown|Layout)\b.*[(>]", plain), plain


@pytest.mark.parametrize("name", ["01_preprocess", "02_pretrain", "03_embed", "04_benchmark", "05_finetune"])
def test_what_is_exported_is_what_the_notebook_ran_with(executed: Path, name: str) -> None:
    """The YAML under the controls is a tier: its names are the notebook's, its values those of this very run."""
    shown = [output.get("data", {}).get("text/plain", "") for output in outputs(executed, name)]
    (text,) = [each for each in shown if each.startswith(f"{name}:\n")]
    choices = yaml.safe_load(text)[name]
    ran = read_manifest(executed).notebooks[name].parameters
    assert choices == {parameter: ran[parameter] for parameter in choices}
    assert check_parameters(ROOT, name, choices, known_parameters(ROOT / "notebooks" / f"{name}.ipynb")) == choices


class Images(HTMLParser):
    """Alternative texts of a page's images."""

    def __init__(self) -> None:
        super().__init__()
        self.alternatives: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.alternatives.append(dict(attributes).get("alt") or "")


@pytest.mark.parametrize("name", TINY)
def test_every_figure_has_a_caption_and_alternative_text(executed: Path, name: str) -> None:
    shown = outputs(executed, name)
    figures = [number for number, output in enumerate(shown) if "image/png" in output.get("data", {})]
    for number in figures:
        caption = shown[number + 1]["data"]["text/markdown"]
        assert caption.startswith("*"), f"a figure without its caption: {caption}"
        assert shown[number]["metadata"]["image/png"]["alt"] == caption.replace("*", "").replace("`", "")
    page = Images()
    page.feed((executed / f"{name}.html").read_text())
    assert len(page.alternatives) >= len(figures)
    vague = [text for text in page.alternatives if len(text) < 20 or text == "No description has been provided"]
    assert not vague, f"images without a description: {vague}"


# what a notebook says first when it is opened on its own, with its defaults, and nothing was made yet
ALONE = {
    "00_start_here": None,
    "01_preprocess": None,
    "02_pretrain": "is not there: run 01_preprocess first",
    "03_embed": "is not there: run 02_pretrain first, or choose an official model",
    "04_benchmark": "is not there: run 02_pretrain first, or choose an official model",
    "05_finetune": "is not there: run 02_pretrain first, or choose an official model",
    "06_know_how": "is not there: run 01_preprocess first",
}


@pytest.mark.parametrize(("name", "told"), ALONE.items(), ids=list(ALONE))
def test_alone_from_a_clean_kernel_a_notebook_works_or_names_the_one_it_needs(
    tmp_path: Path, name: str, told: str | None
) -> None:
    root = clone(tmp_path)
    (root / "papermill_runs" / "own.yaml").write_text(yaml.safe_dump({name: {} for name in TINY}))
    if told is None:
        assert "report: " in run(RunConfig(tier="own", root=root, only=name))
    else:
        with refused("run.notebook-failed", notebook=name) as caught:
            run(RunConfig(tier="own", root=root, only=name))
        assert re.match(rf"cell \d+: InputError: \S+ {told}", caught.value.values["error"])
    folder = next(path for path in (root / "papermill_runs").iterdir() if path.is_dir())
    assert f"{name}.html" in {path.name for path in folder.iterdir()}


def test_no_cell_is_silent_for_long(executed: Path) -> None:
    """At these sizes; `esm2kit run` says it of every run, and its own test plants a silent cell."""
    manifest = read_manifest(executed)
    assert silent_cells(manifest) == []
    assert any(entry.silent_seconds for entry in manifest.notebooks.values()), "silence was not measured"


@pytest.mark.parametrize("name", TINY)
def test_a_page_fetches_nothing_and_has_light_and_dark(executed: Path, name: str) -> None:
    page = (executed / f"{name}.html").read_text()
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']https?:""", page)
    assert "@import" not in page
    assert "require.js" not in page
    dark = page.split("@media (prefers-color-scheme: dark) {", 1)[1]
    assert "--jp-layout-color0: #111" in dark
    assert 'lang="en"' in page


def test_the_run_says_what_it_made(executed: Path) -> None:
    manifest = json.loads((executed / "manifest.json").read_text())
    for name, entry in manifest["notebooks"].items():
        assert entry["status"] == "done"
        for made in entry["made"].values():
            assert Path(made["path"]).exists(), f"{name} names {made['path']}, which is not there"
            assert len(made["sha256"]) == 64, f"{name}: {made['path']}"
    assert (executed.parent / "index.html").exists()
