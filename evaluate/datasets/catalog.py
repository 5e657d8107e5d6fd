"""The data that `sae data list` shows and `sae data get` fetches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import UsageError, did_you_mean
from . import sae_probes


@dataclass(frozen=True)
class ExternalData:
    """Data that are published by another project and read by a metric.

    `size` is the size of the stored files in bytes. `get` fetches the data (from a file if one is given) and returns
    False if they were already there. `data_sets` returns the headings and lines of a table that lists the data sets.
    """

    name: str
    what: str
    source: str
    license: str
    size: int
    command: str
    next_command: str
    folder: Callable[[], Path]
    is_present: Callable[[], bool]
    get: Callable[[Path | None], bool]
    data_sets: Callable[[], tuple[Sequence[str], Sequence[Sequence[str]]]]


def sae_probes_table() -> tuple[list[str], list[list[str]]]:
    heads = ["data set", "probed", "texts", "source"]
    return heads, [[one.name, one.probed, one.texts, one.link] for one in sae_probes.sources()]


CATALOG = {
    "sae-probes": ExternalData(
        "sae-probes",
        "113 binary data sets for the metric sae_probes",
        sae_probes.SOURCE,
        sae_probes.LICENSE,
        sae_probes.UNPACKED_BYTES,
        f"`{sae_probes.COMMAND}`",
        "sae evaluate RUN --suite sae_probes",
        sae_probes.data_folder,
        sae_probes.is_present,
        sae_probes.get_data,
        sae_probes_table,
    )
}


def find(name: str) -> ExternalData:
    """The data with this name. Raises UsageError for an unknown name."""
    if name not in CATALOG:
        raise UsageError(f"there are no data {name}{did_you_mean(name, CATALOG)}")
    return CATALOG[name]
