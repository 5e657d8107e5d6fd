"""What a harvest into an object store costs: requests to the store, and room in the working folder."""

import math
from pathlib import Path
from typing import NamedTuple

from ..cache.largest_rows import MOST
from ..cache.layout import Layout
from ..common.errors import UnavailableError
from ..common.files import free_space
from ..common.formatting import format_bytes

RECORDS, RECORD_READS = 21, 16  # tokens/, the records beside it, and testing conditional writes
ARRAY_RECORDS = 3  # zarr.json of an array, its row_norm and its moments
TOKEN_BYTES = 5  # bytes in tokens/ for each token: its id, and room for the padding of contexts
LISTED = 1000  # objects per response to a listing
LARGEST_READS = 3
SIDE_BYTES = 10  # per row: row_norm, row_ctx and row_pos, which the statistics of an array read


class Requests(NamedTuple):
    """The number of requests of a single process, if the store answers each of them."""

    writes: int
    reads: int


def harvest_requests(layout: Layout, arrays: int, windows: int) -> Requests:
    """The number of requests for harvesting this many windows of this many arrays, and for sealing the cache."""
    chunks = -(-layout.window_rows // layout.chunk_rows)
    chunks_of_window = 2 + arrays * (chunks + 3)  # row_ctx and row_pos; of an array row_norm, moments and largest rows
    writes = windows * (chunks_of_window + arrays) + ARRAY_RECORDS * arrays + RECORDS
    commits = list_requests(layout, arrays) + 2 * arrays * windows  # asked for before computing and before writing
    return Requests(writes, commits + seal_requests(layout, arrays) + ARRAY_RECORDS * arrays + RECORD_READS)


def list_requests(layout: Layout, arrays: int) -> int:
    """The number of requests that list the commits of all windows."""
    return -(-layout.n_windows * arrays // LISTED)


def seal_requests(layout: Layout, arrays: int) -> int:
    """The requests for sealing. Sealing reads row_ctx and row_pos and, for each window of an array, the commit, the
    norms, the moments and the largest rows (these three times if there are outlier rows).
    """
    return list_requests(layout, arrays) + layout.n_windows * (2 + arrays * (3 + LARGEST_READS))


def working_bytes(layout: Layout, bytes_per_token: int, processes: int) -> int:
    """The maximum size of the working folder in bytes: the tokens, plus either one window and its largest rows for each
    process on this machine, or what the statistics of an array read.
    """
    windows = processes * min(layout.window_rows, layout.rows) * bytes_per_token * (1 + MOST)
    return math.ceil(TOKEN_BYTES * layout.rows + max(windows, SIDE_BYTES * layout.rows))


def check_working_folder(folder: Path, needed: int) -> None:
    """Raise UnavailableError if the disk of the working folder does not have this many bytes free."""
    if 1.02 * needed > (free := free_space(folder)):
        raise UnavailableError(
            f"The working folder of the harvest, {folder}, needs up to {format_bytes(1.02 * needed)} and has "
            f"{format_bytes(free)} free. Set SAE_HOME to a folder on a larger disk."
        )
