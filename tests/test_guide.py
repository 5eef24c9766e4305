"""A cell run before the one it needs, in a real kernel: right after a restart, and after the imports alone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from esm2kit.guide import made_by

ROOT = Path(__file__).resolve().parent.parent
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
    assert line.startswith("NameError: 'unigram_perplexity' is made by code cell 2 (`import numpy as np`), ")
    assert line.endswith("choose Run > Run All Above Selected Cell, then run this cell again")
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


def test_the_first_cell_that_makes_a_name_is_told(tmp_path: Path) -> None:
    made = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("x = 0"),
            nbformat.v4.new_code_cell("import numpy as np\nfrom a.b import c"),
            nbformat.v4.new_code_cell("def work(): pass\nfor row in range(3):\n    with open(row) as file: x: int = 1"),
            nbformat.v4.new_code_cell("not python ("),
            nbformat.v4.new_code_cell("x = 2"),
        ]
    )
    nbformat.write(made, tmp_path / "made.ipynb")
    for name, cell in {"np": 1, "c": 1, "work": 2, "row": 2, "file": 2, "x": 2}.items():
        assert f"code cell {cell} " in made_by(tmp_path / "made.ipynb", name)
    assert made_by(tmp_path / "made.ipynb", "numpy") is None
    assert made_by(tmp_path / "made.ipynb", "range") is None
