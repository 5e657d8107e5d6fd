"""Cost of a harvest relative to the model's forward pass: `python benchmarks/bench_harvest.py`.

The embedded text is tokenized before the clock starts. The script then measures the following on gemma-2-mini, in
rounds, in random order:

    forward         the truncated model on the batches of the harvest, without hooks; results are discarded
    harvest         the whole harvest, from loading the model to sealing the cache, with checksums, flushes and commits
    harvest of 19   a harvest of layer 19 alone instead of layers 5, 12 and 19

Each of these three measurements loads the model anew. The script then measures the writer alone, at Gemma-2-2B's width,
and peak memory at two cache sizes.

`--host` measures something else: the host's part of a harvest, without a model. Prepared rows of three layers, each of
Gemma-2-2B's width, are processed on one core, then on two, and so on. There are two cases. If the GPU keeps the window,
the host only computes checksums, writes and flushes; if the GPU does not keep the window, the host also places and
measures the rows.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from common import (
    AnonymousPeak,
    Spent,
    identity,
    in_new_process,
    in_rounds,
    machine,
    medians,
    model_like_rows,
    write_text,
)
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.cache.layout import Layout
from sae.cache.loader import as_uint16
from sae.cache.measure import measure_rows
from sae.cache.writer import CacheWriter, WindowRows
from sae.harvest.device_copy import scatter
from sae.harvest.model import LanguageModel
from sae.harvest.plan import HarvestConfig, HarvestPlan, plan_harvest
from sae.harvest.progress import HarvestProgress
from sae.harvest.run import run_harvest
from sae.harvest.stages import cache_layout, load_model_for, tokenize
from sae.harvest.windows import WindowComputer, write_windows

LAYERS, WIDE = (5, 12, 19), 2304
HOST_ARRAYS = [Hook(layer).array for layer in LAYERS]
HOST_ROWS, PASS = 32_768, 4096  # rows of a window and of a forward pass, with --host


def prepare(plan: HarvestPlan, contexts: Contexts) -> None:
    """Create the files that remain when a harvest is stopped after tokenizing."""
    shutil.rmtree(plan.folder, ignore_errors=True)
    contexts.write(plan.folder)
    CacheWriter(plan.folder, plan.identity, cache_layout(plan, contexts), plan.widths)


@dataclass
class Spans:
    """Start and end of every call of a method."""

    of: list[tuple[float, float]]

    @property
    def inside(self) -> float:
        return sum(stop - start for start, stop in self.of)

    @property
    def between(self) -> float:
        return sum(start - stop for (_, stop), (start, _) in zip(self.of, self.of[1:], strict=False))


@contextlib.contextmanager
def record_calls(owner: type, method: str) -> Iterator[Spans]:
    spans, original = Spans([]), getattr(owner, method)

    def call(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*arguments)
        finally:
            spans.of.append((started, time.perf_counter()))

    with mock.patch.object(owner, method, call):
        yield spans


def record_passes(plan: HarvestPlan, contexts: Contexts) -> list[Tensor]:
    """The token ids of every forward pass of a harvest, each of shape (N, S), in order."""
    prepare(plan, contexts)
    original, passes = LanguageModel.capture_hooks, []

    def keep(model: LanguageModel, ids_NS: Tensor, hooks: Any) -> Any:
        passes.append(ids_NS)
        return original(model, ids_NS, hooks)

    with mock.patch.object(LanguageModel, "capture_hooks", keep):
        run_harvest(plan)
    return passes


@torch.no_grad()
def forward(plan: HarvestPlan, passes: list[Tensor]) -> Spent:
    started = Spent.now()
    model = load_model_for(plan, {0: list(plan.widths)}, "cpu")
    for ids_NS in passes:
        model.trunk(ids_NS, use_cache=False)
    return Spent.since(started)


def timed_harvest(plan: HarvestPlan, contexts: Contexts, splits: list[dict[str, float]]) -> Callable[[], Spent]:
    def run() -> Spent:
        prepare(plan, contexts)
        with record_calls(WindowComputer, "compute") as model, record_calls(CacheWriter, "write_window") as writer:
            started = Spent.now()
            run_harvest(plan)
            spent = Spent.since(started)
        last = model.of[-1][1]
        splits.append(
            {
                "the model computes": model.inside / spent.wall,
                "the model waits for the writer": model.between / spent.wall,
                "before the first and after the last window": (spent.wall - (last - model.of[0][0])) / spent.wall,
                "the writer writes": writer.inside / spent.wall,
                "the writer waits for the model": writer.between / spent.wall,
            }
        )
        return spent

    return run


def timed_writer(folder: Path, compress: bool, rows: int = 16_384) -> Callable[[], float]:
    """Tokens per second for a window of three layers: statistics, checksums, flush and commit."""
    names = [Hook(layer).array for layer in LAYERS]
    bits, at = model_like_rows(rows, WIDE), np.arange(rows)
    window = WindowRows(dict.fromkeys(names, bits), (at // 128).astype(np.uint32), (at % 128).astype(np.uint16))

    def run() -> float:
        shutil.rmtree(folder, ignore_errors=True)
        layout = Layout(rows, rows, compress=compress)
        write_text(folder, rows)
        writer = CacheWriter(folder, identity(), layout, dict.fromkeys(names, WIDE))
        started = time.perf_counter()
        writer.write_window(0, window, {})
        return rows / (time.perf_counter() - started)

    return run


class PreparedRows:
    """A substitute for WindowComputer whose rows cost no time. If `measured`, they come with statistics, as rows from a
    GPU do."""

    rows_in_draft = 0

    def __init__(self, layout: Layout, measured: bool) -> None:
        self.layout, self.measured = layout, measured
        self.rows_RD = torch.from_numpy(model_like_rows(HOST_ROWS, WIDE)).view(torch.bfloat16)
        self.slot = np.random.default_rng(0).permutation(HOST_ROWS)
        self.found = dict.fromkeys(HOST_ARRAYS, measure_rows(as_uint16(self.rows_RD), layout.chunk_rows))

    def memory(self, arrays: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.rows_RD.clone() for name in arrays}

    def made_with(self) -> dict[str, Any]:
        return {}

    def compute(self, window: int, memory: dict[str, Tensor]) -> Callable[[], WindowRows]:
        bits = {name: as_uint16(part) for name, part in memory.items()}
        if not self.measured:
            for at in range(0, HOST_ROWS, PASS):
                part = self.rows_RD[at : at + PASS]
                scatter(dict.fromkeys(bits, part), self.slot[at : at + PASS], bits)
        at = np.arange(HOST_ROWS)
        rows = WindowRows(bits, (at // 128).astype(np.uint32), (at % 128).astype(np.uint16))
        return lambda: replace(rows, measured=self.found if self.measured else {})


def host_part(folder: str, measured: bool, cores: int, windows: int) -> float:
    """GB/s of activations through the host's part of a harvest, on a given number of cores of this machine."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(1)
    layout = Layout(windows * HOST_ROWS, HOST_ROWS)
    write_text(Path(folder), layout.rows)
    writer = CacheWriter(Path(folder), identity(), layout, dict.fromkeys(HOST_ARRAYS, WIDE))
    computer = PreparedRows(layout, measured)
    started = time.perf_counter()
    write_windows(computer, writer, writer.missing_windows(), HarvestProgress())
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return 2 * layout.rows * WIDE * len(HOST_ARRAYS) / seconds / 1e9


def print_host_parts(folder: Path, rounds: int, windows: int) -> None:
    """GB/s for each number of cores, and an extrapolation to eight cores, which assumes that each further core adds as
    much as the last measured core."""
    for measured, title in ((True, "windows from a GPU"), (False, "rows, placed and measured by the host")):
        speeds = []
        for cores in range(1, len(os.sched_getaffinity(0)) + 1):
            runs = [in_new_process(host_part, str(folder / "host"), measured, cores, windows) for _ in range(rounds)]
            speeds.append(statistics.median(runs))
            print(f"  {title}, {cores} cores: {speeds[-1]:.2f} GB/s ({min(runs):.2f} to {max(runs):.2f})")
        if 1 < len(speeds) < 8:
            eight = speeds[-1] + (8 - len(speeds)) * (speeds[-1] - speeds[-2])
            print(f"  {title}, 8 cores: {eight:.1f} GB/s (extrapolated, as if no disk were the limit)")


def peak_of_harvest(folder: str, windows: int, window: int) -> float:
    torch.set_num_threads(1)
    with AnonymousPeak() as peak:
        run_harvest(plan_harvest(harvest_config(Path(folder), windows * window, window)))
    return peak.mb


def harvest_config(folder: Path, tokens: int, window: int) -> HarvestConfig:
    return HarvestConfig(model="gemma-2-mini", layers=LAYERS, tokens=tokens, window=window, device="cpu", out=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of a harvest")
    parser.add_argument("--window", type=int, default=8192, help="rows of a window")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--windows", type=int, nargs=2, default=(4, 16), help="windows of the two harvests whose memory is measured"
    )
    parser.add_argument("--small", type=int, default=4096, help="rows of the windows of these two harvests")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; more threads than idle cores are slower than one"
    )
    parser.add_argument("--folder", default=".", help="where caches are written and removed again")
    parser.add_argument("--host", type=int, metavar="WINDOWS", help="only the host's part, with windows of 32,768 rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine("transformers", "zarr"))
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        if args.host:
            return print_host_parts(folder, args.rounds, args.host)
        three = plan_harvest(harvest_config(folder / "three", args.tokens, args.window))
        one = replace(three, folder=folder / "one", hooks=[Hook(19)])
        contexts = tokenize(three)
        splits: list[dict[str, float]] = []
        passes = record_passes(three, contexts)
        run = sum(ids_NS.numel() for ids_NS in passes)
        ways = {
            "forward": lambda: forward(three, passes),
            "harvest": timed_harvest(three, contexts, splits),
            "harvest of 19": timed_harvest(one, contexts, []),
        }
        times = in_rounds(ways, args.rounds)
        print_report(times, splits, args.tokens)
        print(f"  {run:,} tokens in {len(passes)} passes, with BOS, padding and contexts at the edges of windows")

        speeds = {"raw": timed_writer(folder / "raw", False), "compressed": timed_writer(folder / "compressed", True)}
        print(f"\nthe writer alone, {len(LAYERS)} layers x {WIDE}, flushed, medians of 5 rounds")
        for name, speed in medians(in_rounds(speeds, 5)).items():
            print(
                f"  {name:12s} {speed:9,.0f} tokens/s  {speed * len(LAYERS) * WIDE * 2 / 1e6:7,.0f} MB/s of activations"
            )

        print(f"\npeak of anonymous memory, windows of {args.small:,} rows x {len(LAYERS)} layers")
        for windows in args.windows:
            mb = in_new_process(peak_of_harvest, str(folder / f"peak-{windows}"), windows, args.small)
            print(f"  {windows:3d} windows {mb:7.0f} MB")


def print_report(spent: dict[str, list[Spent]], splits: list[dict[str, float]], tokens: int) -> None:
    print(f"\n{tokens:,} tokens, {len(splits)} rounds; ratios are medians of the ratios within each round")
    for name, found in spent.items():
        wall = [one.wall for one in found]
        print(
            f"  {name:14s} {tokens / statistics.median(wall):7,.0f} tokens/s, best {tokens / min(wall):7,.0f}", end=""
        )
        print(f"  ({min(wall):.2f} to {max(wall):.2f} s)")
    for above, below in (("forward", "harvest"), ("harvest", "harvest of 19")):
        for clock in Spent._fields:
            a, b = ([getattr(one, clock) for one in spent[name]] for name in (above, below))
            ratios = sorted(x / y for x, y in zip(a, b, strict=True))
            print(f"  {above} / {below}, {clock}: {statistics.median(ratios):.3f}", end="")
            print(f"  (best of each {min(a) / min(b):.3f}, rounds {ratios[0]:.2f} to {ratios[-1]:.2f})")
    print("  shares of the time of a harvest, medians")
    for part in splits[0]:
        print(f"    {part:44s} {statistics.median(split[part] for split in splits):6.1%}")


if __name__ == "__main__":
    main()
