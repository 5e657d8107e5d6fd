"""`sae variants`: a table of the recipes, and a page for each of them."""

import inspect
import json
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from .console import cli_command
from .printing import print_line

if TYPE_CHECKING:
    from ..train.recipe import Recipe

WIDTH = 100  # columns
PAPER_WIDTH = 2304  # d_in of the papers' model, used on the pages for values that depend on the width


@cli_command
def variants(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Recipes to show in full.", show_default=False)
    ] = None,
) -> None:
    """List the recipes that `sae train --variant` accepts, or show some of them with every option."""
    from ..train import variants as _  # noqa: F401  (registers the recipes)
    from ..train.recipe import RECIPES, find_recipe

    if names:
        pages = ["\n".join(recipe_page(recipe)) for recipe in [find_recipe(name) for name in names]]
        print_line("\n\n".join(pages))
        return
    by_paper: dict[str, list[Recipe]] = defaultdict(list)
    for recipe in RECIPES.values():
        by_paper[recipe.paper].append(recipe)
    name_width = max(len(name) for name in RECIPES)
    for paper in sorted(by_paper, key=publication):
        print_line(f"Paper {paper_title(by_paper[paper][0])}" if paper.isdigit() else paper)
        for recipe in by_paper[paper]:
            print_line(f"  {recipe.name:{name_width}}  {recipe.summary}")
        print_line()
    print_line("sae variants NAME shows a recipe with every option.")


def publication(paper: str) -> tuple[bool, str, str]:
    """Sort key: published papers by year, then the numbered papers."""
    number = re.search(r"\d+", paper)
    return paper.isdigit(), number[0] if number else "", paper


def recipe_page(recipe: "Recipe") -> Iterator[str]:
    """The lines of a recipe's page."""
    from ..train.optimization import Optimization
    from ..train.options import read_option_docs

    yield recipe.name
    for paragraph in recipe.description.split("\n\n"):
        yield from wrapped(paragraph, 4)
        yield ""
    yield from labelled("paper", "; ".join(filter(None, (paper_title(recipe), recipe.equations))))
    yield f"width     {recipe.width:g}x d_in (--width)"
    yield f"batch     {recipe.batch_size:,} tokens (--batch-size)"
    yield from labelled("measured", measured(recipe.name))
    if equations := equations_of(recipe):
        yield ""
        yield from equations
    yield ""
    yield "options (--set NAME=VALUE)"
    types, docs = recipe.option_types(), recipe.option_docs()
    void = {name: f" Has no effect with {other}={' or '.join(map(show_value, off))}." for name, (other, off) in
            recipe.options_without_effect().items()}  # fmt: skip
    for name, default in recipe.options.items():
        yield from option_lines(name, default, types[name], docs.get(name, "not documented") + void.get(name, ""))
    yield ""
    yield "--paper-exact"
    yield from paper_exact_lines(recipe)
    yield ""
    yield f"optimizer options (--set), shared by all recipes; defaults of this one at d_in {PAPER_WIDTH}"
    docs = read_option_docs(Optimization)
    for name, default in default_optimization(recipe).items():
        yield from option_lines(name, default, types[name], docs.get(name, "not documented") + void.get(name, ""))


def option_lines(name: str, default: Any, kind: Any, meaning: str) -> Iterator[str]:
    """An option's name, default and type, and its meaning below."""
    heading = f"  {f'{name}={show_value(default)}':32}  {show_type(kind)}"
    yield from textwrap.wrap(heading, WIDTH, subsequent_indent=" " * 36)
    yield from wrapped(meaning, 6)


def paper_exact_lines(recipe: "Recipe") -> Iterator[str]:
    """Lines that say what `--paper-exact` sets, and why these settings do not work as the paper intends."""
    if recipe.why_not_paper_exact:
        yield from wrapped(f"Changes nothing: {recipe.why_not_paper_exact}.", 2)
        return
    for name, (value, reason) in (recipe.paper_exact or {}).items():
        yield f"  {name}={show_value(value)}"
        yield from wrapped(f"warning: {reason}.", 6)
    if scaled := recipe.scaled_options:
        yield from wrapped(f"Uses the paper's number for {', '.join(scaled)}, without scaling it to the run.", 2)
    if "k" in scaled:
        yield from wrapped("A k above the number of latents (--width) is still scaled to d_in.", 2)


def show_value(value: Any) -> str:
    """A value in the syntax of `--set`."""
    if isinstance(value, (bool, type(None))):
        return str(value).lower()
    from ..train.scaling import ScaledDefault

    return f"{value:g}" if isinstance(value, float) and not isinstance(value, ScaledDefault) else str(value)


def show_type(kind: Any) -> str:
    """The name of a type, or its choices."""
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_args(kind):
        return " | ".join(show_type(one) for one in get_args(kind))
    return {type(None): "none", bool: "true | false"}.get(kind, getattr(kind, "__name__", str(kind)))


def paper_doc(recipe: "Recipe") -> str:
    """The docstring of the paper's file or folder in train/variants."""
    folder = "train.variants."
    package, _, module = recipe.declared_by.__module__.partition(folder)
    return inspect.getdoc(sys.modules[package + folder + module.split(".")[0]]) or ""


def paper_title(recipe: "Recipe") -> str:
    if not recipe.paper.isdigit():
        return recipe.paper
    title, numbered, _ = paper_doc(recipe).partition(" (paper ")
    return f"{recipe.paper}: {title}" if numbered else recipe.paper


def equations_of(recipe: "Recipe") -> list[str]:
    """The equations of the recipe's paper: the first indented block in the docstring that `paper_doc` returns."""
    lines = paper_doc(recipe).splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("    ")), len(lines))
    end = next((i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith("    ")), len(lines))
    block = textwrap.dedent("\n".join(lines[start:end])).rstrip()
    return textwrap.indent(block, "  ").splitlines()


def default_optimization(recipe: "Recipe") -> dict[str, Any]:
    """The optimizer options that a recipe sets, at the width of the papers' model. Allocates nothing."""
    import torch

    from ..train.variant import RunConfig

    with torch.device("meta"):
        config = RunConfig(PAPER_WIDTH, round(recipe.width * PAPER_WIDTH), 4882, recipe.batch_size)
        return vars(recipe.make(config, {}).optimization)


def measured(name: str) -> str:
    """The measurements of a recipe at its defaults, from train/variants/measured.json."""
    from ..train import variants as folder

    table = json.loads((Path(folder.__path__[0]) / "measured.json").read_text(encoding="utf-8"))
    if name not in table["recipes"]:
        return "not measured"
    row = table["recipes"][name]
    numbers = f"L0 {row['l0']:g}, explained variance {row['explained_variance']:g}, KL score {row['kl_score']:g}"
    return f"{numbers} ({table['setting']}; {table['source']})"


def labelled(label: str, text: str) -> list[str]:
    """A text with a label before its first line."""
    return textwrap.wrap(f"{label:10}{text}", WIDTH, subsequent_indent=" " * 10)


def wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
