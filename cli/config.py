"""`sae config`: where each value of a command comes from, and a file to begin with."""

import copy
from typing import Annotated, Any

import typer

from ..common.errors import UsageError, did_you_mean
from .config_file import Value, options_of, resolved, toml, verb_of
from .console import report_errors

config_app = typer.Typer(
    no_args_is_help=True, help="What a command would run with, and from where; a file for --config."
)
STARTER = ("harvest", "train", "evaluate")


@config_app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@report_errors
def show(
    context: typer.Context, verb: Annotated[str, typer.Argument(help="A verb; its own flags and --config follow.")]
) -> None:
    """Every value that a command would have, as TOML that --config reads, with its origin: default, file:line or flag."""
    parent, words = context.find_root(), [verb, *context.args]
    command: Any = parent.command
    while (verbs := getattr(command, "commands", None)) is not None:
        name = words.pop(0) if words else ""
        if name not in verbs:
            raise UsageError(f"There is no verb {name!r} of {parent.info_name}{did_you_mean(name, verbs)}")
        command = as_shown(verbs[name])
        parent = command.make_context(name, words if not hasattr(command, "commands") else [], parent=parent)
    typer.echo(f"[{'.'.join(verb_of(parent))}]")
    lines = list(lines_of(resolved(parent)))
    width = max((len(text) for text, _ in lines), default=0)
    for text, origin in lines:
        typer.echo(f"{text:{width}}  # {origin}" if origin else text)


def as_shown(command: Any) -> Any:
    """A command that needs no arguments: what it would work on is no option."""
    command = copy.copy(command)
    command.params = [copy.copy(param) for param in command.params]
    for param in command.params:
        param.required = False
    command.no_args_is_help = False
    return command


def lines_of(values: dict[str, Value]) -> list[tuple[str, str]]:
    """Lines of TOML, each with its origin."""
    lines = []
    for name, (_, value, origin) in values.items():
        if value is None or (origin == "default" and value in ((), [])):
            lines.append((f"# {name} =", "not set"))
        elif isinstance(origin, list):
            lines.append((f"{name} = [", ""))
            lines += [(f"    {toml(one)},", where) for one, where in zip(value, origin, strict=True)]
            lines.append(("]", ""))
        else:
            lines.append((f"{name} = {toml(value)}", origin))
    return lines


@config_app.command()
@report_errors
def init(context: typer.Context) -> None:
    """Print a file to begin with: every flag of harvest, train and evaluate, with what it is by default."""
    verbs = context.find_root().command.commands  # type: ignore[attr-defined]
    typer.echo("# For --config of every verb. Unknown keys are refused; flags beat the file.")
    for verb in STARTER:
        typer.echo(f"\n[{verb}]")
        for name, param in options_of(verbs[verb]).items():
            value = "" if param.default is None else f" {toml(param.default)}"
            typer.echo(f"# {f'{name} ={value}':40s} # {param.help}")
