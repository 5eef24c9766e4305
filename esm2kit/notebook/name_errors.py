"""If a cell is run out of order, name the cell to run first instead of a bare NameError.

`make lab` installs this in every kernel at startup (docs/kernel_start.py), so that it also helps after a restart.
Elsewhere a notebook installs it by its first call, `work_folder`.
"""

import ast
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import esm2kit.notebook

# Maximum length of the quoted first line of a cell.
MAX_LINE_LENGTH = 80
# Nodes that bind names only locally, or need them to exist: `x += 1` does not define x.
OWN_SCOPE = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.AugAssign)


def install() -> None:
    """Register the handler for undefined names in this kernel; does nothing outside a notebook."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    # do not replace a custom handler of the user
    if shell is not None and find_notebook(shell) is not None and not shell.custom_exceptions:
        shell.set_custom_exc((NameError,), _show_name_error)


def find_notebook(shell: Any) -> Path | None:
    """Find the notebook that is open in this kernel, as JupyterLab or VS Code reports it.

    Args:
        shell: the IPython shell.

    Returns:
        Path of the .ipynb file; None in a headless kernel.
    """
    named = shell.user_ns.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME", "")
    path = Path(named)
    return path if path.suffix == ".ipynb" and path.is_file() else None


def _show_name_error(
    shell: Any, kind: type[BaseException], error: BaseException, trace: TracebackType, tb_offset: int | None = None
) -> None:
    """Handle a NameError: show one line if a cell of the notebook defines the name, else the traceback."""
    innermost = trace
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    path, name = find_notebook(shell), getattr(error, "name", None)
    # ignore names that are missing in library code, and UnboundLocalError
    in_a_cell = kind is NameError and innermost.tb_frame.f_globals is shell.user_global_ns
    line = find_defining_cell(path, name) if in_a_cell and path and name else None
    if line is not None:
        error._render_traceback_ = lambda: [f"NameError: {line}"]  # what IPython shows in place of a traceback
    shell.showtraceback((kind, error, trace), tb_offset=tb_offset)


def find_defining_cell(path: Path, name: str) -> str | None:
    """Find the first code cell of a notebook that defines a name.

    Args:
        path: the .ipynb file.
        name: a variable, function or module.

    Returns:
        A line that names the cell; None if no cell defines the name.
    """
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        source = "".join(cell["source"])
        with suppress(SyntaxError):
            if name in _bound_names(ast.parse(source)):
                first = source.strip().splitlines()[0]
                start = first if len(first) <= MAX_LINE_LENGTH else f"{first[:MAX_LINE_LENGTH]}…"
                what = "the parameters cell" if "parameters" in cell["metadata"].get("tags", []) else f"`{start}`"
                return f"{name!r} is defined in code cell {number} ({what}): run it first"
    return None


def _bound_names(node: ast.AST) -> Iterator[str]:
    """Names that a cell defines for later cells: assigned, imported or defined, at the top level or in blocks."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.ImportFrom) and node.module == "esm2kit.notebook" and node.names[0].name == "*":
        yield from esm2kit.notebook.__all__
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((each.asname or each.name).split(".")[0] for each in node.names)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif not isinstance(node, OWN_SCOPE) and not (isinstance(node, ast.AnnAssign) and node.value is None):
        for child in ast.iter_child_nodes(node):
            yield from _bound_names(child)
