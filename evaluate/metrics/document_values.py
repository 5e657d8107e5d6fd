"""Core's numbers by document, for comparing two SAEs on the same documents (docs/reference/statistics.md)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .sae_statistics import Ratio, SAEStatistics, divide, ratio_value, sum_by_document
from .splice_losses import RatiosByCategory

MAX_GROUPS = 1024  # limit for groups of documents, so that their values in a result file always take less than 100 kB


def group_documents(document_N: Tensor) -> Tensor:
    """The group of each context (N,): its document, or one of MAX_GROUPS blocks of consecutive documents."""
    documents, rank_N = document_N.unique(return_inverse=True)
    groups = min(len(documents), MAX_GROUPS)
    return rank_N * groups // len(documents)


def values_by_group(ratio: Ratio, group_N: Tensor) -> Tensor:
    """One value per group of documents (G,), such that the mean of the values is the ratio r of the sums.

    The value of a group is r + (part - r * whole) * G / sum(whole). The mean of the values has the standard error of
    the linearized ratio, as in `sae_statistics.ratio_interval`, and the mean difference between two SAEs is the
    difference of their ratios.
    """
    part_G, whole_G = sum_by_document(ratio, group_N)
    centre = ratio_value((part_G, whole_G))
    return centre + (part_G - centre * whole_G) * divide(len(whole_G), float(whole_G.sum()))


def document_record(
    ratios: RatiosByCategory, stats: SAEStatistics, fve: float, document_N: Tensor, text: str
) -> dict[str, Any]:
    """The content of core's `MetricResult.extra`: the values of each number by group of documents, and the text's id.

    Values are rounded to seven digits. The explained variance is rescaled like its interval
    (`SAEStatistics.fve_interval`).
    """
    group_N = group_documents(document_N)
    values = {name: values_by_group(ratio, group_N) for of in ratios.values() for name, ratio in of.items()}
    around = divide(stats.sums["around_centre"], stats.variance)
    values["fve"] = fve + (values["fve"] - values["fve"].mean()) * around
    return {
        "text": text,
        "unit": "document" if len(document_N.unique()) <= MAX_GROUPS else "group of documents",
        "values": {name: [float(f"{value:.7g}") for value in value_G.tolist()] for name, value_G in values.items()},
    }


def values_in_record(record: Any, name: str) -> tuple[str, Mapping[str, float]]:
    """What a unit of the record is ("document" or "group of documents"), and for each unit the value called `name`.

    Both are empty for results of earlier versions, which stored no values.
    """
    if not isinstance(record, dict) or name not in record.get("values", {}):
        return "", {}
    values = record["values"][name]
    if None in values:
        return "", {}
    return record["unit"], {f"{record['text']} {group}": value for group, value in enumerate(values)}
