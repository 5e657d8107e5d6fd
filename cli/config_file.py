"""`--config file.toml`, an option of every command: a table per command, with the long names of its flags as keys.

    [harvest]
    model = "google/gemma-2-2b"
    layer = [5, 12]         # a list if the flag can be repeated

    [train]
    batch-size = 4096
    set = { k = 64, topk.k = 32 }

The values in the file are checked like those of flags, and all mistakes in the file are reported together. Flags
override the file, and `--set` overrides it option by option. `sae --help` imports this module and must start quickly,
so the module imports no third-party package except typer, and nothing from common/ except `errors`.
"""

import functools
import inspect
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from ..common.errors import SaeError, UsageError, did_you_mean
from .printing import print_error, print_line

SET = "set_"  # the parameter of --set, the only flag that can be given as a table
ORIGINS: ContextVar[Mapping[str, str]] = ContextVar("ORIGINS")  # for the running command: flag -> where it was given
MAX_MISTAKES = 20  # reported for one file
# The parts of TOML that determine where a statement ends: strings and comments, which can contain anything, brackets
# and line ends.
TOKENS = re.compile(
    r"""\"{3}(?:\\.|[^\\])*?\"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\])*"|'[^']*'|\#[^\n]*|[\[\]{}]|\n""", re.DOTALL
)
FILE = "sae.cli.config_file"  # the key under which a typer context keeps the parsed file

# Flags and TOML keys that were renamed: command -> old name -> new name. An old name still works, and a note is
# printed.
RENAMED: dict[tuple[str, ...], dict[str, str]] = {
    ("train",): {"literal": "paper-exact", "order-seed": "shuffle-seed"},
}

Command = tuple[str, ...]  # the words after the program's name: ("train",), ("cache", "verify")
Key = tuple[str, ...]  # the path of a key in a TOML file: ("train", "set", "k")


class CommandWithOldNames(TyperCommand):
    """A command that still accepts the old names of its renamed flags. The old names are not listed in --help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_current_names(args, RENAMED.get(command_of(ctx), {}))))


def _current_names(args: Sequence[str], renamed: Mapping[str, str]) -> Iterator[str]:
    """The arguments, with the new names of renamed flags. Arguments after a `--` are not changed."""
    only_values = False
    for arg in args:
        only_values = only_values or arg == "--"
        flag, equals, value = arg.partition("=")
        name = flag.removeprefix("--")
        if not only_values and flag.startswith("--") and name in renamed:
            note_renamed(flag, f"--{renamed[name]}")
            arg = f"--{renamed[name]}{equals}{value}"
        yield arg


def note_renamed(old: str, new: str) -> None:
    print_line(f"note     {old} is now {new}; the old name still works", err=True)


class Value(NamedTuple):
    """A parameter, its value and its origin: "default", "flag" or "file.toml:7"; for --set, a list of origins."""

    param: Any
    value: Any
    origin: str | list[str]


class ConfigFile:
    """A configuration file, checked against the program's commands. Raises UsageError with all mistakes at once."""

    def __init__(self, path: Path, context: Any) -> None:
        from ..common.files import MAX_TOML, parse_toml

        self.path, self.context = path, context
        try:
            with path.open("rb") as file:
                data = file.read(MAX_TOML + 1)
        except OSError as error:
            raise UsageError(f"--config {path} cannot be read: {error.strerror}.") from None
        content = parse_toml(data, f"--config {path}")
        self.lines = line_numbers(data.decode("utf-8-sig"))
        self.values: dict[Command, dict[str, Any]] = {}  # parameter -> its value as on the command line
        self.origins: dict[Command, dict[str, Any]] = {}  # parameter -> file:line, or a list of those for --set
        found = self._read_table(content, context.find_root().command, ())
        if mistakes := list(islice(found, MAX_MISTAKES)):
            more = [f"{path}: there are more mistakes after these {MAX_MISTAKES}."] if next(found, None) else []
            raise UsageError("\n".join(mistakes + more))

    def origin(self, key: Key) -> str:
        return f"{self.path}:{self.lines[key]}"

    def _read_table(self, table: Mapping[str, Any], command: Any, words: Command) -> Iterator[str]:
        """Read the table of a command or command group; yields the mistakes in it."""
        subcommands = getattr(command, "commands", None)
        known = subcommands if subcommands is not None else options_of(command)
        for key, value in table.items():
            name, path = key, (*words, key)
            if subcommands is None and key not in known and key in RENAMED.get(words, {}):
                name = RENAMED[words][key]
                note_renamed(f"{self.origin(path)}: {key}", name)
            if name not in known:
                kind = "command" if subcommands is not None else f"{' '.join(words)} option"
                yield f"{self.origin(path)}: unknown {kind} {key!r}{did_you_mean(key, known)}"
            elif subcommands is None:
                yield from self._read_option(known[name], value, path)
            elif isinstance(value, dict):
                yield from self._read_table(value, known[name], path)
            else:
                yield f"{self.origin(path)}: {key} is a command; write its options under [{'.'.join(path)}]."

    def _read_option(self, param: Any, value: Any, path: Key) -> Iterator[str]:
        try:
            args = to_args(param, value)
            param.process_value(self.context, args)
        except (typer.BadParameter, ValueError) as error:
            reason = error.message if isinstance(error, typer.BadParameter) else str(error)
            yield f"{self.origin(path)}: {path[-1]} = {to_toml(value)}: {reason.rstrip('.')}."
            return
        self.values.setdefault(path[:-1], {})[param.name] = args
        origins: str | list[str]
        if isinstance(value, dict):
            origins = [self.origin((*path, *key)) for key, _ in flatten(value)]
        else:
            origins = [self.origin(path)] * len(args) if param.name == SET else self.origin(path)
        self.origins.setdefault(path[:-1], {})[param.name] = origins


def line_numbers(text: str) -> dict[Key, int]:
    """The line on which each key of a valid TOML text begins."""
    line_of: dict[Key, int] = {}
    table: Key = ()  # of the last header
    for number, statement in statements(text):
        content = tomllib.loads(statement)
        header = statement.lstrip().startswith("[")
        keys = [key for key, _ in flatten(content, tables=True)]
        if header:
            table = max(keys, key=len)
        for key in keys:
            line_of.setdefault(key if header else (*table, *key), number)
    return line_of


def statements(text: str) -> Iterator[tuple[int, str]]:
    """The headers and `key = value` statements of a valid TOML text, each with the line on which it begins."""
    start, line, depth, first = 0, 1, 0, 1
    for token in TOKENS.finditer(text + "\n"):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        else:
            line += token[0].count("\n")
        if token[0] == "\n" and not depth:
            yield first, text[start : token.end()]
            start, first = token.end(), line


def flatten(table: Mapping[str, Any], tables: bool = False) -> Iterator[tuple[Key, Any]]:
    """The keys of a nested table as paths, with their values; with `tables`, also the keys of inner tables."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from (((key, *path), leaf) for path, leaf in flatten(value, tables))
        if tables or not isinstance(value, dict):
            yield (key,), value


def options_of(command: Any) -> dict[str, Any]:
    """The options of a command by their long names, without --config itself."""
    options = (param for param in command.params if param.param_type_name == "option" and param.name != "config")
    return {param.opts[0].removeprefix("--"): param for param in options}


def to_args(param: Any, value: Any) -> Any:
    """A TOML value in the form used on the command line: a string, a list of strings, or a bool for a switch.

    Raises ValueError if the value does not fit the parameter.
    """
    if isinstance(value, dict):
        if param.name != SET:
            raise ValueError("expected a value, not a table")
        return [f"{'.'.join(key)}={to_arg(leaf, list_separator=',')}" for key, leaf in flatten(value)]
    if param.is_flag:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value
    if isinstance(value, list) and not param.multiple:
        raise ValueError("expected one value, not a list")
    if isinstance(value, bool):
        raise ValueError("expected a value, not true or false")
    if not param.multiple:
        return to_arg(value)
    return [to_arg(item) for item in (value if isinstance(value, list) else [value])]


def to_arg(value: Any, list_separator: str | None = None) -> str:
    """A TOML value as one word of the command line.

    Lists and bools are allowed only if `list_separator` is given, as it is for --set.
    """
    if list_separator and isinstance(value, bool):
        return str(value).lower()
    if list_separator and isinstance(value, list):
        return list_separator.join(to_arg(item, list_separator) for item in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"expected a string or a number, not {value!r}")
    return str(value)


def to_toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(to_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{to_toml(key)} = {to_toml(item)}' for key, item in value.items())} }}"
    if isinstance(value, (int, float)):
        return str(value)
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if " " <= c != "\x7f" else f"\\u{ord(c):04x}" for c in text) + '"'


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of --config: values of the file become the defaults of the flags."""
    if path is not None:
        try:
            file = ConfigFile(path, context)
        except SaeError as error:
            print_error(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        context.default_map = file.values.get(command_of(context), {})
        context.meta[FILE] = file
    return path


def command_of(context: Any) -> Command:
    """The words after the program's name: ("train",), ("cache", "verify")."""
    if context.parent is None:
        return ()
    return (*command_of(context.parent), str(context.info_name))


def resolve(context: Any) -> dict[str, Value]:
    """Every parameter of a command by its long name, with its value and the origin of the value."""
    file: ConfigFile | None = context.meta.get(FILE)
    command = command_of(context)
    in_file = file.origins.get(command, {}) if file else {}
    values = {}
    for name, param in options_of(context.command).items():
        source = context.get_parameter_source(param.name)
        value, origin = context.params[param.name], "default"
        if source is not None and source.name == "COMMANDLINE":
            origin = "flag"
        elif source is not None and source.name == "DEFAULT_MAP":
            origin = in_file[param.name]
        values[name] = Value(param, value, origin)
        if param.name == SET and origin == "flag":
            values[name] = _merge_set(
                param, list(value), file.values.get(command, {}).get(SET, []) if file else [], in_file
            )
    return values


def _merge_set(param: Any, flags: list[str], from_file: list[str], origins: Mapping[str, Any]) -> Value:
    """The --set options given as flags, and those in the file that the flags do not override."""
    overridden = {text.partition("=")[0] for text in flags}
    kept = [n for n, text in enumerate(from_file) if text.partition("=")[0] not in overridden]
    where = [origins[SET][n] for n in kept] + ["flag"] * len(flags)
    return Value(param, [from_file[n] for n in kept] + flags, where)


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command so that it accepts --config; while it runs, `ORIGINS` contains the origin of each value."""

    @functools.wraps(command)
    def run(*args: Any, config: Path | None = None, context_: typer.Context | None = None, **kwargs: Any) -> None:
        values = resolve(context_) if context_ is not None else {}
        if "set" in values:
            kwargs[SET] = values["set"].value or None
        given = {name: v.origin for name, v in values.items() if v.origin not in ("default", [])}
        token = ORIGINS.set(
            {name: ", ".join([o] if isinstance(o, str) else dict.fromkeys(o)) for name, o in given.items()}
        )
        try:
            command(*args, **kwargs)
        finally:
            ORIGINS.reset(token)

    option = typer.Option(
        "--config",
        is_eager=True,
        callback=read_config,
        metavar="FILE",
        help="TOML file with a table of these flags for each command, such as \\[train]. Flags override it.",
    )
    parameters = [*inspect.signature(command).parameters.values()]
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters += [
        inspect.Parameter("config", kind, default=None, annotation=Annotated[Path | None, option]),
        inspect.Parameter("context_", kind, default=None, annotation=typer.Context),
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
