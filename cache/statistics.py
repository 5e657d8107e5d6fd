"""The seal of a cache: the union of its commits, and what training and a reader want to know of its rows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.files import read_json
from .chunks import read_array, read_whole, take
from .layout import FORMAT, Layout

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
OUTLIER = 8  # times the median root mean square of a dimension


def seal(
    folder: Path,
    fingerprint: str,
    layout: Layout,
    commits: list[dict[str, Any]],
    asked: set[str],
    max_norm: float | None,
) -> dict[str, Any]:
    """The manifest. Of the arrays in `asked`, rows over `max_norm` medians are marked; others keep their statistics."""
    windows: dict[str, set[int]] = {}
    files: dict[str, Any] = dict(read_json(folder / "tokens" / "commit.json", "files")["files"])
    for commit in commits:
        files |= commit["files"]
        windows.setdefault(commit["array"], set()).add(commit["window"])
    complete = sorted(a for a, have in windows.items() if len(have) == layout.windows)
    manifest = folder / "manifest.json"
    known = read_json(manifest, "statistics")["statistics"] if manifest.exists() else {}
    known = {array: found for array, found in known.items() if array not in asked}
    return {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "rows": layout.rows,
        "complete": complete,
        "statistics": {a: known.get(a) or statistics(folder, layout, a, files, max_norm) for a in complete},
        "files": dict(sorted(files.items())),
    }


def statistics(
    folder: Path, layout: Layout, name: str, files: dict[str, Any], max_norm: float | None = None
) -> dict[str, Any]:
    """What training and a reader want to know of an array's unmarked rows, from float64 sums.

    `variance` is the mean over dimensions of each dimension's variance (elementwise); `mean_square_norm` is E|x|^2.
    Marked are the rows whose norm is over `norm_limit`, `max_norm` times the median norm of all.
    """
    norms = read_whole(folder, f"{name}.row_norm")
    limit = None if max_norm is None else max_norm * float(np.median(norms))
    marked = outlier_rows(norms, limit)
    mean, square = moments(folder, layout, name, marked, files)
    norms = np.delete(norms, marked)
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    outliers = np.flatnonzero(np.sqrt(square) > OUTLIER * np.median(np.sqrt(square)))
    return {
        "count": len(norms),
        "marked": len(marked),
        "max_norm": max_norm,
        "norm_limit": limit,
        "variance": float((square - mean**2).mean()),
        "mean_square_norm": float(square.sum()),
        "mean_norm": float(norms.mean(dtype=np.float64)),
        "norm_of_mean": float(np.sqrt((mean**2).sum())),
        "norm_quantiles": {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(norms, QUANTILES), strict=True)},
        "outlier_dimensions": {str(int(d)): {"mean": float(mean[d]), "sd": float(spread[d])} for d in outliers[:32]},
    }


def outlier_rows(norms: np.ndarray, limit: float | None) -> np.ndarray:
    """The rows whose norm is over the limit, ascending."""
    return np.flatnonzero(norms > limit) if limit is not None else np.array([], np.int64)


def moments(folder: Path, layout: Layout, name: str, marked: np.ndarray, files: dict[str, Any]) -> np.ndarray:
    """The mean and the mean square (2, d_in) of the rows that are not marked, float64."""
    sums, array = read_whole(folder, f"{name}.moments").sum(0), read_array(folder, name)
    for chunk in np.unique(marked // layout.chunk_rows):
        which = marked[marked // layout.chunk_rows == chunk] - chunk * layout.chunk_rows
        bits = take(folder, array, int(chunk), which, files[array.file(int(chunk))]["bytes"])
        values = torch.from_numpy(bits).view(torch.bfloat16).double().numpy()
        sums -= np.stack([values.sum(0), np.square(values).sum(0)])
    return sums / (layout.rows - len(marked))


def describe_statistics(statistics: dict[str, Any]) -> str:
    """The statistics of an array as a line of text."""
    s, q = statistics, statistics["norm_quantiles"]
    masked = f", {s['marked']:,} rows over {s['max_norm']:g}x the median norm masked" if s["max_norm"] else ""
    return (
        f"mean norm {s['mean_norm']:.4g} (1% {q['0.01']:.4g}, median {q['0.5']:.4g}, 99.9% {q['0.999']:.4g}), "
        f"elementwise variance {s['variance']:.4g}, {len(s['outlier_dimensions'])} outlier dimensions{masked}"
    )
