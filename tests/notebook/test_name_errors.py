"""A cell that is run too early, in a real kernel: right after a restart, and after the imports alone."""

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
    """A kernel as `make lab` starts it for notebook 02: code -> the lines of its error."""
    monkeypatch.setenv("JPY_SESSION_NAME", str(NOTEBOOK))
    monkeypatch.setenv("PYTHONSTARTUP", str(ROOT / "docs" / "kernel_start.py"))
    manager, client = start_new_kernel(cwd=str(NOTEBOOK.parent))

    def run(code: str) -> list[str]:
        shown: list[str] = []
        reply = client.execute_interactive(
            code, timeout=120, output_hook=lambda message: shown.extend(message["content"].get("traceback", []))
        )["content"]
        assert (reply["status"] == "error") == bool(shown), "an error and its output must agree"
        return shown

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_after_a_restart_a_middle_cell_names_the_cell_to_run_first(kernel: Callable[[str], list[str]]) -> None:
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    middle = next(number for number, source in enumerate(cells) if "result = live.train" in source)
    (line,) = kernel(cells[middle])
    assert line == "NameError: 'TrainingSet' is defined in code cell 2 (`from esm2kit.notebook import *`): run it first"
    (line,) = kernel("print(max_steps)")
    assert "is defined in code cell 1 (the parameters cell)" in line
    (line,) = kernel("print(config)")
    cell = next(number for number, source in enumerate(cells, 1) if "config = PretrainConfig(" in source)
    assert f"'config' is defined in code cell {cell} (" in line
    # other undefined names, also in library code, show the usual traceback
    assert len(kernel("undefined_name")) > 1
    library = (
        "import types; made = types.ModuleType('made'); exec('def call(): return config', made.__dict__); made.call()"
    )
    assert len(kernel(library)) > 1
    # the startup file defines no names, and other errors are unchanged
    assert "guide" in "".join(kernel("print(guide)"))
    assert "ZeroDivisionError" in "".join(kernel("1 / 0"))
    assert kernel("config = 3; config") == []
    local = kernel("def early():\n    print(max_steps)\n    max_steps = 1\nearly()")
    assert "UnboundLocalError" in "".join(local)
    assert "is defined in" not in "".join(local)


def test_a_custom_error_handler_and_a_custom_startup_file_are_retained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    own = "from IPython import get_ipython\n"
    own += "def handler(shell, kind, error, trace, tb_offset=None):\n    error._render_traceback_ = lambda: ['mine']\n"
    own += "    shell.showtraceback((kind, error, trace))\n"
    own += "mine = 7\nget_ipython().set_custom_exc((Exception,), handler)\n"
    (tmp_path / "own.py").write_text(own)
    monkeypatch.setenv("ESM2KIT_OWN_PYTHONSTARTUP", str(tmp_path / "own.py"))
    kernel = request.getfixturevalue("kernel")
    assert kernel("assert mine == 7") == []
    assert kernel("from esm2kit.notebook import work_folder; work_folder('.')") == []
    assert kernel("print(max_steps)") == ["mine"]


@pytest.mark.parametrize("without", [[], ["-S"]], ids=["a terminal's Python", "one without esm2kit"])
def test_a_plain_python_starts_silently(without: list[str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("mine = 7\n")
    environment = {"PYTHONSTARTUP": str(ROOT / "docs" / "kernel_start.py")}
    environment |= {"ESM2KIT_OWN_PYTHONSTARTUP": str(tmp_path / "own.py")}
    code = "import sys; print(mine, 'start' in globals(), 'esm2kit' in sys.modules)\n"
    done = subprocess.run(
        [sys.executable, *without, "-i", "-q"],
        input=code,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stdout == "7 False False\n"
    assert "Error" not in done.stderr


def test_a_kernel_without_esm2kit_starts_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setitem(sys.modules, "esm2kit", None)
    monkeypatch.delenv("ESM2KIT_OWN_PYTHONSTARTUP", raising=False)
    assert "start" not in runpy.run_path(str(ROOT / "docs" / "kernel_start.py"))


def test_the_first_cell_that_defines_a_name_is_found(tmp_path: Path) -> None:
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
    defining_cells = {"np": 1, "c": 1, "work": 2, "row": 2, "file": 2, "x": 2, "seen": 4, "call": 4}
    defining_cells |= {"y": 5, "z": 5, "hit": 5, "part": 5, "Kept": 5, "found": 7}
    for name, cell in defining_cells.items():
        assert f"code cell {cell} " in find_defining_cell(tmp_path / "made.ipynb", name)
    for name in ("numpy", "range", "kept", "local", "inner", "error"):
        assert find_defining_cell(tmp_path / "made.ipynb", name) is None, name
