"""The interface of a file format, and the registry of all formats.

`write` and `read` go through `CanonicalSAE`. `reference` does not use `CanonicalSAE`: it computes latents and
reconstructions from the files alone, with the other library's own equations. Exports and imports are both checked
against `reference`.
"""

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from torch import Tensor

from ...cache.hooks import Hook
from ...common.errors import UsageError, did_you_mean
from ..sae import SAE
from .canonical import CanonicalSAE
from .hook_names import parse_hook
from .safe_read import MAX_WIDTH, ForeignFolder

Reference = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x (B, d_in) -> latents f (B, d_sae) and reconstructions x_hat (B, d_in), in float64."""


@dataclass
class ForeignSAE:
    """An SAE read from another library's files, with the metadata in these files. None means not recorded."""

    sae: SAE
    model: str | None = None  # id on the Hub
    hook: Hook | None = None
    context: int | None = None  # length in tokens of the training contexts
    prepend_bos: bool | None = None  # whether these contexts began with the tokenizer's BOS
    bos_token: str | None = None  # the token itself; only our own exports record it
    dataset: str | None = None  # the dataset of the training text, as an id on the Hub
    metadata: dict[str, Any] = field(default_factory=dict)  # everything else in the files
    notes: list[str] = field(default_factory=list)  # shown to the user by `sae import`

    def record_text(self, recorded: Mapping[str, Any]) -> None:
        """Copy the entries that describe the training text from `recorded`, which uses SAELens' keys.

        Values of the wrong type are skipped.
        """
        if type(context := recorded.get("context_size")) is int and 0 < context < MAX_WIDTH:
            self.context = context
        if isinstance(prepend_bos := recorded.get("prepend_bos"), bool):
            self.prepend_bos = prepend_bos
        if isinstance(token := recorded.get("bos_token"), str) and token.isprintable() and len(token) <= 200:
            self.bos_token = token
        if isinstance(dataset := recorded.get("dataset_path"), str) and dataset.isprintable() and len(dataset) <= 200:
            self.dataset = dataset


@dataclass(frozen=True)
class Description:
    """What the path and config of a published SAE record about the SAE; its weights are not read.

    None: not recorded.
    """

    model: str | None = None  # id on the Hub
    hook: Hook | None = None
    d_sae: int | None = None
    l0: str | None = None  # "82", or a label such as "medium"

    def or_else(self, other: "Description") -> "Description":
        """This description, with missing values taken from another."""
        return replace(self, **{name: value for name, value in vars(other).items() if getattr(self, name) is None})


class Format:
    """One file format: `class SAELens(Format, name="saelens")` registers an instance under that name."""

    registry: ClassVar[dict[str, "Format"]] = {}
    name: ClassVar[str]
    # The activation functions that the format can store, by their names in CanonicalSAE, the preferred one first. Empty
    # if exports are not supported.
    activations: ClassVar[tuple[str, ...]] = ()
    layer_norm: ClassVar[bool] = False  # whether the format can record that tokens are layer-normalized
    files: ClassVar[tuple[str, ...]]  # file names, the weights first
    parent_files: ClassVar[tuple[str, ...]] = ()  # file names in the folder above
    config: ClassVar[str] = ""  # the small file in `files` that describes the SAE; "" if the path does

    @classmethod
    def exported(cls) -> list[str]:
        """The names of the formats that can be exported; all others can only be imported."""
        return [name for name, fmt in cls.registry.items() if fmt.activations]

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name
        Format.registry[name] = cls()

    def matches(self, folder: ForeignFolder) -> bool:
        """Whether a folder has the files of this format."""
        return folder.has(self.files[0])

    def is_weights(self, name: str) -> bool:
        """Whether a file of this name contains the weights of an SAE."""
        return name == self.files[0]

    def address(self, weights: PurePosixPath) -> PurePosixPath:
        """The path that selects an SAE: its folder, or its weights file if a folder contains several SAEs."""
        return weights.parent

    def weights_name(self, folder: ForeignFolder) -> str:
        """The name of the file in a folder that contains the SAE's weights."""
        return self.files[0]

    def select(self, folder: ForeignFolder, layer: int | None) -> ForeignFolder:
        """Choose one SAE in the folder, for formats that keep the SAEs of several layers in one folder."""
        return folder

    def refusal(self, repo: str, weights: PurePosixPath) -> str | None:
        """The kind of the files, such as "transcoder", if the path shows that they are not an SAE; otherwise None."""
        return None

    def describe_path(self, repo: str, weights: PurePosixPath) -> Description:
        """The information in the path of an SAE's weights. `repo` is the name of its repository or folder."""
        return describe_path(weights)

    def describe_config(self, config: Mapping[str, Any]) -> Description:
        """The information that an SAE's config contains. Never raises."""
        return Description()

    def write(self, canonical: CanonicalSAE, folder: Path, metadata: dict[str, Any]) -> None:
        """Write the files into an empty folder. `metadata` uses SAELens' keys (`metadata.export_metadata`)."""
        raise NotImplementedError

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        """Read the files.

        Raises DamagedError for inconsistent files, and UsageError for SAEs that have no equivalent in this package.
        """
        raise NotImplementedError

    def reference(self, folder: ForeignFolder) -> Reference:
        """A function that encodes and decodes with the files' own tensors, following the other library's equations."""
        raise NotImplementedError


def hook_or_none(*texts: object) -> Hook | None:
    """The first hook point that one of the texts names.

    None if no text names a hook point, or if the hook point is not supported.
    """
    for text in texts:
        with contextlib.suppress(UsageError):
            if isinstance(text, str) and (hook := parse_hook(text)):
                return hook
    return None


def describe_path(path: PurePosixPath) -> Description:
    """Hook point, width and L0 from the usual ways to write them: `layer_12/width_16k/average_l0_82`."""
    width = re.search(r"width_(\d{1,5}[km]?)(?![^\W_])", str(path))
    l0 = re.search(r"l0_(\d{1,6}|small|medium|big)(?![^\W_])", str(path))
    d_sae = parse_width(width[1]) if width else None
    return Description(None, hook_or_none(*reversed(path.parts)), d_sae, l0[1] if l0 else None)


def parse_width(label: str) -> int:
    """The number of latents meant by a Gemma Scope label.

    All such numbers are powers of two: 65k is 65,536, and 1m is 1,048,576.
    """
    if label.isdigit():
        return int(label)
    return 1 << round(math.log2(max(1, int(label[:-1]) * {"k": 1000, "m": 1_000_000}[label[-1]])))


def find_format(name: str) -> Format:
    """The format with this name that `sae export` can write."""
    able = Format.exported()
    if name in Format.registry and name not in able:
        raise UsageError(f"--to {name}: this format can only be imported. Give --to {', '.join(able)} or hub.")
    if name not in able:
        raise UsageError(f"--to {name} is not a known format{did_you_mean(name, [*able, 'hub'])}")
    return Format.registry[name]


def detect_format(folder: ForeignFolder) -> Format:
    """The format of a folder, detected from the files in it."""
    if folder.has("sae.json"):
        raise UsageError(
            f"{folder.path} is already a run folder of this package; nothing to import. Run: sae evaluate {folder.path}"
        )
    for candidate in Format.registry.values():
        if candidate.matches(folder):
            return candidate
    contents = ", ".join(sorted(path.name for path in folder.path.iterdir())[:8]) or "nothing"
    known = ", ".join(f"{fmt.files[0]} ({fmt.name})" for fmt in Format.registry.values())
    raise UsageError(f"{folder.path} contains no SAE of a known format. Expected one of {known}; found {contents}.")
