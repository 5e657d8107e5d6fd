"""`sae config`: show a command's values and where each comes from, or print a starter config file."""

import copy
from typing import Annotated, Any

import typer

from ..common.errors import UsageError, did_you_mean
from .config_file import Value, command_of, options_of, resolve, to_toml
from .console import report_errors
from .printing import print_line

config_app = typer.Typer(
    no_args_is_help=True, help="Show a command's values and where each comes from, or print a starter config file."
)
COMMANDS = ("harvest", "train", "evaluate")  # in the file that `init` prints


@config_app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@report_errors
def show(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="A command; its own flags and --config follow.")],
) -> None:
    """Print every value of a command as TOML for --config, each with its origin: default, file:line or flag."""
    parent: Any = context.find_root()
    current, words = parent.command, [command, *context.args]
    while (subcommands := getattr(current, "commands", None)) is not None:
        name = words.pop(0) if words else ""
        if name not in subcommands:
            raise UsageError(f"unknown command {name!r} of {parent.info_name}{did_you_mean(name, subcommands)}")
        current = without_required(subcommands[name])
        parent = current.make_context(name, words if not hasattr(current, "commands") else [], parent=parent)
    print_line(f"[{'.'.join(command_of(parent))}]")
    lines = list(lines_with_origins(resolve(parent)))
    width = max((len(text) for text, _ in lines), default=0)
    for text, origin in lines:
        print_line(f"{text:{width}}  # {origin}" if origin else text)


def without_required(command: Any) -> Any:
    """A copy of a command in which no argument is required."""
    command = copy.copy(command)
    command.params = [copy.copy(param) for param in command.params]
    for param in command.params:
        param.required = False
    command.no_args_is_help = False
    return command


def lines_with_origins(values: dict[str, Value]) -> list[tuple[str, str]]:
    """Lines of TOML, each with the origin of its value."""
    lines = []
    for name, (_, value, origin) in values.items():
        if value is None or (origin == "default" and value in ((), [])):
            lines.append((f"# {name} =", "not set"))
        elif isinstance(origin, list):
            lines.append((f"{name} = [", ""))
            lines += [(f"    {to_toml(item)},", where) for item, where in zip(value, origin, strict=True)]
            lines.append(("]", ""))
        else:
            lines.append((f"{name} = {to_toml(value)}", origin))
    return lines


@config_app.command()
@report_errors
def init(context: typer.Context) -> None:
    """Print a starter config file: every flag of harvest, train and evaluate with its default."""
    root: Any = context.find_root()
    print_line("# For --config of every command. Unknown keys are errors; flags override the file.")
    for name in COMMANDS:
        print_line(f"\n[{name}]")
        for option, param in options_of(root.command.commands[name]).items():
            value = "" if param.default is None else f" {to_toml(param.default)}"
            print_line(f"# {f'{option} ={value}':40s} # {param.help}")
