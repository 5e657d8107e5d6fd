"""The examples in README and docs are valid: Python runs, TOML is accepted, commands parse."""

import functools
import re
import runpy
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

import sae
from sae.cli.main import app
from sae.harvest import mini
from sae.train.recipe import RECIPES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LINKING = [
    *PAGES, *NOTEBOOKS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "harvest").rglob("*.md")),
]  # fmt: skip
# Replacements for the model, the cache and the run that the pages mention.
INSTEAD = {
    "google/gemma-2-2b": str(mini.WEIGHTS),
    "activations/gemma-2-2b--pile-uncopyrighted--9f31c2aa": "activations/shown",
    "runs/topk-L12-n18432-s0-1a2b3c": "runs/shown",
}
pytestmark = pytest.mark.usefixtures("one_thread")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str


def blocks() -> Iterator[Block]:
    for page in PAGES:
        content = page.read_text()
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", content, re.M | re.S):
            yield Block(page, content[: found.start()].count("\n") + 1, found[1], found[2])


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    titles = (re.sub(r"\]\([^)]*\)", "", title).lower() for title in re.findall(r"^#+ (.*)$", text, re.M))
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_of_the_repository_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if ":" not in name:
            assert target.is_file(), f"{link}: no such file"
            assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_found_from_the_readme_and_every_public_name_in_the_reference() -> None:
    site = runpy.run_path(str(ROOT / "docs" / "build_site.py"))
    assert {*(ROOT / "docs").rglob("*.md"), *NOTEBOOKS} - site["linked_files"]() == set()
    assert site["undocumented"]() == []
    shown = "".join(site["describe_command"](program(), "sae"))
    for name, command in program().commands.items():
        assert f"\n## sae {name}\n" in shown and command.help in shown
    assert sorted(re.findall(r"^## (.*)$", "".join(site["describe_recipes"]()), re.M)) == sorted(RECIPES)


def test_the_readme_stays_short() -> None:
    """Longer explanations belong in docs/."""
    assert (ROOT / "README.md").stat().st_size <= 10_000


def test_every_benchmark_result_is_listed() -> None:
    results = ROOT / "benchmarks" / "results"
    listed = re.findall(r"\]\((.*?)\)", (results / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in results.glob("2*.md"))


def test_the_version_to_cite_is_that_of_the_package() -> None:
    assert f"\nversion: {sae.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def named(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line}"


def call(*words: object) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def made(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a minimal cache and run of layer 12 of gemma-2-mini, at the paths that the pages use. Copy it."""
    home = tmp_path_factory.mktemp("made")
    cache = home / "activations" / "shown"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_HOME", str(home))
        call("harvest", "--model", mini.NAME, "--dataset", sentences, "--layer", 12, "--tokens", 2100, "--out", cache)
        sizes = ["--steps", 2, "--width", "2x", "--batch-size", 256]
        call("train", "--variant", "topk", "--layer", 12, "--cache", cache, *sizes)
    (run,) = (home / "runs").iterdir()
    run.rename(home / "runs" / "shown")
    return home


@pytest.fixture
def prepared(made: Path, home: Path) -> Path:
    """A copy of `made` as this test's SAE_HOME."""
    return shutil.copytree(made, home, dirs_exist_ok=True)


BLOCKS = list(blocks())
PYTHON = {page: [b for b in BLOCKS if b.language == "python" and b.page == page] for page in PAGES}


RUN = [
    pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name == "sharing.md" else [])
    for page, found in PYTHON.items()
    if found
]


@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, prepared: Path) -> None:
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in PYTHON[page]:
        code = block.text
        for shown, real in INSTEAD.items():
            code = code.replace(shown, real)
        exec(compile("\n" * block.line + code, str(page), "exec"), names)  # lines as on the page
    if page.name == "README.md":
        assert names["f"].shape[-1] == names["s"].d_sae and names["x"].shape == (2048, names["s"].d_in)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml"], ids=named)
def test_every_configuration_is_accepted(block: Block, home: Path) -> None:
    (home / "shown.toml").write_text(block.text)
    call("config", "show", "variants", "--config", home / "shown.toml")


def commands_of(block: Block) -> Iterator[list[str]]:
    """The `sae ...` commands of a shell block, as words. In a list of commands, the descriptions are left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "":
            line = re.split(r"\s{2,}", line)[0]
        for part in re.split(r"&&|;", line):
            words = shlex.split(part, comments=True)
            if words and Path(words[0]).name == "sae":
                yield [word for word in words[1 : words.index("|") if "|" in words else None] if word != "..."]


SHELL = [(b, words) for b in BLOCKS if b.language in ("bash", "sh", "") for words in commands_of(b)]


@functools.cache
def program() -> Any:
    return typer.main.get_command(app)


def descend(words: list[str]) -> tuple[Any, list[str]]:
    """The command at the beginning of `words`, and the remaining words."""
    command = program()
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize(("block", "words"), SHELL, ids=lambda p: named(p) if isinstance(p, Block) else None)
def test_every_command_is_one_that_the_program_takes(block: Block, words: list[str]) -> None:
    command, rest = descend(words)
    assert not hasattr(command, "commands"), f"{' '.join(words)} names no verb"
    if block.language:  # a complete command; lists of commands omit required arguments
        command.make_context("sae", list(rest))


def inline() -> Iterator[tuple[str, list[str]]]:
    for page in [*PAGES, *NOTEBOOKS]:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            for found in re.finditer(r"`(?:torchrun [^`]*-m )?sae ([^`]+)`", line):
                yield f"{page.relative_to(ROOT)}:{number}", found[1].split()


def test_every_command_in_a_sentence_names_a_verb_and_its_flags() -> None:
    for where, words in inline():
        if words[0].startswith("-"):
            continue
        command, rest = descend(words)
        assert command is not program(), where
        flags = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= flags, where


@pytest.mark.parametrize("check", [inline, blocks], ids=["sentences", "blocks"])
def test_there_is_something_to_check(check: Callable[[], Iterator[Any]]) -> None:
    assert len(list(check())) > 10 and len(SHELL) > 10 and any(PYTHON.values())


def test_the_readme_s_test_command_is_what_just_installs_and_tests_with() -> None:
    """CI installs through `just check`, so this test also verifies the README's command."""
    recipes = dict(re.findall(r"^(\w+):.*\n((?:    .+\n)+)", (ROOT / "justfile").read_text(), re.M))
    steps = [line.strip().replace(" -q ", " ") for name in ("install", "test") for line in recipes[name].splitlines()]
    assert len(steps) == 3 and f"\n{' && '.join(steps)}\n" in (ROOT / "README.md").read_text()
