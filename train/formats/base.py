"""The interface of a file format, and the registry of all formats.

`write` and `read` go through `CanonicalSAE`. `reference` does not: it computes latents and reconstructions from the
files alone, following the other library's own equations. Exports and imports are both checked against it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ...cache.layout import Hook
from ...common.errors import UsageError, did_you_mean
from ..sae import SAE
from .canonical import CanonicalSAE
from .safe_read import MAX_WIDTH, ForeignFolder

Reference = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x (B, d_in) -> latents f (B, d_sae) and reconstructions x_hat (B, d_in), in float64."""


@dataclass
class ForeignSAE:
    """An SAE read from another library's files, with what the files record about it. None: not recorded."""

    sae: SAE
    model: str | None = None  # id on the Hub
    hook: Hook | None = None
    context: int | None = None  # length in tokens of the contexts that it was trained on
    prepend_bos: bool | None = None  # whether these contexts began with the tokenizer's BOS
    dataset: str | None = None  # id on the Hub of the text that it was trained on
    metadata: dict[str, Any] = field(default_factory=dict)  # everything else in the files
    notes: list[str] = field(default_factory=list)  # for the user, printed by `sae import`

    def record_text(self, recorded: Mapping[str, Any]) -> None:
        """Take over what files record about the text, under SAELens' keys. Values of another type are left out."""
        if type(context := recorded.get("context_size")) is int and 0 < context < MAX_WIDTH:
            self.context = context
        if isinstance(prepend_bos := recorded.get("prepend_bos"), bool):
            self.prepend_bos = prepend_bos
        if isinstance(dataset := recorded.get("dataset_path"), str) and dataset.isprintable() and len(dataset) <= 200:
            self.dataset = dataset


class Format:
    """One file format: `class SAELens(Format, name="saelens")` registers an instance under that name."""

    registry: ClassVar[dict[str, "Format"]] = {}
    name: ClassVar[str]
    activations: ClassVar[tuple[str, ...]]  # of CanonicalSAE, that the format can store; the preferred one first
    files: ClassVar[tuple[str, ...]]  # file names, the weights first
    parent_files: ClassVar[tuple[str, ...]] = ()  # file names in the folder above

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name
        Format.registry[name] = cls()

    def matches(self, folder: ForeignFolder) -> bool:
        """Whether a folder has the files of this format."""
        raise NotImplementedError

    def write(self, canonical: CanonicalSAE, folder: Path, metadata: dict[str, Any]) -> None:
        """Write the files into an empty folder. `metadata` uses SAELens' keys (`metadata.export_metadata`)."""
        raise NotImplementedError

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        """Read the files.

        Raises DamagedError for files that contradict themselves, UsageError for SAEs that this package has no
        equivalent for.
        """
        raise NotImplementedError

    def reference(self, folder: ForeignFolder) -> Reference:
        """A function that encodes and decodes with the files' own tensors, in the other library's convention."""
        raise NotImplementedError


def find_format(name: str) -> Format:
    if name not in Format.registry:
        raise UsageError(f"--to {name} is not a known format{did_you_mean(name, [*Format.registry, 'hub'])}")
    return Format.registry[name]


def detect_format(folder: ForeignFolder) -> Format:
    """The format of a folder, detected by its files."""
    if folder.has("sae.json"):
        raise UsageError(
            f"{folder.path} is already a run folder of this package; nothing to import. Run: sae evaluate {folder.path}"
        )
    for candidate in Format.registry.values():
        if candidate.matches(folder):
            return candidate
    contents = ", ".join(sorted(path.name for path in folder.path.iterdir())[:8]) or "nothing"
    known = ", ".join(f"{fmt.files[0]} ({fmt.name})" for fmt in Format.registry.values())
    raise UsageError(f"No SAE of a known format in {folder.path}. Expected one of {known}; found {contents}.")
