"""`--config file.toml`, which every verb takes: a table for each verb, its keys the long names of the flags.

    [harvest]
    model = "google/gemma-2-2b"
    layer = [5, 12]         # a list where the flag repeats

    [train]
    batch-size = 4096
    set = { k = 64, topk.k = 32 }

The whole file is checked as the flags would be, with all that is wrong said at once. Flags beat the file; of `set` they
beat it option by option. Imports nothing but typer and the errors, since `sae --help` passes here.
"""

import functools
import inspect
import io
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ..common.errors import SaeError, UsageError, did_you_mean

SET = "set_"  # the parameter of --set, the one flag that a table can stand for
ORIGINS: ContextVar[Mapping[str, str]] = ContextVar("ORIGINS")  # of the verb that runs: flag -> where it was given
FILE = "sae.cli.config_file"  # where a context keeps what was read


class Value(NamedTuple):
    """A value, and where it comes from: "default", "flag" or "file.toml:7"; of --set an origin for each option."""

    param: Any
    value: Any
    origin: str | list[str]


class File:
    """A configuration file, checked against the commands of a program; UsageError says everything that is wrong."""

    def __init__(self, path: Path, context: typer.Context) -> None:
        self.path, self.context = path, context
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"--config {path} is no TOML: {error}.") from None
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UsageError(f"--config {path} cannot be read: {why}.") from None
        self.lines = lines_of(text)
        self.given: dict[tuple[str, ...], dict[str, Any]] = {}  # verb -> parameter -> what its flag would be given
        self.origins: dict[tuple[str, ...], dict[str, Any]] = {}
        mistakes = list(self._read(content, context.find_root().command, ()))
        if mistakes:
            raise UsageError("\n".join(mistakes))

    def origin(self, key: tuple[str, ...]) -> str:
        return f"{self.path}:{self.lines[key]}"

    def _read(self, table: Mapping[str, Any], command: Any, verb: tuple[str, ...]) -> Iterator[str]:
        """Take over a table; yields what is wrong with it."""
        verbs = getattr(command, "commands", None)
        known = verbs if verbs is not None else options_of(command)
        for key, value in table.items():
            at = (*verb, key)
            if key not in known:
                what = "verb with options" if verbs is not None else f"option of {' '.join(verb)}"
                yield f"{self.origin(at)}: {key} is no {what}{did_you_mean(key, known)}"
            elif verbs is None:
                yield from self._option(known[key], value, at)
            elif isinstance(value, dict):
                yield from self._read(value, known[key], at)
            else:
                yield f"{self.origin(at)}: {key} is a verb: write its options under [{'.'.join(at)}]."

    def _option(self, param: Any, value: Any, at: tuple[str, ...]) -> Iterator[str]:
        try:
            words = words_of(param, value)
            param.process_value(self.context, words)
        except (typer.BadParameter, ValueError) as error:
            said = error.message if isinstance(error, typer.BadParameter) else str(error)
            yield f"{self.origin(at)}: {at[-1]} = {toml(value)}: {said.rstrip('.')}."
            return
        self.given.setdefault(at[:-1], {})[param.name] = words
        origins = [self.origin((*at, *key)) for key, _ in leaves(value)] if isinstance(value, dict) else self.origin(at)
        if param.name == SET and isinstance(origins, str):
            origins = [origins] * len(words)
        self.origins.setdefault(at[:-1], {})[param.name] = origins


def lines_of(text: str) -> dict[tuple[str, ...], int]:
    """The line on which each key of a TOML text begins.

    Beginnings of the text that end with a line are read one after the other: the first that has a key tells where it is.
    """
    lines, found, begins = list(io.StringIO(text)), dict[tuple[str, ...], int](), 1
    for number in range(1, len(lines) + 1):
        try:
            content = tomllib.loads("".join(lines[:number]))
        except tomllib.TOMLDecodeError:  # inside a value of several lines
            continue
        for key, _ in leaves(content, tables=True):
            found.setdefault(key, begins)
        begins = number + 1
    return found


def leaves(table: Mapping[str, Any], tables: bool = False) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The keys of a table, each as its path, with their values; with `tables` those of the tables in it too."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from (((key, *path), leaf) for path, leaf in leaves(value, tables))
        if tables or not isinstance(value, dict):
            yield (key,), value


def options_of(command: Any) -> dict[str, Any]:
    """The options of a command by their long name, but for --config itself."""
    options = (param for param in command.params if param.param_type_name == "option" and param.name != "config")
    return {param.opts[0].removeprefix("--"): param for param in options}


def words_of(param: Any, value: Any) -> Any:
    """A value of the file as the command line would have it: strings, a list of them, or a bool for a switch."""
    if isinstance(value, dict):
        if param.name != SET:
            raise ValueError("it is no table")
        return [f"{'.'.join(key)}={word_of(leaf, within=',')}" for key, leaf in leaves(value)]
    if param.is_flag:
        if not isinstance(value, bool):
            raise ValueError("it is a switch: give true or false")
        return value
    if isinstance(value, list) and not param.multiple:
        raise ValueError("it takes one value, no list")
    if isinstance(value, bool):
        raise ValueError("it is no switch: give a value")
    if not param.multiple:
        return word_of(value)
    return [word_of(one) for one in (value if isinstance(value, list) else [value])]


def word_of(value: Any, within: str | None = None) -> str:
    """A value as a word of the command line; of --set a list is written with `within` between its elements."""
    if within and isinstance(value, bool):
        return str(value).lower()
    if within and isinstance(value, list):
        return within.join(word_of(one, within) for one in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{value!r} is no string or number")
    return str(value)


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{toml(key)} = {toml(one)}' for key, one in value.items())} }}"
    if isinstance(value, (int, float)):
        return str(value)
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if " " <= c != "\x7f" else f"\\u{ord(c):04x}" for c in text) + '"'


def read(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of --config: what the file says becomes what the flags are by default."""
    if path is not None:
        try:
            file = File(path, context)
        except SaeError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        context.default_map = file.given.get(verb_of(context), {})
        context.meta[FILE] = file
    return path


def verb_of(context: typer.Context) -> tuple[str, ...]:
    """The words after the program's name: ("train",), ("cache", "verify")."""
    if context.parent is None:
        return ()
    return (*verb_of(context.parent), str(context.info_name))  # type: ignore[arg-type]


def resolved(context: typer.Context) -> dict[str, Value]:
    """Every parameter of a command by its long name, with its value and where that comes from."""
    file: File | None = context.meta.get(FILE)
    in_file = file.origins.get(verb_of(context), {}) if file else {}
    found = {}
    for name, param in options_of(context.command).items():
        source = context.get_parameter_source(param.name)
        value, origin = context.params[param.name], "default"
        if source is not None and source.name == "COMMANDLINE":
            origin = "flag"
        elif source is not None and source.name == "DEFAULT_MAP":
            origin = in_file[param.name]
        if param.name == SET and origin == "flag":
            flags, given = list(value), file.given.get(verb_of(context), {}).get(SET, []) if file else []
            keys = {text.partition("=")[0] for text in flags}
            kept = [n for n, text in enumerate(given) if text.partition("=")[0] not in keys]
            value = [given[n] for n in kept] + flags
            origin = [in_file[SET][n] for n in kept] + ["flag"] * len(flags)
        found[name] = Value(param, value, origin)
    return found


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb its --config; what comes from where is then in `ORIGINS` while it runs."""

    @functools.wraps(command)
    def run(
        *arguments: Any, config: Path | None = None, context_: typer.Context | None = None, **keywords: Any
    ) -> None:
        values = resolved(context_) if context_ is not None else {}
        if "set" in values:
            keywords[SET] = values["set"].value or None
        given = {name: v.origin for name, v in values.items() if v.origin not in ("default", [])}
        token = ORIGINS.set(
            {name: ", ".join([o] if isinstance(o, str) else dict.fromkeys(o)) for name, o in given.items()}
        )
        try:
            command(*arguments, **keywords)
        finally:
            ORIGINS.reset(token)

    option = typer.Option(
        "--config", is_eager=True, callback=read, metavar="FILE",
        help="TOML with a table of these flags for each verb, such as \\[train]. Flags beat it.",
    )  # fmt: skip
    own = inspect.signature(command)
    more = [
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, option]),
        inspect.Parameter("context_", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=typer.Context),
    ]  # fmt: skip
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
    return run
