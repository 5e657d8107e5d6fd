"""Statistics of the rows of each array, and the manifest that completes a cache."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..common.cache_schemas import TOKENS_RECORD
from ..common.formatting import format_count
from .chunks import FileRecords, RowReader, read_array
from .consistency import activations_of
from .layout import FORMAT, Layout
from .outliers import iterate_rows, largest_rows, norm_limit, rows_above, share_of_top_rows
from .place import FolderPlace
from .sealing import SealState

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
OUTLIER_DIMENSION_RATIO = 8  # threshold: a dimension's root mean square / the median over all dimensions
MAX_OUTLIER_DIMENSIONS = 32  # at most so many are listed in the statistics


def build_manifest(
    place: FolderPlace, fingerprint: str, layout: Layout, state: SealState, max_norm: float | None,
    token_text: Callable[[int], str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The content of manifest.json: the existing entries for other arrays, and the files and statistics of the arrays
    whose windows are all committed. Rows whose norm is over `max_norm` x the median norm are outliers.

    `token_text` returns the text of a token id, for the lists of the largest rows.
    """
    windows = Counter(commit["array"] for commit in state.commits)
    new = sorted(array for array, committed in windows.items() if committed == layout.n_windows)
    kept = sorted(set(state.manifest["complete"]) - state.names) if state.manifest else []
    files: dict[str, Any] = dict(TOKENS_RECORD.read(place.folder / "tokens" / "commit.json")["files"])
    for commit in state.commits:
        if commit["array"] in new:
            files |= commit["files"]
    origins = {file: one for file, one in files.items() if file.startswith(("row_ctx/", "row_pos/"))}
    place.bring(origins)
    statistics = {name: array_statistics(place, layout, name, files, max_norm, token_text) for name in new}
    place.drop(origins)
    if kept and state.manifest:
        allowed = {*kept, "row_ctx", "row_pos"}
        theirs = state.manifest["files"].items()
        files = {file: one for file, one in theirs if activations_of(file.rsplit("/", 1)[0]) in allowed} | files
        statistics |= {name: state.manifest["statistics"][name] for name in kept}
    return {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "rows": layout.rows,
        "complete": sorted(statistics),
        "statistics": dict(sorted(statistics.items())),
        "files": dict(sorted(files.items())),
    }


def array_statistics(
    place: FolderPlace, layout: Layout, name: str, files: dict[str, Any], max_norm: float | None = None,
    token_text: Callable[[int], str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The statistics of an activation array in the form in which the manifest records them, computed from float64 sums.

    Rows whose norm is over `norm_limit` = `max_norm` x the median norm are outliers; "marked" is their number. Outlier
    rows are kept in the array but masked out of training and of all other statistics. Only `largest` covers all rows:
    the rows with the largest norms (see `largest_rows`), the elementwise variance of all rows, and the shares of the
    variance held by the top 0.1 % of all rows and of the unmasked rows.

    `variance` is the mean over dimensions of each dimension's variance (elementwise); `mean_square_norm` is E|x|^2;
    `norm_of_mean` is |E x|. `outlier_dimensions` are the dimensions whose root mean square is over 8x the median.
    """
    folder = place.folder
    sides = (f"{name}.row_norm/", f"{name}.moments/")
    side_files = {file: record for file, record in files.items() if file.startswith(sides)}
    place.bring(side_files)
    all_norms = read_array(folder, f"{name}.row_norm", files, layout)
    limit = norm_limit(all_norms, max_norm)
    outliers, every_row = rows_above(all_norms, limit), np.arange(len(all_norms))
    kept = np.delete(every_row, outliers)
    norms = all_norms[kept]

    def moments_and_share(rows: np.ndarray, masked: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        read = place.row_reader(layout, files)
        mean, mean_square = mean_and_mean_square(folder, layout, name, masked, all_norms, files, read)
        variance = float((mean_square - mean**2).mean())
        return mean, mean_square, share_of_top_rows(folder, layout, name, all_norms, rows, mean, variance, files, read)

    mean, mean_square, share_unmasked = moments_and_share(kept, outliers)
    full_mean, full_mean_square, share = (
        moments_and_share(every_row, outliers[:0]) if len(outliers) else (mean, mean_square, share_unmasked)
    )
    sd = np.sqrt(np.maximum(mean_square - mean**2, 0))
    rms = np.sqrt(mean_square)
    outlier_dimensions = np.flatnonzero(rms > OUTLIER_DIMENSION_RATIO * np.median(rms))[:MAX_OUTLIER_DIMENSIONS]
    largest = largest_rows(folder, layout, all_norms, files, token_text)
    place.drop(side_files)
    return {
        "count": len(norms),
        "marked": len(outliers),
        "max_norm": max_norm,
        "norm_limit": limit,
        "variance": float((mean_square - mean**2).mean()),
        "mean_square_norm": float(mean_square.sum()),
        "mean_norm": float(norms.mean(dtype=np.float64)),
        "norm_of_mean": float(np.sqrt((mean**2).sum())),
        "norm_quantiles": {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(norms, QUANTILES), strict=True)},
        "outlier_dimensions": {str(int(d)): {"mean": float(mean[d]), "sd": float(sd[d])} for d in outlier_dimensions},
        "largest": largest
        | {
            "variance": float((full_mean_square - full_mean**2).mean()),
            "share": share,
            "share_unmasked": share_unmasked,
        },
    }


def describe_statistics(statistics: dict[str, Any]) -> str:
    """The statistics of an array in one line."""
    quantiles, max_norm = statistics["norm_quantiles"], statistics["max_norm"]
    masked = format_count(statistics["marked"], "row")
    outliers = f", {masked} over {max_norm:g}x the median norm masked" if max_norm else ""
    return (
        f"mean norm {statistics['mean_norm']:.4g} "
        f"(1% {quantiles['0.01']:.4g}, median {quantiles['0.5']:.4g}, 99.9% {quantiles['0.999']:.4g}), "
        f"elementwise variance {statistics['variance']:.4g}, "
        f"{format_count(len(statistics['outlier_dimensions']), 'outlier dimension')}{outliers}"
    )


def mean_and_mean_square(
    folder: Path, layout: Layout, name: str, outliers: np.ndarray, norms: np.ndarray, files: FileRecords,
    read: RowReader | None = None,
) -> np.ndarray:  # fmt: skip
    """The elementwise mean and mean square (2, d_in) float64 of all rows except the outliers.

    Takes the sums of the windows and subtracts the outlier rows, so only chunks with outlier rows are read. `norms` are
    the norms of all rows. `read` is passed to `iterate_rows`.
    """
    sums = read_array(folder, f"{name}.moments", files, layout).sum(0)
    for values in iterate_rows(folder, layout, name, outliers, norms[outliers], files, read):
        sums -= np.stack([values.sum(0), np.square(values).sum(0)])
    return sums / (layout.rows - len(outliers))
