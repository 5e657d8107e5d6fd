"""The layout of the package: which folder may import which, no import cycles, and no file too long to read."""

import ast
import functools
import importlib
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from sae.harvest.mini.corpus import walk_statements

ROOT = Path(__file__).parents[1]
FOLDERS = ("cache", "cli", "common", "evaluate", "harvest", "train", "workflows")
SOURCES = sorted(p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] in FOLDERS or p.parent == ROOT)

# Folder -> the folders and single modules that it may import besides itself.
ALLOWED: dict[str, tuple[str, ...]] = {
    "common": (),
    "cache": ("common",),
    "harvest": ("cache", "common"),
    "train": ("cache", "common"),
    "evaluate": (
        "cache",
        "common",
        "harvest.model",
        "harvest.architectures",
        "train.sae",
        "train.activation_functions",
    ),
    "workflows": ("cache", "common", "evaluate", "harvest", "train"),
    "cli": ("cache", "common", "evaluate", "harvest", "train", "workflows"),
}
# The levels of evaluate/, lowest first. A part may import itself and the parts of lower levels.
EVALUATE_ORDER: tuple[tuple[str, ...], ...] = (
    ("artifacts", "charts", "compared_pairs", "sae_text", "statistics"),
    ("context",),
    ("datasets",),
    ("metrics",),
    ("results", "reference_saes"),
    ("rows",),
    ("controls",),
    ("paired",),
    ("control_shares",),
    ("norm_limits",),
    ("inputs",),
    ("plan",),
    ("tables",),
    ("control_notes",),
    ("compared_runs",),
    ("compare",),
    ("deal", "measure"),
    ("ranks",),
    ("run",),
    ("against",),
    ("compare_charts",),
    ("neighbours", "frontier"),
    ("answers",),
    ("latents", "papers"),
    ("pages",),
)
LONGEST, LONGEST_LOOP = 400, 130  # lines


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text()


@functools.cache
def imports_and_classes(path: Path) -> tuple[list[ast.AST], list[str]]:
    """The import statements of a file, and the names of its classes.

    The syntax trees are not kept: the garbage collector would scan their millions of nodes during all later tests.
    """
    nodes = list(walk_statements(ast.parse(text_of(path))))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return imports, [node.name for node in nodes if isinstance(node, ast.ClassDef)]


@functools.cache
def imports_of(path: Path) -> set[str]:
    return modules_of(imports_and_classes(path)[0], path.relative_to(ROOT).parent.parts)


def imported(source: str, package: tuple[str, ...], *, top_level_only: bool = False) -> set[str]:
    """The modules of this package that a source imports, relative to its root: `cache.reader`, `harvest.model`."""
    tree = ast.parse(source)
    return modules_of(tree.body if top_level_only else walk_statements(tree), package)


def modules_of(nodes: Iterable[ast.AST], package: tuple[str, ...]) -> set[str]:
    """Those that some statements import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + module
            elif module[0] == "sae":
                base = module[1:]
            else:
                continue
            # `from . import mini` names a module, `from .mini import NAME` a name in it.
            named = {".".join((*base, alias.name)) for alias in node.names}
            modules = {name for name in named if path_of(name) is not None}
            found |= modules | ({".".join(base)} if len(modules) < len(named) and base else set())
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("sae.") for alias in node.names if alias.name.startswith("sae.")}
    return found


def path_of(module: str) -> Path | None:
    """The file of a module, None if there is none."""
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def is_allowed(module: str, folder: str) -> bool:
    return any(f"{module}.".startswith(f"{allowed}.") for allowed in (folder, *ALLOWED[folder]))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_only_the_public_api_and_the_entry_point_are_at_the_root():
    assert {p.name for p in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_a_folder_imports_only_what_it_may():
    forbidden = {
        name_of(path): [m for m in imports_of(path) if not is_allowed(m, path.relative_to(ROOT).parts[0])]
        for path in SOURCES
        if path.parent != ROOT
    }
    assert {name: modules for name, modules in forbidden.items() if modules} == {}


def evaluate_level(module: str) -> int:
    """The level of a module of evaluate/ in EVALUATE_ORDER. The package itself has the lowest level, -1."""
    part = module.removeprefix("evaluate").lstrip(".").split(".")[0]
    return next((level for level, parts in enumerate(EVALUATE_ORDER) if part in parts), -1)


def is_upward(importer: str, module: str) -> bool:
    """Whether a module of evaluate/ imports from a higher level, or from another part of its own level."""
    low, high = evaluate_level(importer), evaluate_level(module)
    return low < high or (low == high and importer.split(".")[1] != module.split(".")[1])


def test_imports_inside_evaluate_go_down():
    modules = {module_of(path): imports_of(path) for path in sorted((ROOT / "evaluate").rglob("*.py"))}
    unknown = [module for module in modules if module != "evaluate" and evaluate_level(module) < 0]
    assert unknown == [], "add them to EVALUATE_ORDER"
    upward = {
        module: [m for m in found if m.startswith("evaluate.") and is_upward(module, m)]
        for module, found in modules.items()
    }
    assert {module: found for module, found in upward.items() if found} == {}


def test_an_upward_import_inside_evaluate_is_seen():
    assert is_upward("evaluate.charts", "evaluate.pages.page")
    assert is_upward("evaluate.latents.stats", "evaluate.papers.claims")
    assert not is_upward("evaluate.pages.svg", "evaluate.charts")
    assert not is_upward("evaluate.metrics.core", "evaluate.metrics.base")


def test_there_are_no_import_cycles():
    """Imports inside functions count too: such a cycle works, but a reader still has to follow it."""
    modules = {module_of(path): imports_of(path) for path in SOURCES if path.parent != ROOT}
    graph = {name: {m for m in found if m in modules and not is_package(m)} for name, found in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def is_package(module: str) -> bool:
    path = path_of(module)
    return path is not None and path.name == "__init__.py"


@pytest.mark.parametrize(
    ("source", "package", "modules"),
    [
        ("from ..train.recipe import recipe", ("evaluate",), {"train.recipe"}),
        ("from ..train import sae", ("evaluate",), {"train.sae"}),
        ("from ... import cli", ("train", "variants"), {"cli"}),
        ("from .metrics.core import Core", ("evaluate",), {"evaluate.metrics.core"}),
        ("from .metrics import core, registry", ("evaluate",), {"evaluate.metrics.core", "evaluate.metrics.registry"}),
        ("from . import mini", ("harvest",), {"harvest.mini"}),
        ("from .mini import NAME", ("harvest",), {"harvest.mini"}),
        ("def f():\n    from sae.harvest.contexts import cut", ("train",), {"harvest.contexts"}),
        ("import sae.harvest.run\nimport torch", ("cache",), {"harvest.run"}),
    ],
)
def test_every_form_of_import_is_read(source, package, modules):
    assert imported(source, package) == modules


def test_a_forbidden_import_is_seen():
    assert not is_allowed("train.recipe", "evaluate")
    assert not is_allowed("train.sae_other", "evaluate")
    assert not is_allowed("harvest.contexts", "evaluate")
    assert not is_allowed("cli", "cache")
    assert not is_allowed("workflows.stream", "train")
    assert is_allowed("train.sae", "evaluate")


def test_no_bare_import_of_a_folder():
    """`import evaluate` would find Hugging Face's."""
    bare = {(name_of(path), module) for path in SOURCES for module in without_dots(imports_and_classes(path)[0])}
    assert {(path, name) for path, name in bare if name.split(".")[0] in FOLDERS} == set()
    assert list(without_dots(ast.parse("import evaluate.x\nfrom train import sae\nfrom .cache import hooks").body)) == [
        "evaluate.x", "train",
    ]  # fmt: skip


def without_dots(imports: Iterable[ast.AST]) -> Iterator[str]:
    for node in imports:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module


def test_every_folder_with_code_is_a_package_and_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {"." if p.parent == ROOT else name_of(p.parent) for p in SOURCES}
    packages = {"." if p.parent == ROOT else name_of(p.parent) for p in SOURCES if p.name == "__init__.py"}
    assert folders == packages
    assert sorted(listed) == sorted("sae" if f == "." else f"sae.{f.replace('/', '.')}" for f in packages)


def test_every_module_can_be_imported():
    for path in SOURCES:
        importlib.import_module(f"sae.{module_of(path)}".rstrip("."))


def test_a_class_name_has_one_meaning():
    places = defaultdict(list)
    for path in SOURCES:
        for name in imports_and_classes(path)[1]:
            places[name].append(name_of(path))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_file_grows_beyond_reading():
    lines = {name_of(path): len(text_of(path).splitlines()) for path in SOURCES}
    assert {name: count for name, count in lines.items() if count >= LONGEST} == {}


def test_the_training_loop_stays_one_screen():
    assert len((ROOT / "train" / "loop.py").read_text().splitlines()) < LONGEST_LOOP
