"""The part of a page about stability: how similar the latents are to their matches in other seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

from markupsafe import Markup

from ..charts import Chart, Series
from ..metrics.base import MetricResult
from .svg import CHART_SIZE, draw_svg

METRIC = "stability"
BINS = 20  # of the histogram, from 0 to 1
LISTED = 10  # latents in each of the two lists
CHART_TITLE = "Smallest cosine of a latent with its matches in other seeds"


class Latent(NamedTuple):
    """A latent that fires, and its best matches in the other seeds, in the order of the seeds.

    `weakest` is the smallest cosine between the latent and any of these matches. Cosines are absolute values if their
    sign has no meaning; in results of earlier versions, they always are.
    """

    number: int
    weakest: float
    density: float
    recurs: bool
    matches: Sequence[Any]
    cosines: Sequence[float]


class LatentLine(NamedTuple):
    """A line of a list. `latent` is the number of the latent, for links."""

    latent: int
    cells: Sequence[str]


@dataclass(frozen=True)
class StabilityPart:
    """Attributes:
    lead: sentences that say how many latents there are, and how many of them recur.
    heads: the headings of the lists of latents; empty if there are no lists, as in the part about several systems.
    least, most: the lists of the latents whose `weakest` is smallest, and of those whose `weakest` is largest.
    """

    lead: str
    title: str
    chart: Markup
    heads: Sequence[str] = ()
    least: Sequence[LatentLine] = ()
    most: Sequence[LatentLine] = ()


def stability_of_run(result: MetricResult) -> StabilityPart | None:
    """The part about one SAE: the histogram, and the least and most stable latents. None if no latent fires."""
    latents = live_latents(result)
    if not latents:
        return None
    seeds = [str(name) for name in (result.sound.extra or {}).get("seeds", [])]
    heads = ["latent", "weakest cosine", *(f"match in\n{name}" for name in seeds), "density"]
    ranked = sorted(latents, key=lambda one: (one.weakest, one.number))
    counts = histogram(latents)
    series = Series("latents", bin_centres(), counts, "bars", labels=bin_labels(counts, "latents"))
    chart = Chart(CHART_TITLE, "cosine of decoder rows", "latents", [series])
    lines = [LatentLine(one.number, latent_cells(one, len(seeds))) for one in ranked]
    least = lines[:LISTED]
    return StabilityPart(
        describe_latents(result, latents), CHART_TITLE, draw_svg(chart, True, *CHART_SIZE), heads, least,
        lines[len(least):][-LISTED:][::-1],
    )  # fmt: skip


def stability_of_systems(systems: Mapping[str, Sequence[MetricResult]]) -> StabilityPart | None:
    """The part about several systems. The chart has one line for each system, computed over the latents of all its
    seeds together."""
    latents = {label: [one for result in some for one in live_latents(result)] for label, some in systems.items()}
    series = []
    for label, some in latents.items():
        if some:
            shares = [count / len(some) for count in histogram(some)]
            series.append(Series(label, bin_centres(), shares, "both", labels=bin_labels(shares, label)))
    if not series:
        return None
    chart = Chart(CHART_TITLE, "cosine of decoder rows", "share of the latents that fire", series)
    named = ", ".join(one.name for one in series)
    lead = (
        f"{named}: the latents of all seeds of a system taken together, without latents that never fire on the "
        "held-out text."
    )
    return StabilityPart(lead, CHART_TITLE, draw_svg(chart, True, *CHART_SIZE))


def live_latents(result: MetricResult) -> list[Latent]:
    """The latents that fire on the held-out text and have a match in each other seed."""
    found = []
    signed = (result.sound.extra or {}).get("signed", False)
    for entry in result.sound.details:
        written = [value for value in entry.get("decoder_cosine") or () if isinstance(value, (int, float))]
        cosines = written if signed else [abs(value) for value in written]
        matches = entry.get("decoder_match") or ()
        if cosines and entry.get("density", 1.0) > 0:
            found.append(
                Latent(
                    int(entry["index"]),
                    min(cosines),
                    float(entry.get("density", 1.0)),
                    bool(entry.get("recurs")),
                    matches,
                    cosines,
                )  # fmt: skip
            )
    return found


def describe_latents(result: MetricResult, latents: Sequence[Latent]) -> str:
    dead = len(result.sound.details) - len(latents)
    recurring = sum(one.recurs for one in latents)
    threshold = result.sound.metrics.get("stability", {}).get("recurring_threshold")
    meaning = "" if threshold is None else f", with a cosine of at least {threshold:.3g} in every other seed"
    left_out = f" {dead:,} latents that never fire on the held-out text are left out." if dead else ""
    typical = mean(one.weakest for one in latents)
    return (
        f"{recurring:,} of {len(latents):,} latents recur{meaning}. The smallest cosine of a latent with its "
        f"matches is {typical:.3f} on average over latents.{left_out}"
    )


def latent_cells(latent: Latent, seeds: int) -> list[str]:
    matches = [
        "" if match is None else f"{match} ({cosine:.3f})"
        for match, cosine in zip(latent.matches, latent.cosines, strict=False)
    ]
    matches += [""] * (seeds - len(matches))
    return [f"{latent.weakest:.3f}", *matches[:seeds], f"{latent.density:.2%}"]


def histogram(latents: Sequence[Latent]) -> list[int]:
    counts = [0] * BINS
    for one in latents:
        counts[min(max(int(one.weakest * BINS), 0), BINS - 1)] += 1
    return counts


def bin_centres() -> list[float]:
    return [(place + 0.5) / BINS for place in range(BINS)]


def bin_labels(values: Sequence[float], what: str) -> list[str]:
    """The tooltip of each bin: the number of latents, or the share of a system's latents."""
    ranges = [f"{place / BINS:.2f} to {(place + 1) / BINS:.2f}" for place in range(BINS)]
    return [
        f"{where}: {value:,} {what}" if isinstance(value, int) else f"{what}: {where}, {value:.1%}"
        for where, value in zip(ranges, values, strict=True)
    ]
