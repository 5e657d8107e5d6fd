"""The command line: parses, delegates, prints. `sae --help` imports neither torch nor any of our folders."""

from typing import Annotated

import typer

from .cache import cache_app
from .compare import compare
from .config import config_app
from .config_file import CommandWithOldNames
from .convert import export, import_
from .dashboard import dashboard, inspect
from .demo import demo
from .env import env
from .evaluate import evaluate
from .harvest import harvest
from .reproduce import reproduce
from .train import train
from .variants import variants

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_show_locals=False, rich_markup_mode="rich", add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Harvest a language model's activations, train sparse autoencoders on them, evaluate the result.",
)  # fmt: skip
app.add_typer(cache_app, name="cache")
app.add_typer(config_app, name="config")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("sae-pipeline"))
        raise typer.Exit


for command in (harvest, train, evaluate, compare, reproduce, dashboard, inspect, variants, demo, env):
    app.command(cls=CommandWithOldNames)(command)
app.command("export")(export)
app.command("import")(import_)
