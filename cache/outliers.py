"""Outlier rows: rows whose L2 norm exceeds a multiple of the median norm, such as the rows of attention sinks.

A few outlier rows can hold most of the variance of an array. All outlier rows stay in the cache, but are left out of
statistics, training and evaluation. The limit is an absolute norm for each array. `sae.json` records this limit too, so
that an SAE is evaluated on the same kind of rows as it was trained on.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.cache_schemas import REPAIR_HINT
from ..common.errors import DamagedError, UsageError
from .chunks import FileRecords, RowReader, RowsOfChunk, read_array_spec, read_chunk, row_reader
from .layout import Layout

MAX_NORM = 10.0  # multiple of the median norm
TOP_SHARE = 0.001  # of the rows, those with the largest norms; what share of the variance they hold is reported
WARNING_SHARE = 0.1  # of the variance; if these rows hold more, a warning is given
LISTED = 3  # positions and tokens
NORM_TOLERANCE = 1e-6  # relative: norms are stored in float32


def check_max_norm(max_norm: float | None) -> None:
    """Raise UsageError unless `max_norm`, a multiple of the median norm, is either None or above 1."""
    if max_norm is not None and not max_norm > 1:
        raise UsageError(
            f"--max-norm {max_norm:g} would mask at least half of the rows. Give a multiple of the median norm that "
            "is above 1, such as 10, or `none` to mask no rows."
        )


def norm_limit(norms: np.ndarray, max_norm: float | None) -> float | None:
    """The norm above which a row is an outlier: `max_norm` x the median of `norms`; None if `max_norm` is None."""
    return None if max_norm is None else max_norm * float(np.median(norms))


def rows_above(norms: np.ndarray, limit: float | None) -> np.ndarray:
    """The indices of the norms over the limit, ascending; empty without a limit."""
    return np.flatnonzero(norms > limit) if limit is not None else np.array([], np.int64)


def outlier_mask(x: torch.Tensor, limit: float | None) -> torch.Tensor:
    """True for the outlier rows of activations: (..., d) -> (...), bool. All False without a limit.

    The norm is taken in float32 whatever the dtype, so that every reader of the same activations masks the same rows.
    """
    if limit is None:
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) > limit


def top_rows(norms: np.ndarray) -> np.ndarray:
    """The indices, in ascending order, of the rows with the largest norms; their number is TOP_SHARE of all rows,
    rounded up.
    """
    count = -int(-len(norms) * TOP_SHARE // 1)
    return np.sort(np.argpartition(norms, len(norms) - count)[len(norms) - count :]) if count else np.array([], int)


def largest_rows(
    folder: Path, layout: Layout, norms: np.ndarray, files: FileRecords,
    token_text: Callable[[int], str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Describe the rows with the largest norms: those above MAX_NORM x the median norm or, if there are none, the top
    0.1 %. `norms` (rows,) are the norms of all rows.

    Returns the largest `norm`, the number of `rows`, and their most frequent `positions` and `tokens`, each as
    [position, number of rows] or [id, number of rows, text].
    """
    unusual = rows_above(norms, norm_limit(norms, MAX_NORM))
    rows = unusual if len(unusual) else top_rows(norms)
    positions, ids = locate_rows(folder, layout, rows, files)
    tokens = Counter(ids.tolist()).most_common(LISTED)
    return {
        "norm": float(norms.max()),
        "rows": len(rows),
        "positions": [list(one) for one in Counter(positions.tolist()).most_common(LISTED)],
        "tokens": [[token, count, token_text(token) if token_text else None] for token, count in tokens],
    }


def share_of_top_rows(
    folder: Path, layout: Layout, name: str, norms: np.ndarray, kept: np.ndarray, mean: np.ndarray, variance: float,
    files: FileRecords, read: RowReader | None = None,
) -> float:  # fmt: skip
    """The share of the `kept` rows' variance that comes from the 0.1 % of them with the largest norms.

    `mean` (d_in,) and the elementwise `variance` are computed over the `kept` rows.
    """
    top = kept[top_rows(norms[kept])]
    total = variance * len(mean) * len(kept)
    rows_of_chunks = iterate_rows(folder, layout, name, top, norms[top], files, read)
    held = sum(float(np.square(values - mean).sum()) for values in rows_of_chunks)
    return held / total if total else 0.0


def describe_largest(statistics: dict[str, Any]) -> str:
    """One line about the rows with the largest norms in an array; "" for a cache written by an older version."""
    if (largest := statistics.get("largest")) is None:
        return ""
    masked = f" ({largest['share_unmasked']:.1%} without the masked rows)" if statistics["marked"] else ""
    positions = ", ".join(f"{rows:,} at {position}" for position, rows in largest["positions"])
    tokens = ", ".join(f"{rows:,} of {repr(text) if text else token}" for token, rows, text in largest["tokens"])
    rows = "the largest row" if largest["rows"] == 1 else f"the {largest['rows']:,} largest rows"
    return (
        f"largest norm {largest['norm']:.4g}; the top 0.1% of rows hold {largest['share']:.1%} of the variance{masked}"
        f"; {rows} by position: {positions}; by token: {tokens}"
    )


def outlier_warning(name: str, statistics: dict[str, Any]) -> str | None:
    """A warning if a few unmasked rows account for much of an array's variance; it names the option that masks them."""
    largest = statistics.get("largest")
    if largest is None or largest["share_unmasked"] <= WARNING_SHARE:
        return None
    max_norm = statistics["max_norm"]
    advice = f"--max-norm {MAX_NORM:g}" if max_norm is None else f"a --max-norm below {max_norm:g}"
    return (
        f"{name}: 0.1% of the unmasked rows hold {largest['share_unmasked']:.0%} of the variance, so a few rows decide "
        f"what is trained and measured. To mask them, run the same `sae harvest` with {advice}; activations are not "
        "computed again."
    )


def iterate_rows(
    folder: Path, layout: Layout, name: str, rows: np.ndarray, norms: np.ndarray, files: FileRecords,
    read: RowReader | None = None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Yield the given rows (ascending) of an array in float64, chunk by chunk. Reads only the chunks with these rows.

    `norms` are the L2 norms of the rows, as recorded in row_norm. Verifying a checksum would require reading the whole
    chunk, so the norm of each row is compared instead. Raises DamagedError if a norm differs. `read` reads the rows; by
    default, from the files in the folder.
    """
    array = read_array_spec(folder, name, layout)
    chunk_of_row = rows // layout.chunk_rows
    chunks = []
    for chunk in np.unique(chunk_of_row).tolist():
        inside = rows[chunk_of_row == chunk] - chunk * layout.chunk_rows
        chunks.append(RowsOfChunk(chunk, inside, files[array.chunk_file(chunk)]["bytes"]))
    for one, bits in zip(chunks, (read or row_reader(folder))(array, chunks), strict=True):
        values = torch.from_numpy(bits).view(torch.bfloat16).double().numpy()
        recorded = norms[chunk_of_row == one.chunk]
        if not np.allclose(np.linalg.norm(values, axis=1), recorded, rtol=NORM_TOLERANCE, atol=0):
            raise DamagedError(
                f"{folder / array.chunk_file(one.chunk)} has rows whose norms differ from {name}.row_norm: a bit was "
                f"flipped, or the file comes from another window or another cache. {REPAIR_HINT}"
            )
        yield values


def locate_rows(folder: Path, layout: Layout, rows: np.ndarray, files: FileRecords) -> tuple[np.ndarray, np.ndarray]:
    """For each of the given rows, its position in its context and its token id; these are the same for all arrays of a
    cache.
    """
    row_ctx, row_pos = (origin_of_rows(folder, layout, name, rows, files) for name in ("row_ctx", "row_pos"))
    ids = read_chunk(folder, read_array_spec(folder, "tokens/ids"), 0, files)
    return row_pos, ids[row_ctx, row_pos]


def origin_of_rows(folder: Path, layout: Layout, name: str, rows: np.ndarray, files: FileRecords) -> np.ndarray:
    """The values of row_ctx or row_pos at the given rows. Reads only the windows with these rows."""
    array, window_of_row = read_array_spec(folder, name), rows // layout.window_rows
    values = np.empty(len(rows), array.numpy_dtype)
    for window in np.unique(window_of_row).tolist():
        inside = window_of_row == window
        values[inside] = read_chunk(folder, array, window, files)[rows[inside] - window * layout.window_rows]
    return values
