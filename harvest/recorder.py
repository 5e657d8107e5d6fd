"""Record the inputs and outputs of a model's modules, and the findings of a block's probe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from .module_io import input_tensor, output_tensor, with_input, with_output


class Site(NamedTuple):
    """A place in a block, or outside the blocks: the input or the output of a module."""

    path: str  # of the module, in the block or in the trunk; "" is the block itself
    is_input: bool
    width: int
    is_flat: bool = False  # (N S, width), as in mixtures of experts, instead of (N, S, width)


class Call(NamedTuple):
    """One call of a module: its arguments, and the activations in its arguments and output."""

    args: tuple[Any, ...]
    keywords: dict[str, Any]
    x: Tensor | None
    y: Tensor | None


# The shapes of the input and the output activations of one call.
Shapes = tuple[tuple[int, ...] | None, tuple[int, ...] | None]


def shapes_of(calls: list[Call]) -> list[Shapes]:
    """The shapes of the input and output activations of each call."""
    return [(None if c.x is None else tuple(c.x.shape), None if c.y is None else tuple(c.y.shape)) for c in calls]


@dataclass
class BlockSites:
    """The findings of a block's probe: its sites, why other sites are refused, and all calls of its modules."""

    sites: dict[str, Site] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[Shapes]] = field(default_factory=dict)  # module path -> shapes of each call
    shape: tuple[int, int] = (0, 0)  # (N, S) of the token ids
    is_parallel: bool = False


class Recorder:
    """A context manager that records the calls of modules. `changes` replaces outputs: path -> new activations."""

    def __init__(self, root: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> None:
        self.root, self.changes = root, changes or {}
        self.calls: dict[str, list[Call]] = {}  # in the order in which they end

    def __enter__(self) -> "Recorder":
        self.open: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = []
        self.handles = []
        for path, module in self.root.named_modules():
            self.handles.append(module.register_forward_pre_hook(self.begin, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.end_of(path), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def begin(self, _module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = input_tensor(args, keywords)
        if x is not None:
            x = x.clone()  # a module may change its input in place
            args, keywords = with_input(args, keywords, x)
        self.open.append((args, keywords, x))

    def end_of(self, path: str) -> Callable[..., Any]:
        def end(_module: nn.Module, _args: Any, _keywords: Any, output: Any) -> Any:
            args, keywords, x = self.open.pop()
            y = output_tensor(output)
            if y is not None and path in self.changes:
                y = self.changes[path](y)
                output = with_output(output, y)
            self.calls.setdefault(path, []).append(Call(args, keywords, x, None if y is None else y.clone()))
            return output

        return end
