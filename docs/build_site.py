"""Build the documentation site into build/site: `python docs/build_site.py`, or `just docs`.

The site contains the README and every file that a page links to. Folders are the same as in the repository, so a link
leads to the same file in a checkout and on the site. A notebook also becomes a page, with its stored outputs. The
documentation of the commands is generated from the command line itself. The build fails if a link leads nowhere, if no
page links to a page of docs/, or if a public name of the package is not documented.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import sae
from sae.cli.main import app
from sae.cli.variants import recipe_page
from sae.train import variants as _  # noqa: F401  (registers the recipes)
from sae.train.recipe import RECIPES

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


def linked_files() -> set[Path]:
    """The README, and every file of the repository that can be reached from it by links."""
    found: set[Path] = set()
    new = [ROOT / "README.md"]
    while new:
        file = new.pop()
        found.add(file)
        text = file.read_text() if file.suffix == ".md" else render_notebook(file) if file.suffix == ".ipynb" else ""
        new += {target for link in LINK.findall(text) if (target := (file.parent / link).resolve()).is_file()} - found
    return found


def render_notebook(file: Path) -> str:
    """A notebook as Markdown: its text, its code, and the outputs that are stored in it."""
    parts = []
    for cell in json.loads(file.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", []):
            text = "".join(output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"])
            parts.append(f"```text\n{text.rstrip()}\n```")
    title, *rest = parts
    return "\n\n".join([title, f'<a href="{file.name}" download>Download the notebook</a>', *rest]) + "\n"


def option_row(option: Any) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else f" {(option.metavar or option.name.strip('_').upper()).replace('|', ' or ')}"
    known = option.show_default is True and isinstance(option.default, int | float | str) and not option.is_flag
    default = f" Default: `{option.default}`." if known else ""
    text = (option.help or "").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
    return f"| `{names}{value}` | {text}{default} |"


def describe_command(command: Any, name: str) -> Iterator[str]:
    """The Markdown of a command and its subcommands: what it does, and its options by group."""
    yield f"\n## {name}\n\n{command.help or ''}\n"
    arguments = [param.metavar or param.name.upper() for param in command.params if param.param_type_name == "argument"]
    if not hasattr(command, "commands"):
        yield f"```text\n{' '.join([name, '[OPTIONS]', *arguments])}\n```\n"
    groups: dict[str, list[str]] = {}
    for param in command.params:
        if param.param_type_name == "option" and not param.hidden:
            title = getattr(param, "rich_help_panel", None) or "Options"
            groups.setdefault(title, []).append(option_row(param))
    for title, rows in groups.items():
        yield "\n".join([f"\n| {title} | |", "|---|---|", *rows]) + "\n"
    for subcommand, child in getattr(command, "commands", {}).items():
        yield from describe_command(child, f"{name} {subcommand}")


def describe_recipes() -> Iterator[str]:
    """The Markdown of all recipes, as `sae variants NAME` shows them, without the options that they share."""
    for name, recipe in RECIPES.items():
        own = "\n".join(recipe_page(recipe)).partition("\noptimizer options")[0]
        yield f"\n## {name}\n\n```text\n{own.rstrip()}\n```\n"


def undocumented() -> list[str]:
    """The public names that the page about the API leaves out, or that have no docstring."""
    shown = set(re.findall(r"^::: sae\.(\w+)$", (REFERENCE / "api.md").read_text(), re.M))
    names = set(sae.__all__) - {"__version__"}
    return sorted(name for name in names if name not in shown or not getattr(sae, name).__doc__)


def main() -> None:
    files = linked_files()
    pages = {*ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/**/*.ipynb")}
    problems = [f"{page.relative_to(ROOT)}: no page links to it" for page in pages - files]
    problems += [f"sae.{name} is not documented in docs/reference/api.md" for name in undocumented()]
    if problems:
        sys.exit("\n".join(problems))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "sae").symlink_to(ROOT)  # from which the API is read
        shutil.copy(ROOT / "docs" / "zensical.toml", work)
        for file in files:
            copy = work / "pages" / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
            if file.suffix == ".ipynb":
                copy = copy.with_suffix(".md")
                copy.write_text(render_notebook(file))
            if copy.suffix == ".md":  # a link to a notebook leads to its page
                copy.write_text(re.sub(r"(\]\((?!https?:)[^)\s]+)\.ipynb\)", r"\1.md)", copy.read_text()))
        options = describe_command(typer.main.get_command(app), "sae")
        for page, placeholder, text in [
            ("commands.md", "<!-- options -->", "".join(options)),
            ("recipes.md", "<!-- recipes -->", "".join(describe_recipes())),
        ]:
            copy = work / "pages" / "docs" / "reference" / page
            copy.write_text(copy.read_text().replace(placeholder, text))
        if code := subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=work).returncode:
            sys.exit(code)
        site = ROOT / "build" / "site"
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(work / "site", site)
    print(f"{site / 'index.html'}: open it in a browser")


if __name__ == "__main__":
    main()
