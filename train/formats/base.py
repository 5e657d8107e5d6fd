"""What a format is: one file each, and one registry.

`write` and `read` go through `Plain`; `reference` does not: it computes from the files alone, as the other library does,
and is what both directions are checked against.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ...cache.layout import Hook
from ...common.errors import UsageError, did_you_mean
from ..sae import SAE
from .canonical import CanonicalSAE
from .safe_read import ForeignFolder

Reference = Callable[[Tensor], tuple[Tensor, Tensor]]  # x (B, d_in) -> f (B, d_sae) and x_hat (B, d_in), in float64


@dataclass
class ForeignSAE:
    """An SAE from elsewhere, and what its files say of it; None where they do not."""

    sae: SAE
    model: str | None = None  # on the Hub
    hook: Hook | None = None
    context: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # whatever else they say
    notes: list[str] = field(default_factory=list)


class Format:
    """One format on disk."""

    registry: ClassVar[dict[str, "Format"]] = {}
    name: ClassVar[str]
    holds: ClassVar[tuple[str, ...]]  # kinds of Plain, the one to prefer first
    files: ClassVar[tuple[str, ...]]  # the names that it can have, of which the weights' come first
    above: ClassVar[tuple[str, ...]] = ()  # those in the folder above it

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name
        Format.registry[name] = cls()

    def recognise(self, folder: ForeignFolder) -> bool:
        raise NotImplementedError

    def write(self, plain: CanonicalSAE, folder: Path, about: dict[str, Any]) -> None:
        """Its files into an empty folder; `about` has SAELens' names (`about.describe`)."""
        raise NotImplementedError

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        """DamagedError for files that contradict themselves, UsageError for what we have not."""
        raise NotImplementedError

    def reference(self, folder: ForeignFolder) -> Reference:
        """From the files alone, in the other library's own convention."""
        raise NotImplementedError


def find_format(name: str) -> Format:
    if name not in Format.registry:
        raise UsageError(f"--to {name} is no format{did_you_mean(name, [*Format.registry, 'hub'])}")
    return Format.registry[name]


def detect_format(folder: ForeignFolder) -> Format:
    """The format of a folder, by its files."""
    if folder.has("sae.json"):
        raise UsageError(f"{folder.path} is a run of ours already: sae evaluate {folder.path}")
    for candidate in Format.registry.values():
        if candidate.recognise(folder):
            return candidate
    there = ", ".join(sorted(path.name for path in folder.path.iterdir())[:8]) or "nothing"
    known = "; ".join(f"{f.name} has {f.files[0]}" for f in Format.registry.values())
    raise UsageError(f"{folder.path} holds no SAE of a known format: {known}. There is {there}.")
