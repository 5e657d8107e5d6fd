"""Build the documentation site into build/site: `python docs/build_site.py`, or `just docs`.

The site has the README and every file that a page leads to, in the folders of the repository, so that a link means the
same in a checkout and on the site. The commands are documented from the command line itself. The build fails if a link
leads nowhere, if no page links to a page of docs/, or if a public name of the package is not documented.
"""

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
    """The README, and every file of the repository to which links lead from it."""
    found: set[Path] = set()
    new = [ROOT / "README.md"]
    while new:
        file = new.pop()
        found.add(file)
        links = LINK.findall(file.read_text()) if file.suffix == ".md" else []
        new += {target for link in links if (target := (file.parent / link).resolve()).is_file()} - found
    return found


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
    """The Markdown of all recipes, as `sae variants NAME` shows them, without what they share."""
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
    problems = [f"{page.relative_to(ROOT)}: no page links to it" for page in set(ROOT.glob("docs/**/*.md")) - files]
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
