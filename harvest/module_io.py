"""Find and replace the activations in the arguments and the output of a transformers module.

Modules receive the activations as their first argument or as `hidden_states`, and return them alone or as the first
tensor of a tuple.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

INPUT_NAMES = ("hidden_states", "x", "input", "hidden_state")


def input_key(args: Sequence[Any], keywords: Mapping[str, Any]) -> int | str | None:
    """The position or name of the argument that contains the activations; None if no argument does."""
    if args:
        return 0 if isinstance(args[0], Tensor) else None
    names = [*INPUT_NAMES, *keywords]
    return next((name for name in names if isinstance(keywords.get(name), Tensor)), None)


def input_tensor(args: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor | None:
    """The activations that a module is called with."""
    key = input_key(args, keywords)
    if key is None:
        return None
    return args[key] if isinstance(key, int) else keywords[key]


def with_input(args: Sequence[Any], keywords: Mapping[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with other activations."""
    key = input_key(args, keywords)
    if isinstance(key, int):
        return (*args[:key], x, *args[key + 1 :]), dict(keywords)
    return tuple(args), dict(keywords) | {str(key): x}


def output_tensor(output: Any) -> Any:
    """The activations that a module returns: the output itself, or the first tensor in it. None if there is none."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def with_output(output: Any, x: Tensor) -> Any:
    """The same output with other activations."""
    if isinstance(output, Tensor):
        return x
    old = output_tensor(output)
    if isinstance(output, Mapping):
        kind: Any = type(output)
        return kind({name: x if value is old else value for name, value in output.items()})
    values = [x if value is old else value for value in output]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
