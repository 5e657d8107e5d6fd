"""`sae variants`: the recipes of the registry."""

import typer

from .console import cli_command


@cli_command
def variants() -> None:
    """The recipes, their papers and their options."""
    from ..train import variants as _  # noqa: F401
    from ..train.recipe import RECIPES
    from ..train.variant import Optimization

    for recipe in RECIPES.values():
        typer.echo(f"{recipe.name}   {recipe.paper} {recipe.equations}".rstrip())
        typer.echo(f"    {recipe.summary}")
        options = ", ".join(f"{k}={v}" for k, v in recipe.options.items())
        typer.echo(f"    width {recipe.width:g}x, batch {recipe.batch_size}; --set {options}")
        if recipe.paper_exact is not None:
            letter = ", ".join(f"{k}={v} ({why})" for k, (v, why) in recipe.paper_exact.items())
            typer.echo(f"    --paper-exact {letter or 'changes nothing: the defaults are the letter'}")
    shared = ", ".join(f"{k}={v}" for k, v in vars(Optimization()).items())
    typer.echo(f"every recipe also takes --set {shared}")
