"""The notebooks of docs/notebooks use public names only, have stored outputs, and run from top to bottom."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import sae

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
PACKAGES = {"sae", "safetensors", "torch"}  # what a notebook may import besides the standard library
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@each_notebook
def test_a_notebook_uses_public_names_only_and_was_run_in_order(notebook: Path) -> None:
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    used = set()
    for node in (node for cell in cells for node in ast.walk(ast.parse("".join(cell["source"])))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sae":
            used.add(node.attr)
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.module.startswith("sae")
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert {module.split(".")[0] for module in modules} <= PACKAGES | sys.stdlib_module_names
    assert used and used <= set(sae.__all__)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@each_notebook
def test_a_notebook_runs_and_prints_where_its_stored_outputs_are(
    notebook: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in code_cells(notebook):
        code = ast.Interactive(ast.parse("".join(cell["source"])).body)  # so that the values of expressions are shown
        exec(compile(code, f"{notebook.name} [{cell['execution_count']}]", "single"), names)
        assert bool(capsys.readouterr().out) == bool(cell["outputs"]), "".join(cell["source"])
