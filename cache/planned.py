"""A cache that has not been harvested yet, with the properties that a training plan needs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import UsageError
from .hooks import Hook
from .layout import ArraySpec, Layout, fingerprint_of
from .models import model_label


class PlannedCache:
    """The folder, identity, layout and widths of a cache that a `HarvestPlan` will write. The planned cache has no rows
    to read.

    The planned cache provides the parts of a `Cache` that `train.plan.plan_training` uses, so training can be checked
    and its cost estimated before the harvest. Nothing that depends on the rows is available: there are no statistics,
    and `array_digest` raises. `rows` is an upper bound if the harvest takes "up to" a number of tokens.

    Args:
        folder: where the harvest will write.
        identity: everything that determines the bytes of the cache, as in its zarr.json.
        layout: rows, windows and chunks.
        widths: array name -> width of its rows, for every array that the harvest will write.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], layout: Layout, widths: Mapping[str, int]) -> None:
        self.folder, self.identity, self.layout, self.widths = folder, identity, layout, dict(widths)
        self.fingerprint = fingerprint_of(identity)

    def __repr__(self) -> str:
        return (
            f"PlannedCache({str(self.folder)!r}: {self.model}, {', '.join(map(str, self.hooks))}, {self.rows:,} rows)"
        )

    @property
    def model(self) -> str:
        """The display name of the model."""
        return model_label(self.identity["model"])

    @property
    def rows(self) -> int:
        return self.layout.rows

    @property
    def chunk_rows(self) -> list[int]:
        """The number of rows in each chunk."""
        size = self.layout.chunk_rows
        return [min(size, self.rows - start) for start in range(0, self.rows, size)]

    @property
    def hooks(self) -> list[Hook]:
        return sorted(map(Hook.from_array, self.widths))

    def require_array(self, layer: int, site: str = "resid_post") -> str:
        """The array of a layer's site, such as `layer_12`. Raises UsageError if the harvest will not write it."""
        hook = Hook(layer, site)
        if hook.array not in self.widths:
            planned = ", ".join(map(str, self.hooks))
            raise UsageError(
                f"The harvest planned for {self.folder} covers {planned}, not {hook}. Add `{hook.cli_flags}`."
            )
        return hook.array

    def array(self, name: str) -> ArraySpec:
        """The shape and dtype of an array."""
        return self.layout.activation_arrays(name, self.widths[name])[0]

    def array_digest(self, name: str) -> str:
        """Raise UsageError: the digest of an array depends on its rows."""
        raise UsageError(f"{self.folder} has not been harvested yet, so {name} has no digest. Run the harvest first.")
