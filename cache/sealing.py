"""The records that a worker reads before it completes a cache, and the conclusions from them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SealState:
    """The records of a cache, read in this order: zarr.json, manifest.json, the commits of the arrays `names`.

    If another worker replaces a commit after it was read here, the manifest will differ from `seen`, because that
    worker checks the manifest after writing the commit.
    """

    names: set[str]  # arrays to be completed
    complete: set[str]  # the arrays that zarr.json lists
    seen: bytes | None  # manifest.json; None if it is missing
    manifest: Mapping[str, Any] | None
    commits: Sequence[Mapping[str, Any]]  # without commits whose files are lost

    def has_every(self, names: Collection[str], n_windows: int) -> bool:
        """Whether every window of these arrays is committed."""
        found = {(commit["window"], commit["array"]) for commit in self.commits}
        return all((window, name) in found for window in range(n_windows) for name in names)

    def covers(self, names: Collection[str], max_norm: float | None) -> bool:
        """Whether the manifest and zarr.json include these arrays, and their outlier rows were determined with this
        `max_norm`.
        """
        statistics = self.manifest["statistics"] if self.manifest else {}
        return all(
            name in self.complete and name in statistics and statistics[name]["max_norm"] == max_norm for name in names
        )

    @property
    def is_listed(self) -> bool:
        """Whether the manifest lists the files of the commits."""
        files = self.manifest["files"] if self.manifest else {}
        return all(files.get(file) == record for one in self.commits for file, record in one["files"].items())
