"""What a harvest into an object store costs: requests to the store, and room in the working folder."""

from pathlib import Path
from typing import NamedTuple

from ..cache.layout import Layout
from ..cache.outliers import TOP_SHARE
from ..common.errors import UnavailableError
from ..common.files import free_space
from ..common.formatting import format_bytes

RECORDS, RECORD_READS = 16, 38  # tokens/ and the records beside it: each is written once, and looked at more often
ARRAY_RECORDS = 3  # zarr.json of an array, its row_norm and its moments
TOKEN_BYTES = 5  # of tokens/ for each token: its id, and room for what contexts do not fill
SIDE_BYTES = 10  # of row_norm, row_ctx and row_pos for each row, which the statistics of an array read


class Requests(NamedTuple):
    """Requests to a store that answers each of them; a row that the statistics read alone is one."""

    writes: int
    reads: int


def harvest_requests(layout: Layout, arrays: int, windows: int) -> Requests:
    """The requests for harvesting so many windows of so many arrays, and for sealing the cache."""
    chunks = -(-layout.window_rows // layout.chunk_rows)
    chunks_of_window = 2 + arrays * (chunks + 2)  # row_ctx and row_pos; the others of an array are row_norm and moments
    writes = windows * (chunks_of_window + arrays) + ARRAY_RECORDS * arrays + RECORDS
    commits = arrays * (layout.n_windows + 2 * windows)  # asked for at the start, before computing and before writing
    sides = 2 * layout.n_windows + arrays * 2 * layout.n_windows
    return Requests(writes, commits + sides + arrays * int(TOP_SHARE * layout.rows) + RECORD_READS)


def working_bytes(layout: Layout, bytes_per_token: int, processes: int) -> int:
    """The most bytes that the working folder holds: the tokens, with a window of each process on this machine, or with
    what the statistics of an array read.
    """
    windows = processes * min(layout.window_rows, layout.rows) * bytes_per_token
    return TOKEN_BYTES * layout.rows + max(windows, SIDE_BYTES * layout.rows)


def check_working_folder(folder: Path, needed: int) -> None:
    """Raise UnavailableError if the disk of the working folder has no room for so many bytes."""
    if 1.02 * needed > (free := free_space(folder)):
        raise UnavailableError(
            f"The working folder of the harvest, {folder}, needs up to {format_bytes(1.02 * needed)} and has "
            f"{format_bytes(free)} free. Set SAE_HOME to a folder on a larger disk."
        )
