"""How a few rows of huge norm change the numbers of a cache and of its SAEs, with and without masking these rows.

Everything is computed from what forward_hooks.py measures, row by row.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forward_hooks import PlainCache, PlainSAE, RowTable

TOP_SHARE = 0.001  # the share of rows, those with the largest norms, whose part of the variance is reported
LISTED = 8  # outlier rows that are listed with position and token
TRAINING_CHUNKS = 4  # of 8,192 rows each, on which explained variance is measured for training rows


def variance_of_rows(cache: PlainCache, array: str, decode: Any) -> dict[str, Any]:
    """Variance of an array's rows with and without the outlier rows, and the positions of the outlier rows.

    `decode` turns token ids into text. The variance is the mean of |x - mean|^2 over the counted rows, where `mean` is
    their mean. Shares refer to the variance of all rows.
    """
    norm = np.concatenate([part.double().norm(dim=1).numpy() for part in cache.rows(array)])
    limit = cache.norm_limit(array) or 10 * float(np.median(norm))
    kept = norm <= limit
    mean, mean_kept = _means(cache, array, kept)
    around, around_kept = [], []
    for part in cache.rows(array):
        around.append((part.double() - mean).square().sum(1).numpy())
        around_kept.append((part.double() - mean_kept).square().sum(1).numpy())
    distance, distance_kept = np.concatenate(around), np.concatenate(around_kept)[kept]
    strongest = np.argsort(-norm)[: math.ceil(TOP_SHARE * len(norm))]
    ids, _ = cache.contexts()
    context, position = cache.places()
    outliers = [row for row in strongest if not kept[row]]
    return {
        "rows": len(norm),
        "outlier_rows": int((~kept).sum()),
        "norm_limit": limit,
        "norm_median": float(np.median(norm)),
        "norm_max": float(norm.max()),
        "variance_all_rows": float(distance.mean()),
        "variance_masked": float(distance_kept.mean()),
        "variance_share_of_outliers": float(distance[~kept].sum() / distance.sum()),
        f"variance_share_of_top_{TOP_SHARE:.1%}": float(distance[strongest].sum() / distance.sum()),
        "outlier_positions": _counts(position[~kept].tolist()),
        "outlier_tokens": _counts([decode([int(ids[context[row], position[row]])]) for row in np.flatnonzero(~kept)]),
        "largest": [
            {
                "norm": float(norm[row]), "context": int(context[row]), "position": int(position[row]),
                "token": decode([int(ids[context[row], position[row]])]),
            }
            for row in outliers[:LISTED]
        ],
    }  # fmt: skip


def _means(cache: PlainCache, array: str, kept: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    total, total_kept, done = torch.zeros(()), torch.zeros(()), 0
    for part in cache.rows(array):
        rows = torch.from_numpy(kept[done : done + len(part)])
        total, total_kept = total + part.double().sum(0), total_kept + part[rows].double().sum(0)
        done += len(part)
    return total / done, total_kept / int(kept.sum())


def _counts(values: Sequence[Any], most: int = 8) -> dict[str, int]:
    """The most frequent values and how often each occurs."""
    counts: dict[str, int] = {}
    for value in values:
        counts[str(value)] = counts.get(str(value), 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:most])


@torch.no_grad()
def explained_variance_of_rows(
    cache: PlainCache, array: str, saes: Sequence[PlainSAE], norm_limit: float | None
) -> dict[str, float]:
    """Explained variance of each SAE on the first stored rows, on which it was trained."""
    x = torch.cat(list(cache.rows(array, TRAINING_CHUNKS)))
    if norm_limit is not None:
        x = x[x.norm(dim=1) <= norm_limit]
    total = (x - x.double().mean(0)).double().square().sum()
    return {
        sae.name: float(1 - sum((p - sae.decode(sae.encode(p))).double().square().sum() for p in x.split(1024)) / total)
        for sae in saes
    }


def explained_variance_without_each_row(table: RowTable) -> np.ndarray:
    """(R, K): the exact explained variance of each SAE when one held-out row is left out.

    Leaving out row r lowers the sum of squares about the mean by R / (R - 1) |x_r - mean|^2.
    """
    rows = len(table.distance)
    total = table.distance.sum() - table.distance * rows / (rows - 1)
    return 1 - (table.error.sum(0) - table.error) / total[:, None]


def first_example_outliers(table: RowTable, norm_limit: float) -> dict[str, float]:
    """Of the latents that fire, the share whose largest activation is on a row over the limit."""
    shares = {}
    for name, first in zip(table.names, table.first_row, strict=True):
        fired = first[first >= 0]
        shares[name] = float((table.norm[fired] > norm_limit).mean()) if len(fired) else math.nan
    return shares


def order_of_pairs(table: RowTable, number: str) -> Iterator[dict[str, Any]]:
    """For each pair of SAEs: the difference in a number, its paired 95 % interval over documents, and the effect of one
    row.

    `number` is "fve" or "kl". The order of two SAEs by explained variance is the order of their summed errors, since
    the variance of the rows is the same for both. `rows_that_turn_it` counts the rows that reverse the order
    when they are left out, one at a time.
    """
    value, weight = (table.error, table.distance) if number == "fve" else (table.kl, np.ones(len(table.norm)))
    sign = -1 if number == "fve" else 1
    _, group = np.unique(table.document, return_inverse=True)
    documents = int(group.max()) + 1
    whole = np.bincount(group, weight, documents)
    for a, b in combinations(range(len(table.names)), 2):
        difference_R = sign * (value[:, a] - value[:, b])
        part = np.bincount(group, difference_R, documents)
        difference = part.sum() / whole.sum()
        spread = ((part - difference * whole) ** 2).sum() * documents / max(1, documents - 1)
        half = 1.96 * math.sqrt(spread) / whole.sum()
        left_out = difference_R.sum() - difference_R
        turned = int((np.sign(left_out) != np.sign(difference_R.sum())).sum())
        yield {
            "number": number, "a": table.names[a], "b": table.names[b], "difference": float(difference),
            "half_interval": float(half), "decided": bool(abs(difference) > half), "rows_that_turn_it": turned,
        }  # fmt: skip


def order_stability(table: RowTable) -> dict[str, Any]:
    """The decided orders (those whose interval excludes zero) that are reversed when one held-out row is left out, and
    the near ties."""
    numbers = ("fve", "kl") if table.has_losses else ("fve",)
    pairs = [pair for number in numbers for pair in order_of_pairs(table, number)]
    ev = explained_variance_without_each_row(table)
    change = np.abs(ev - (1 - table.error.sum(0) / table.distance.sum())).max(0)
    return {
        "pairs": len(pairs),
        "decided": sum(pair["decided"] for pair in pairs),
        "decided_and_turned_by_one_row": [pair for pair in pairs if pair["decided"] and pair["rows_that_turn_it"]],
        "near_ties": [pair for pair in pairs if not pair["decided"]],
        "largest_change_of_ev_by_one_row": dict(zip(table.names, change.tolist(), strict=True)),
    }


def save_table(table: RowTable, path: Path) -> None:
    arrays = {name: value for name, value in vars(table).items() if isinstance(value, np.ndarray)}
    firsts = {f"first_row.{name}": rows for name, rows in zip(table.names, table.first_row, strict=True)}
    np.savez_compressed(path, names=np.array(table.names), **arrays, **firsts)


def read_table(path: Path) -> RowTable:
    with np.load(path) as saved:
        names = saved["names"].tolist()
        arrays = {name: saved[name] for name in saved.files if name != "names" and not name.startswith("first_row.")}
        return RowTable(names=names, first_row=[saved[f"first_row.{name}"] for name in names], **arrays)
