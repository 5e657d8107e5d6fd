"""The cost of a harvest into an object store: requests to the store, and space in the working folder."""

import math
from pathlib import Path
from typing import NamedTuple

from ..cache.largest_rows import MOST
from ..cache.layout import Layout
from ..common.errors import UnavailableError
from ..common.files import free_space
from ..common.formatting import format_bytes

RECORDS, RECORD_READS = 21, 16  # tokens/, the records next to it, and a test of conditional writes
ARRAY_RECORDS = 3  # zarr.json of an array, its row_norm and its moments
TOKEN_BYTES = 5  # bytes in tokens/ for each token: its id, and room for the padding of contexts
LISTED = 1000  # objects per response to a list request
LARGEST_READS = 3
SIDE_BYTES = 10  # per row: row_norm, row_ctx and row_pos, from which statistics are computed


class Requests(NamedTuple):
    """The number of requests that a single process sends, if none has to be repeated."""

    writes: int
    reads: int


def harvest_requests(layout: Layout, arrays: int, windows: int) -> Requests:
    """The number of requests for harvesting this many windows of this many arrays, and for sealing the cache."""
    chunks = -(-layout.window_rows // layout.chunk_rows)
    # row_ctx and row_pos; for each array its chunks, row_norm, moments and largest rows
    chunks_of_window = 2 + arrays * (chunks + 3)
    writes = windows * (chunks_of_window + arrays) + ARRAY_RECORDS * arrays + RECORDS
    commits = list_requests(layout, arrays) + 2 * arrays * windows  # each read before computing and before writing
    return Requests(writes, commits + seal_requests(layout, arrays) + ARRAY_RECORDS * arrays + RECORD_READS)


def list_requests(layout: Layout, arrays: int) -> int:
    """The number of requests that list the commits of all windows."""
    return -(-layout.n_windows * arrays // LISTED)


def seal_requests(layout: Layout, arrays: int) -> int:
    """The number of requests that sealing sends.

    For each window, sealing reads row_ctx and row_pos and, for each array, the commit, the norms, the moments and the
    largest rows. Sealing reads the largest rows three times if there are outlier rows.
    """
    return list_requests(layout, arrays) + layout.n_windows * (2 + arrays * (3 + LARGEST_READS))


def working_bytes(layout: Layout, bytes_per_token: int, processes: int) -> int:
    """The maximum size of the working folder in bytes.

    Besides the tokens, the folder contains either the windows that processes on this machine are computing (one each,
    with its largest rows), or the data from which the statistics of an array are computed.
    """
    windows = processes * min(layout.window_rows, layout.rows) * bytes_per_token * (1 + MOST)
    return math.ceil(TOKEN_BYTES * layout.rows + max(windows, SIDE_BYTES * layout.rows))


def check_working_folder(folder: Path, needed: int) -> None:
    """Raise UnavailableError if the disk of the working folder does not have this many bytes free."""
    if 1.02 * needed > (free := free_space(folder)):
        raise UnavailableError(
            f"The working folder of the harvest, {folder}, needs up to {format_bytes(1.02 * needed)} but has "
            f"{format_bytes(free)} free. Set SAE_HOME to a folder on a larger disk."
        )
