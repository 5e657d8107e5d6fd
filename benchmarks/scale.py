"""Harvests and sweeps on many machines, simulated: `python benchmarks/scale.py > benchmarks/results/DATE-scale.md`.

    python benchmarks/scale.py                          the page: what limits a harvest of 10B tokens, or a sweep
    python benchmarks/scale.py --set node_link=1.2e9    with another constant; simulation/constants.py has them all
    python benchmarks/scale.py --measure                the constants that can be measured, on this machine
    python benchmarks/scale.py --processes              real harvests of 1 to 3 processes, compared with the simulation

Nothing is measured on a cluster: all times on the page are simulated, from constants that are looked up, measured on
two CPU cores, or assumed. The program's own decisions are imported, not imitated: windows and their objects, requests
to the store, the assignment of runs to ranks, and the choice of the chunk to download and of the chunk to remove to
make room. `simulation/` has the simulations.
"""

import argparse
import itertools
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from sae.benchmarks.common import commit
from sae.benchmarks.simulation.closed_forms import expected_seconds_with_failures, undisturbed_seconds
from sae.benchmarks.simulation.constants import Constants, describe, parse_settings
from sae.benchmarks.simulation.harvest import RANKS, SHARES, Harvest, HarvestResult, HarvestRun
from sae.benchmarks.simulation.sweep import Sweep, SweepRun, step_seconds
from sae.common.formatting import format_bytes, format_duration

GB, TB = 1e9, 1e12
SEEDS = range(5)  # of failures and of the nodes' speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another value of a constant")
    parser.add_argument("--measure", action="store_true", help="measure constants on this machine instead")
    parser.add_argument("--processes", action="store_true", help="compare with real processes on this machine instead")
    args = parser.parse_args()
    try:
        constants = parse_settings(args.set)
    except ValueError as error:
        parser.error(str(error))
    if args.measure:
        from sae.benchmarks.simulation.measure import measure

        print(measure())
    elif args.processes:
        from sae.benchmarks.simulation.processes import compare

        print(compare())
    else:
        print(wrapped(page(constants, args.set)))


def wrapped(lines: Iterable[str]) -> str:
    """Lines of Markdown joined to text, with wrapped paragraphs."""
    found: list[str] = []
    for is_text, group in itertools.groupby(lines, lambda line: bool(line) and line.lstrip()[0] not in "|#"):
        text = list(group)
        found += (
            [textwrap.fill(" ".join(text), 120, break_long_words=False, break_on_hyphens=False)] if is_text else text
        )
    return "\n".join(found)


def table(*heading: str) -> list[str]:
    return ["", f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def page(constants: Constants, settings: Sequence[str]) -> Iterable[str]:
    started = time.process_time()
    options = "".join(f" --set {setting}" for setting in settings)
    yield from ("# Harvests and sweeps on many machines, simulated", "")
    yield f"`python benchmarks/scale.py{options}`, {date.today()}, commit {commit()}."
    yield ""
    yield "**Every time on this page is simulated: no cluster, GPU or bucket was available.** The constants are at the"
    yield "end of the page, which says for each whether it was looked up, measured on two CPU cores, or assumed. The"
    yield "program's own code computes the windows, objects and requests, assigns runs to processes, and chooses the"
    yield "chunk that is removed from the local cache."
    yield from harvest_page(constants)
    yield from sweep_page(constants)
    yield from checks(constants)
    yield from ("", "## Constants", "")
    yield from describe(constants)
    yield ""
    yield f"Making this page took {time.process_time() - started:.0f} s of processor time."


# --- harvests ---------------------------------------------------------------------------------------------------------


def run_harvests(harvest: Harvest) -> list[HarvestResult]:
    return [HarvestRun(harvest, seed).run() for seed in SEEDS]


def mean(results: Sequence[Any], value: Callable[[Any], float]) -> float:
    return sum(map(value, results)) / len(results)


def harvest_row(name: str, harvest: Harvest) -> str:
    phases, windows = phases_of(harvest), mean(run_harvests(harvest), lambda one: one.windows_seconds)
    whole = harvest.cut_seconds + windows + harvest.seal_seconds
    cells = [*list(phases.values())[:3], windows, harvest.seal_seconds, whole]
    return row(name, *map(format_duration, cells), f"{harvest.bounds['model'] / whole:.2%}")


def phases_of(harvest: Harvest) -> dict[str, float]:
    """Seconds of the phases of a harvest that a single process runs, or that each process runs by itself."""
    return {
        "cutting the text": harvest.cut_seconds,
        "starting and reading the text": harvest.constants.start + harvest.text_seconds,
        "listing commits": max(harvest.asking_seconds, harvest.bounds["asking"]),
        "sealing": harvest.seal_seconds,
    }


HARVEST_COLUMNS = (
    "tokens and nodes", "cutting the text", "starting and reading the text", "listing commits", "until the last commit",
    "sealing", "whole harvest", "the model's share of it",
)  # fmt: skip


def harvest_page(constants: Constants) -> Iterable[str]:
    whole = Harvest(constants=constants)
    layout = whole.layout
    yield from ("", "## A harvest: three layers of Gemma-2-2B, 64 nodes of 8 GPUs, into a bucket", "")
    yield f"10 billion tokens are {layout.n_windows:,} windows of {layout.window_rows:,} rows. Each window has"
    yield f"{len(whole.objects) + len(whole.largest)} objects and {format_bytes(whole.window_bytes)}, and all windows"
    yield f"together have {format_bytes(whole.window_bytes * layout.n_windows)}. The table shows the time that each"
    yield "resource alone needs for the windows of 10 billion tokens:"
    yield from table("resource", "seconds", "what the resource does")
    explained = {
        "model": "all GPUs compute",
        "writers": "all processes compute statistics and checksums of their windows",
        "links": "every node sends its share",
        "writes": "the store serves the requests that write objects and commits",
        "asking": "the store lists every commit, for the first rank or for every task with a share",
    }
    for name, seconds in whole.bounds.items():
        yield row(name, f"{seconds:,.0f}", explained[name])
    asking = replace(whole, way=SHARES).bounds["asking"]
    yield row("asking, `--share`", f"{asking:,.0f}", "the store lists every commit for 512 tasks")
    yield from table(*HARVEST_COLUMNS)
    for tokens in (10_000_000, 100_000_000, 1_000_000_000, 10_000_000_000):
        nodes = {10_000_000: 1, 100_000_000: 8}.get(tokens, 64)
        yield harvest_row(f"{tokens:,} tokens, {nodes} nodes", replace(whole, tokens=tokens, nodes=nodes))
    parts = replace(constants, partitions=constants.partitions / 16)
    yield harvest_row(
        "10 billion as 16 caches of 4 nodes each", replace(whole, tokens=625_000_000, nodes=4, constants=parts)
    )
    yield ""
    yield "The time `until the last commit` includes starting, reading the text and listing commits. In the last row,"
    yield "each of the 16 caches cuts its own text and gets a sixteenth of the store's requests. Training reads"
    yield "several caches as one (`--cache A --cache B`)."
    yield ""
    phases = phases_of(whole)
    slowest = sorted(phases, key=lambda name: -phases[name])
    named = [f"{name} ({format_duration(phases[name])})" for name in slowest]
    yield f"A harvest of 10 billion tokens is limited by {named[0]}, then by {named[1]} and by {named[2]}. This is work"
    yield "that one process does alone, or that every process does for all windows. Computing and sending the windows"
    yield "takes minutes. Several smaller caches avoid this limit."
    yield from harvest_failures(whole)
    yield from bad_choices(whole)
    yield from memory(whole)


def harvest_failures(whole: Harvest) -> Iterable[str]:
    yield from ("", "### Failures", "")
    yield "The harvest runs on 64 nodes. Under one launcher (`torchrun`, `ranks`), all processes end when one is lost."
    yield "In an array job (`--share`, `shares`), only the lost tasks end. One node fails halfway to the last commit;"
    yield "the values are means of 5 seeds. The last column is the share of the time that is lost if a node fails"
    yield "every hour."
    yield from table(
        "tokens", "started as", "until the last commit", "delay by one failure", "windows computed again",
        "time lost at one failure per hour",
    )  # fmt: skip
    for tokens in (1_000_000_000, 10_000_000_000):
        for way, name in ((RANKS, "ranks"), (SHARES, "shares")):
            quiet = replace(whole.constants, node_failures=0)
            harvest = replace(whole, tokens=tokens, way=way, constants=quiet)
            without = run_harvests(harvest)
            failed = [
                HarvestRun(harvest, seed, one.windows_seconds / 2).run()
                for seed, one in zip(SEEDS, without, strict=True)
            ]
            seconds = mean(without, lambda r: r.windows_seconds)
            later = mean(failed, lambda r: r.windows_seconds) - seconds
            again = mean(failed, lambda r: r.computed_again)
            yield row(
                f"{tokens:,}", name, f"{seconds:,.0f} s", f"{later:,.0f} s", f"{again:.1f}", f"{later / 3600:.1%}"
            )
    published = whole.constants.node_failures * whole.nodes
    yield ""
    yield f"At the published rate, 64 nodes have one failure in {1 / published:.0f} hours."
    yield ""
    yield "The next table shows the cost of losing one process for several sizes of windows and a billion tokens: the"
    yield "windows in memory are computed again, and the process starts again. All 512 processes have this cost under"
    yield "one launcher, and 8 processes under `--share`."
    one = replace(whole, tokens=1_000_000_000)
    yield from table(
        "rows of a window", "time to compute one window", "mean time to compute lost windows again",
        "time to start again", "memory of two windows",
    )  # fmt: skip
    for window in (65_536, 262_144, 1_048_576, 4_194_304):
        harvest = replace(one, window=window)
        seconds, c = window * harvest.token_seconds, harvest.constants
        start = c.restart + c.start + harvest.text_seconds + harvest.asking_seconds
        yield row(
            f"{window:,}", f"{seconds:.1f} s", f"{1.5 * seconds:.1f} s", f"{start:.0f} s",
            format_bytes(2 * harvest.window_bytes),
        )  # fmt: skip


def bad_choices(whole: Harvest) -> Iterable[str]:
    one = replace(whole, tokens=1_000_000_000, way=SHARES)
    yield from ("", "### Choices", "")
    yield "The table shows the seconds until the last commit for a billion tokens on 512 GPUs, with `--share i/n`"
    yield "unless stated otherwise."
    yield from table("choice", "seconds", "seconds / those of 512 shares")
    base = mean(run_harvests(one), lambda r: r.windows_seconds)
    for name, harvest in {
        "512 shares": one,
        "ranks": replace(one, way=RANKS),
        "64 shares: seven of eight GPUs idle": replace(one, shares=64),
        "513 shares: one GPU starts a second time": replace(one, shares=513),
        "4,096 shares: every process starts eight times": replace(one, shares=4096),
        "windows of 65,536 rows": replace(one, window=65_536),
        "windows of 1,048,576 rows": replace(one, window=1_048_576),
        "windows of 4,194,304 rows: 239 for 512 GPUs": replace(one, window=4_194_304),
        "a bucket of one partition": replace(one, constants=replace(whole.constants, partitions=1)),
        "a link of 25 Gbit/s": replace(one, constants=replace(whole.constants, node_link=2e9)),
    }.items():
        seconds = mean(run_harvests(harvest), lambda r: r.windows_seconds)
        yield row(name, f"{seconds:,.0f}", f"{seconds / base:.2f}")


def memory(whole: Harvest) -> Iterable[str]:
    yield from ("", "### Memory and requests that grow with the cache", "")
    yield "Every process keeps the contexts (4 x 128 + 50 bytes for every 127 rows) and two windows in memory. The"
    yield "process that seals also keeps the norms of an array, and needs memory to sort them. The last two columns"
    yield "are requests: `listings` are those of every process when it starts, and `reads to seal` those of the"
    yield "process that seals."
    yield from table(
        "tokens", "contexts", "contexts of 8 processes", "two windows", "memory to seal", "listings", "reads to seal"
    )
    for tokens in (10_000_000, 100_000_000, 1_000_000_000, 10_000_000_000):
        harvest = replace(whole, tokens=tokens)
        contexts = tokens / 127 * (4 * 128 + 50)
        yield row(
            f"{tokens:,}", format_bytes(contexts), format_bytes(8 * contexts), format_bytes(2 * harvest.window_bytes),
            format_bytes(whole.constants.row_memory * tokens), f"{harvest.asks:,}", f"{harvest.seal_requests:,}",
        )  # fmt: skip


# --- sweeps -----------------------------------------------------------------------------------------------------------


def sweep_page(constants: Constants) -> Iterable[str]:
    whole = Sweep(constants=constants)
    yield from ("", "## A sweep: 600 runs from a bucket", "")
    yield f"The sweep has forty recipes with five seeds each on layers 5, 12 and 19: {len(whole.works)} runs of 18,432"
    yield f"latents. Each run trains for one epoch of 100 million tokens ({whole.steps:,} steps of 4,096). The bucket"
    yield f"holds {format_bytes(3 * whole.layer_bytes)}, and a node has 8 GPUs. `efficiency` is the share of all GPUs'"
    yield "time that is spent in steps, and `waiting` the share spent waiting for chunks. One GPU alone would train"
    yield f"for {format_duration(sum(work.seconds for work in whole.works))}. The longest run takes"
    yield f"{format_duration(max(work.seconds for work in whole.works))}, which more GPUs cannot shorten."
    yield from table(
        "GPUs", "local cache of a node", "time", "efficiency", "waiting", "downloaded", "downloaded by a node",
        "failures",
    )  # fmt: skip
    for gpus in (8, 64, 256, 512):
        for local in (200 * GB, TB, 2 * TB):
            result = SweepRun(replace(whole, gpus=gpus, local_cache=local)).run()
            yield row(
                gpus, format_bytes(local), format_duration(result.seconds), f"{result.efficiency:.1%}",
                f"{result.waited / result.seconds / gpus:.1%}", format_bytes(result.pulled),
                format_bytes(result.pulled / result.sweep.nodes), result.failures,
            )  # fmt: skip
    yield from link_page(constants)


def link_page(constants: Constants) -> Iterable[str]:
    yield from ("", "### When the link is the bottleneck", "")
    step_ms = 1e3 * step_seconds()["topk"] / constants.step_share
    yield f"One node trains `topk` on layer 12; a step takes {step_ms:.1f} ms according to the model. The node reads"
    yield "from a bucket with 1 TB of local cache. The table shows the share of the GPUs' time that is spent in steps,"
    yield "for several numbers of runs on each of 8 GPUs and three speeds of the link."
    yield from table("runs on a GPU", "8 GB/s (100 Gbit/s)", "2 GB/s (25 Gbit/s)", "0.8 GB/s (10 Gbit/s)")
    for runs in (1, 2, 4, 8, 16):
        cells = []
        for link in (8e9, 2e9, 0.8e9):
            sweep = Sweep(
                layers=(12,), recipes=("topk",), seeds=8 * runs, local_cache=TB,
                constants=replace(constants, node_link=link, node_failures=0),
            )  # fmt: skip
            cells.append(f"{SweepRun(sweep).run().efficiency:.1%}")
        yield row(runs, *cells)
    yield ""
    yield "The processes of a node read the same chunks at the same pace and share them, so a node"
    yield "downloads its layer once."
    yield f"A run alone reads {4096 * 2 * 2304 / (step_seconds()['topk'] / constants.step_share) / 1e9:.1f} GB/s."


# --- checks -----------------------------------------------------------------------------------------------------------


def checks(constants: Constants) -> Iterable[str]:
    yield from ("", "## Against formulas", "")
    yield "`tests/test_scale.py` compares the simulation with these formulas and with the bounds above."
    yield from table("case", "formula", "simulated")
    alike = replace(constants, node_failures=0, speed_spread=0, put_rate=1e12, get_rate=1e12, node_link=1e18)
    for nodes in (1, 8):
        harvest = Harvest(tokens=nodes * 8 * 10 * 262_144, nodes=nodes, constants=alike)
        seconds = HarvestRun(harvest).run().windows_seconds
        yield row(f"no failures, {nodes * 8} processes, 10 windows each",
                  f"{undisturbed_seconds(harvest):.3f} s", f"{seconds:.3f} s")  # fmt: skip
    failing = replace(alike, node_failures=60.0, restart=20, start=0, writer=1e18, latency=0, connection=1e17)
    harvest = Harvest(tokens=1_000_000, nodes=1, gpus=1, window=1_000_000, constants=failing)
    results = [HarvestRun(harvest, seed).run().windows_seconds for seed in range(2000)]
    average = sum(results) / len(results)
    error = (sum((one - average) ** 2 for one in results) / (len(results) - 1) / len(results)) ** 0.5
    expected = expected_seconds_with_failures(harvest.tokens * harvest.token_seconds, 60 / 3600, 20)
    yield row(
        "one window, one failure per minute, 20 s to restart", f"{expected:.2f} s", f"{average:.2f} ± {error:.2f} s"
    )


if __name__ == "__main__":
    main()
