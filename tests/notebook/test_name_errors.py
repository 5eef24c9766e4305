"""A cell run before the one it needs, in a real kernel: right after a restart, and after the imports alone."""

import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from esm2kit.notebook.name_errors import find_defining_cell

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "02_pretrain.ipynb"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[str]]]:
    """A kernel as JupyterLab starts it for notebook 02 under `make lab`: code -> the lines of its error."""
    monkeypatch.setenv("JPY_SESSION_NAME", str(NOTEBOOK))
    monkeypatch.setenv("PYTHONSTARTUP", str(ROOT / "docs" / "kernel_start.py"))
    manager, client = start_new_kernel(cwd=str(NOTEBOOK.parent))

    def run(code: str) -> list[str]:
        shown: list[str] = []
        reply = client.execute_interactive(
            code, timeout=120, output_hook=lambda message: shown.extend(message["content"].get("traceback", []))
        )["content"]
        assert (reply["status"] == "error") == bool(shown), "the cell must be seen to fail, or not"
        return shown

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_after_a_restart_a_middle_cell_says_which_cell_comes_first(kernel: Callable[[str], list[str]]) -> None:
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    middle = next(number for number, source in enumerate(cells) if "result = live.train" in source)
    (line,) = kernel(cells[middle])
    assert line == "NameError: 'TrainingSet' is made by code cell 2 (`import numpy as np`): run it first"
    (line,) = kernel("print(max_steps)")
    assert "is made by code cell 1 (the parameters cell)" in line
    (line,) = kernel("print(config)")
    maker = next(number for number, source in enumerate(cells, 1) if "config = PretrainConfig(" in source)
    assert f"'config' is made by code cell {maker} (" in line
    # what the notebook does not make, and what a library misses, are errors as ever
    assert len(kernel("nobody_makes_this")) > 1
    library = (
        "import types; made = types.ModuleType('made'); exec('def call(): return config', made.__dict__); made.call()"
    )
    assert len(kernel(library)) > 1
    # the start-up file leaves nothing behind, and other errors are their own
    assert "guide" in "".join(kernel("print(guide)"))
    assert "ZeroDivisionError" in "".join(kernel("1 / 0"))
    assert kernel("config = 3; config") == []
    local = kernel("def early():\n    print(max_steps)\n    max_steps = 1\nearly()")
    assert "UnboundLocalError" in "".join(local)
    assert "is made by" not in "".join(local)


def test_an_answer_of_ones_own_and_a_start_up_file_of_ones_own_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    own = "from IPython import get_ipython\n"
    own += "def answer(shell, kind, error, trace, tb_offset=None):\n    error._render_traceback_ = lambda: ['mine']\n"
    own += "    shell.showtraceback((kind, error, trace))\n"
    own += "mine = 7\nget_ipython().set_custom_exc((Exception,), answer)\n"
    (tmp_path / "own.py").write_text(own)
    monkeypatch.setenv("ESM2KIT_OWN_PYTHONSTARTUP", str(tmp_path / "own.py"))
    kernel = request.getfixturevalue("kernel")
    assert kernel("assert mine == 7") == []
    assert kernel("from esm2kit.notebook import work_folder; work_folder('.')") == []
    assert kernel("print(max_steps)") == ["mine"]


@pytest.mark.parametrize("without", [[], ["-S"]], ids=["a terminal's Python", "one without esm2kit"])
def test_a_plain_python_starts_without_a_word(without: list[str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("mine = 7\n")
    environment = {"PYTHONSTARTUP": str(ROOT / "docs" / "kernel_start.py")}
    environment |= {"ESM2KIT_OWN_PYTHONSTARTUP": str(tmp_path / "own.py")}
    told = "import sys; print(mine, 'start' in globals(), 'esm2kit' in sys.modules)\n"
    done = subprocess.run(
        [sys.executable, *without, "-i", "-q"],
        input=told,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stdout == "7 False False\n"
    assert "Error" not in done.stderr


def test_a_kernel_without_esm2kit_starts_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setitem(sys.modules, "esm2kit", None)
    monkeypatch.delenv("ESM2KIT_OWN_PYTHONSTARTUP", raising=False)
    assert "start" not in runpy.run_path(str(ROOT / "docs" / "kernel_start.py"))


def test_the_first_cell_that_makes_a_name_is_told(tmp_path: Path) -> None:
    made = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("x = 0"),
            nbformat.v4.new_code_cell("import numpy as np\nfrom a.b import c"),
            nbformat.v4.new_code_cell("def work(): pass\nfor row in range(3):\n    with open(row) as file: x: int = 1"),
            nbformat.v4.new_code_cell("not python ("),
            nbformat.v4.new_code_cell("seen = [hit for hit in []]\ncall = lambda part: (kept := part)\ny: int\nz += 1"),
            nbformat.v4.new_code_cell("if x:\n    y = z = 2\nfor hit, (part, _) in []: pass\nclass Kept: local = 1"),
            nbformat.v4.new_code_cell("def work():\n    inner = 1"),
            nbformat.v4.new_code_cell("try:\n    (found := 2)\nexcept ValueError as error:\n    x = 2"),
        ]
    )
    nbformat.write(made, tmp_path / "made.ipynb")
    makers = {"np": 1, "c": 1, "work": 2, "row": 2, "file": 2, "x": 2, "seen": 4, "call": 4}
    makers |= {"y": 5, "z": 5, "hit": 5, "part": 5, "Kept": 5, "found": 7}
    for name, cell in makers.items():
        assert f"code cell {cell} " in find_defining_cell(tmp_path / "made.ipynb", name)
    for name in ("numpy", "range", "kept", "local", "inner", "error"):
        assert find_defining_cell(tmp_path / "made.ipynb", name) is None, name
