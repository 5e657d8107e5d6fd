"""Whatever a benchmark script imports from other scripts and from the package exists there. Most of these scripts need
other libraries, or hours, so no test runs them."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.rglob("*.py"))


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def defined(path: Path) -> set[str]:
    """Every name that a module assigns, defines or imports; for a package, also the names of its modules."""
    names = {file.stem for file in path.parent.iterdir()} if path.name == "__init__.py" else set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(one.asname or one.name).split(".")[0] for one in node.names}
    return names


def files_of(module: str, script: Path) -> list[Path]:
    """The files that `import module` can mean in this script: in the package, beside it, or in a folder of scripts."""
    if module.split(".")[0] == "sae":
        base = ROOT.joinpath(*module.split(".")[1:])
        return [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
    beside = [path for path in (script.parent / f"{module}.py", BENCHMARKS / f"{module}.py") if path.is_file()]
    return beside[:1] or sorted(BENCHMARKS.glob(f"*/{module}.py"))


def missing(script: Path) -> Iterator[str]:
    tree = parse(script)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            files, used = files_of(node.module, script), {one.name for one in node.names}
            yield from (f"from {node.module} import {name}" for name in sorted(used) if not has(files, name))
        elif isinstance(node, ast.Import):
            for one in node.names:
                files, name = files_of(one.name, script), one.asname or one.name
                used = {
                    use.attr for use in ast.walk(tree)
                    if isinstance(use, ast.Attribute) and isinstance(use.value, ast.Name) and use.value.id == name
                }  # fmt: skip
                yield from (f"{one.name}.{attribute}" for attribute in sorted(used) if not has(files, attribute))


def has(files: list[Path], name: str) -> bool:
    return not files or name == "*" or any(name in defined(file) for file in files)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_a_script_imports_what_exists(script):
    assert list(missing(script)) == []


def test_a_name_that_is_gone_is_found(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import feed\nfrom sae.train.recipe import RECIPES, gone\nfeed.check\nfeed.tell(RECIPES)\n")
    assert list(missing(script)) == ["feed.tell", "from sae.train.recipe import gone"]
