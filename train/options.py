"""How a recipe declares its options: as arguments of its build function, or as the fields of a dataclass.

    def relu(config: RunConfig, l1: float = 0.04) -> Variant:
        \"\"\"ReLU latents and an L1 penalty.

        Args:
            l1: Strength of the penalty.
        \"\"\"

    @dataclass(frozen=True)
    class CompetitionOptions(RecipeOptions):
        k: int = 100
        \"\"\"Active latents per token.\"\"\"

    def competition(config: RunConfig, options: CompetitionOptions) -> Variant: ...

In both forms, an option has a name, a type, a default and a description that `sae variants NAME` prints.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common.errors import UsageError

if TYPE_CHECKING:
    from .variant import RunConfig

DeclaredBy = Callable[..., Any] | type


@dataclass(frozen=True)
class RecipeOptions:
    """Base class for the options of a recipe. The string below a field documents it."""

    def validation_errors(self, config: "RunConfig") -> Iterator[str]:
        """One sentence for each option that cannot work in this run."""
        yield from ()

    def validate(self, config: "RunConfig") -> None:
        """Raise UsageError with one line for each option that cannot work in this run."""
        if errors := list(self.validation_errors(config)):
            raise UsageError("\n".join(errors))


class Option(NamedTuple):
    type: Any
    default: Any


def options_class(build: Callable[..., Any]) -> type[RecipeOptions] | None:
    """The dataclass that a build function takes, or None if its options are plain arguments."""
    kinds = [p.annotation for p in inspect.signature(build).parameters.values()][1:]
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], RecipeOptions) else None


def read_options(declared_by: DeclaredBy) -> dict[str, Option]:
    """The options in order, read from a dataclass or from a function's arguments after the first."""
    if isinstance(declared_by, type):
        return {f.name: Option(f.type, f.default) for f in fields(declared_by)}
    parameters = list(inspect.signature(declared_by).parameters.values())[1:]
    return {p.name: Option(p.annotation, p.default) for p in parameters}


def read_option_docs(declared_by: DeclaredBy) -> dict[str, str]:
    """The description of each documented option."""
    return field_docs(declared_by) if isinstance(declared_by, type) else argument_docs(declared_by)


def field_docs(cls: type) -> dict[str, str]:
    """For a class and its bases: the string below each annotated field, read from the source. Empty without it."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):
            continue
        for field, text in pairwise(definition.body if isinstance(definition, ast.ClassDef) else ()):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                docs[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return docs


def argument_docs(function: Callable[..., Any]) -> dict[str, str]:
    """The entries in the `Args:` section of a docstring."""
    docs: dict[str, str] = {}
    _, _, section = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    name = ""
    for line in section.splitlines():
        if line.strip() and not line.startswith("    "):
            break  # the next section
        if entry := re.fullmatch(r" {4}(\w+): (.*)", line):
            name = entry[1]
            docs[name] = entry[2]
        elif name and line.strip():
            docs[name] += " " + line.strip()
    return docs
