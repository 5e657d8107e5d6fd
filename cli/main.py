"""The command line: parses, delegates, prints. `sae --help` imports neither torch nor other folders of this package."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .cache import cache_app
from .compare import compare
from .config import config_app
from .config_file import CommandWithOldNames
from .console import BROKEN_PIPE, discard_output
from .convert import export, import_
from .dashboard import dashboard, inspect
from .data import data_app
from .demo import demo
from .env import env
from .evaluate import evaluate
from .harvest import harvest
from .printing import print_line, printable_usage_errors
from .reproduce import reproduce
from .train import train
from .variants import variants


class Program(TyperGroup):
    """The program `sae`. If the reader of its output closes the pipe, `sae` exits with 141 (click and rich would exit
    with 1). If Ctrl-C arrives while arguments are parsed, `sae` raises KeyboardInterrupt (typer would exit silently).

    If an error quotes words of the command line, their escape sequences are shown as text.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except SystemExit as error:
            if isinstance(error.__context__, typer.Exit) and isinstance(error.__context__.__cause__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            if not isinstance(error.__context__, BrokenPipeError):
                raise
            discard_output()
            sys.exit(BROKEN_PIPE)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with printable_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with printable_usage_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Program, no_args_is_help=True,
    pretty_exceptions_show_locals=False, rich_markup_mode="rich", add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Harvest a language model's activations, train sparse autoencoders on them, evaluate the result.",
)  # fmt: skip
app.add_typer(cache_app, name="cache")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print_line(installed("sae-pipeline"))
        raise typer.Exit


for command in (harvest, train, evaluate, compare, reproduce, dashboard, inspect, variants, demo, env):
    app.command(cls=CommandWithOldNames)(command)
app.command("export")(export)
app.command("import")(import_)
