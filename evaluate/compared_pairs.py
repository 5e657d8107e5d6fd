"""A description of the pairs of latents that a training step compared, for the pair penalties of papers 002 and 003."""

import math
from collections.abc import Mapping
from typing import Any

from ..common.schemas import LATER_ENTRIES

ALL_PAIRS = "all"


def compared_pairs(record: Mapping[str, Any]) -> str | None:
    """A description of the pairs of latents that a run compared in a step; None if its recipe has no such choice.

    A run without these options was trained by an earlier version, which did not offer this choice. If the dictionary is
    so small that a single block, or the table of pairs, contains all of its pairs, then all of them are compared.
    """
    options, latents = LATER_ENTRIES | record.get("resolved", {}), record.get("d_sae", math.inf)
    if record.get("variant") == "decorrelation":
        exact = options["pair_choice"] == "exact" or latents < 1.5 * options["block"]
        return ALL_PAIRS if exact else f"those in random blocks of {options['block']} latents"
    if "pair_store" in options:
        if options["pair_store"] == "dense" or 2 * options["pairs"] >= latents - 1:
            return ALL_PAIRS
        share = f"one in {options['turns']} of " if options["turns"] > 1 else ""
        return f"{share}{options['pairs']} for each latent, kept in a table"
    return None


def options_of_earlier_pairs(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make a new run compare the same pairs as this run. Empty, unless this run was trained by an
    earlier version, in which the pairs could not be chosen."""
    resolved = record.get("resolved", {})
    newer = (
        ["pair_choice"] if record.get("variant") == "decorrelation" else ["turns"] if "pair_store" in resolved else []
    )
    return {name: LATER_ENTRIES[name] for name in newer if name not in resolved}


def note_of_pairs(record: Mapping[str, Any]) -> list[str]:
    """A sentence for a run that did not compare all pairs."""
    compared = compared_pairs(record)
    if compared in (None, ALL_PAIRS):
        return []
    return [f"{record['variant']}: a training step compared only some pairs of latents: {compared}."]
