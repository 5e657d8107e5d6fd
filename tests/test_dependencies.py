"""Every imported package is declared in pyproject.toml, every declared one is used, and the bounds hold here."""

import ast
import functools
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from sae.common.packages import EXTRAS, numbers
from sae.tests.test_layout import imported

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))
OTHER_FOLDERS = {"tests", "benchmarks", "docs", "build"}
PACKAGE_FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] not in OTHER_FOLDERS and not path.relative_to(ROOT).parts[0].startswith(".")
)
# Packages that are imported under another name.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "xdist": "pytest-xdist"}
TOOLS = {"ruff", "mypy", "moto"}  # run, not imported
KERNELS = {
    f"train/kernels/{name}.py": {"triton"}
    for name in ("batch", "gate", "jump", "largest", "pair", "prefix", "rows", "threshold", "update")
}
"""Files that need an extra. Other files import them only inside functions."""


def requirements(lines: list[str]) -> dict[str, str]:
    """Package -> its lowest version."""
    found = {}
    for line in lines:
        bound = re.fullmatch(r"([a-z0-9-]+)(?:\[[a-z]+\])?>=([0-9.]+)(?:; sys_platform == 'linux')?", line)
        assert bound, f"{line}: expected a name and one lower bound, name>=1.2"
        found[bound[1]] = bound[2]
    return found


CORE = requirements(PROJECT["dependencies"])
BY_EXTRA = {extra: requirements(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
OPTIONAL = {package for extra in EXTRAS for package in BY_EXTRA[extra]}


class Imports(NamedTuple):
    """The distributions that a file imports anywhere (`all`), and those that it imports `while_loading`."""

    all: set[str]
    while_loading: set[str]


@functools.cache
def third_party(path: Path) -> Imports:
    everywhere, at_once = set(), set()
    source = path.read_text()
    passed_over = () if "importorskip" in source else ast.expr  # most nodes; only calls of it are expressions
    nodes: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    while nodes:
        node, loading = nodes.pop()
        loading &= not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not is_for_types(node)
        nodes += ((child, loading) for child in ast.iter_child_nodes(node) if not isinstance(child, passed_over))
        found = set()
        if isinstance(node, ast.Import):
            found = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = {node.module.split(".")[0]}
        elif isinstance(node, ast.Call) and is_importorskip(node.func) and is_text(node.args[0]):
            found = {node.args[0].value.split(".")[0]}
        everywhere |= found
        at_once |= found if loading else set()
    no_package = {"sae", *(other.stem for other in path.parent.glob("*.py")), *sys.stdlib_module_names}
    names = [found - no_package for found in (everywhere, at_once)]
    return Imports(*({DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in found} for found in names))


def is_importorskip(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "importorskip"


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_every_form_of_import_is_read(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import json, sklearn.svm\nfrom google_crc32c import value\nfrom . import sibling\nfrom sae.x import y\n"
        "if TYPE_CHECKING:\n    import rich\n"
        "class A:\n    import zarr\n    def f(self):\n        import scipy.stats\n"
    )
    assert third_party(path).all == {"scikit-learn", "google-crc32c", "rich", "zarr", "scipy"}
    assert third_party(path).while_loading == {"scikit-learn", "google-crc32c", "zarr"}


def test_what_the_package_imports_is_declared() -> None:
    """Packages of extras are imported in functions, so that everything else works without them."""
    kernels = {name.removesuffix(".py").replace("/", ".") for name in KERNELS}
    for path in PACKAGE_FILES:
        name = path.relative_to(ROOT)
        assert third_party(path).all - CORE.keys() - OPTIONAL == set(), path
        assert third_party(path).while_loading - CORE.keys() == KERNELS.get(name.as_posix(), set()), path
        if name.as_posix() not in KERNELS:
            assert not imported(path.read_text(), name.parent.parts, top_level_only=True) & kernels, path


def test_what_is_declared_is_used() -> None:
    imported = set().union(*(third_party(path).all for path in PACKAGE_FILES))
    assert CORE.keys() - imported == set()


def test_every_extra_installs_the_package_that_its_error_names() -> None:
    assert {extra: [package] for extra, package in EXTRAS.items()} == {
        extra: list(packages) for extra, packages in BY_EXTRA.items() if extra not in ("test", "docs")
    }


def test_every_extra_that_a_message_or_page_names_exists() -> None:
    files = [*PACKAGE_FILES, *TEST_FILES, ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {extra for file in files for extra in re.findall(r"sae-pipeline\[(\w+)\]", file.read_text())}
    assert {"plots", "adapters", "test"} <= named <= BY_EXTRA.keys()


def test_what_the_tests_import_is_declared() -> None:
    imported = set().union(*(third_party(path).all for path in TEST_FILES)) - {"tests"}
    declared = CORE.keys() | BY_EXTRA["test"].keys() | OPTIONAL
    assert imported - declared == set()
    assert BY_EXTRA["test"].keys() - imported - CORE.keys() - TOOLS - OPTIONAL == set()


def test_the_packages_of_two_extras_have_one_bound() -> None:
    for package, lowest in BY_EXTRA["test"].items():
        for extra in EXTRAS:
            assert BY_EXTRA[extra].get(package, lowest) == lowest, package


def test_the_pinned_versions_are_within_the_bounds() -> None:
    """constraints.txt lists, for every package that the tests need, a version with which they pass."""
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    declared = CORE | {package: lowest for extra in BY_EXTRA.values() for package, lowest in extra.items()}
    assert CORE.keys() | BY_EXTRA["test"].keys() <= pinned.keys() <= declared.keys()
    assert {p for p, lowest in declared.items() if p in pinned and numbers(pinned[p]) < numbers(lowest)} == set()


def test_the_installed_versions_are_within_the_bounds() -> None:
    assert {package for package in CORE if numbers(version(package)) < numbers(CORE[package])} == set()
