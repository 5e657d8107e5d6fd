"""The doors between the folders, and the files in which this field grows ugly."""

import ast
import importlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cache", "harvest", "train", "evaluate")
SOURCES = sorted(p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] in FOLDERS or p.parent == ROOT)

# What a file of a folder may import of the others: whole folders, or single modules.
DOORS = {
    "cache": (),
    "harvest": ("cache",),
    "train": ("cache",),
    "evaluate": ("cache", "harvest.model", "harvest.architectures", "train.sae"),
}
LONGEST, LONGEST_LOOP = 400, 130  # lines


def imported(source: str, package: tuple[str, ...]) -> set[str]:
    """Modules of ours that a source imports, from the root of the package: `cache.reader`, `harvest.model`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + module
            elif module[0] == "sae":
                base = module[1:]
            else:
                continue
            # `from . import mini` names a module, `from .mini import NAME` something in it
            found |= {".".join((*base, alias.name)) for alias in node.names} if len(base) < 2 else {".".join(base)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("sae.") for alias in node.names if alias.name.startswith("sae.")}
    return found


def through_a_door(module: str, folder: str) -> bool:
    return any(f"{module}.".startswith(f"{door}.") for door in (folder, *DOORS[folder]))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != ROOT], ids=name_of)
def test_imports_go_through_the_doors(path):
    package = path.relative_to(ROOT).parent.parts
    modules = imported(path.read_text(), package)
    assert {m for m in modules if not through_a_door(m, package[0])} == set()


@pytest.mark.parametrize(
    ("source", "package", "modules"),
    [
        ("from ..train.recipe import recipe", ("evaluate",), {"train.recipe"}),
        ("from ..train import sae", ("evaluate",), {"train.sae"}),
        ("from ... import cli", ("train", "variants"), {"cli"}),
        ("from .core import Core", ("evaluate",), {"evaluate.core"}),
        ("def f():\n    from sae.harvest.text import cut", ("train",), {"harvest.text"}),
        ("import sae.harvest.run\nimport torch", ("cache",), {"harvest.run"}),
    ],
)
def test_the_reader_of_imports_sees_every_form(source, package, modules):
    assert imported(source, package) == modules


def test_closed_doors_are_seen():
    assert not through_a_door("train.recipe", "evaluate")
    assert not through_a_door("train.sae_other", "evaluate")
    assert not through_a_door("harvest.text", "evaluate")
    assert not through_a_door("cli", "cache")
    assert through_a_door("train.sae", "evaluate")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_bare_import_of_a_folder(path):
    """`import evaluate` would find Hugging Face's."""
    bare = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            bare |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bare.add(node.module)
    assert {name for name in bare if name.split(".")[0] in (*FOLDERS, "cli", "terminal")} == set()


def test_every_folder_with_code_is_a_package_and_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {"." if p.parent == ROOT else name_of(p.parent) for p in SOURCES}
    packages = {"." if p.parent == ROOT else name_of(p.parent) for p in SOURCES if p.name == "__init__.py"}
    assert folders == packages
    assert sorted(listed) == sorted("sae" if f == "." else f"sae.{f.replace('/', '.')}" for f in packages)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_can_be_imported(path):
    importlib.import_module(".".join(["sae", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"))


# A variant file is its paper, however many mechanisms that has.
@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name != "variants"], ids=name_of)
def test_no_file_grows_beyond_reading(path):
    assert len(path.read_text().splitlines()) < LONGEST


def test_the_training_loop_stays_one_screen():
    assert len((ROOT / "train" / "loop.py").read_text().splitlines()) < LONGEST_LOOP
