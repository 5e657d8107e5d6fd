"""How fast a cache is read: `python benchmarks/bench_cache.py [--gb 2]`.

A cache of random bfloat16 rows of width 2304 is written through the same writer as a harvest. Then batches are read by
our loader and by what one could use instead, each into the same tensor, in rounds of one pass each, in random order;
the medians are printed beside a memory copy of the same bytes in the same run. Warm means in the page cache.
"""

import argparse
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zarr

from sae.cache.batches import Batches, Plan
from sae.cache.layout import Layout
from sae.cache.reader import Cache
from sae.cache.writer import Writer

D_IN, LAYER, CONTEXT = 2304, 12, 128


def make_cache(folder: Path, gigabytes: float) -> Cache:
    """Rows as a harvest writes them; what is not read here (the text) is small and regular."""
    from sae.cache.contexts import Contexts

    layout = Layout(int(gigabytes * 1e9) // (2 * D_IN) // CONTEXT * CONTEXT, window_rows=65_536)
    n = layout.rows // CONTEXT
    Contexts(
        np.zeros((n, CONTEXT), np.uint32),
        np.full(n, CONTEXT, np.uint16),
        np.arange(n, dtype=np.uint32),
        np.zeros(n, bool),
    ).write(folder)
    writer = Writer(folder, {"made by": "bench_cache"}, layout, {LAYER: D_IN})
    generator = torch.Generator().manual_seed(0)
    for window in writer.missing():
        rows = layout.window(window)
        bits = torch.randn(len(rows), D_IN, generator=generator).bfloat16().view(torch.int16).numpy().view(np.uint16)
        at = np.arange(rows.start, rows.stop)
        writer.write_window(
            window, {LAYER: bits}, (at // CONTEXT).astype(np.uint32), (at % CONTEXT).astype(np.uint16), {}
        )
    writer.finish()
    return Cache(folder)


def readers(cache: Cache, batch: int, folder: Path) -> dict[str, Callable[[int], float]]:
    """Name -> function that reads a number of batches and returns the seconds a batch took."""
    target = torch.empty(batch, D_IN, dtype=torch.bfloat16)
    bits = target.view(torch.int16).numpy().view(np.uint16)
    array = cache.require(LAYER)
    plan = Plan(cache.chunk_rows(LAYER), batch, seed=0)
    source = torch.randn(8, batch, D_IN).bfloat16()
    opened = zarr.open_array(str(cache.folder / array), mode="r")
    rng = np.random.default_rng(0)

    def timed(read: Callable[[int], object]) -> Callable[[int], float]:
        def run(count: int) -> float:
            started = time.perf_counter()
            for number in range(count):
                read(number)
            return (time.perf_counter() - started) / count

        return run

    def loader(count: int) -> float:
        with Batches(cache, LAYER, batch, seed=0) as batches:
            next(batches)
            started = time.perf_counter()
            for _ in range(count):
                next(batches)
            return (time.perf_counter() - started) / count

    def mapped(number: int) -> None:
        at = 0
        for piece in plan.pieces(number):
            rows = cache.chunk(array, piece.chunk)[piece.start : piece.start + piece.rows]
            np.copyto(bits[at : at + piece.rows], rows)
            at += piece.rows

    whole = np.concatenate([cache.chunk(array, i) for i in range(len(cache.chunk_rows(LAYER)))][:8])
    in_memory = torch.from_numpy(whole).view(torch.bfloat16)
    hf = as_hf_dataset(whole[: 16 * batch], folder)

    def gathered(number: int) -> None:
        torch.index_select(in_memory, 0, torch.from_numpy(rng.integers(0, len(in_memory), batch)), out=target)

    def zarr_rows(number: int) -> None:
        opened.oindex[np.sort(rng.choice(opened.shape[0], 64, replace=False))]

    def zarr_slices(number: int) -> None:
        start = int(rng.integers(0, opened.shape[0] - batch))
        bits[:] = opened[start : start + batch]

    found = {
        "memory copy": timed(lambda number: target.copy_(source[number % 8])),
        "our loader (2 threads, ring of 4)": loader,
        "our plan, one thread, no ring": timed(mapped),
        "random rows of a tensor in memory": timed(gathered),
        "HF datasets, float32, sequential": timed(
            lambda number: hf[number % 16 * batch : (number % 16 + 1) * batch]["x"]
        ),
        "zarr, one slice of a batch": timed(zarr_slices),
    }
    zarr_64 = timed(zarr_rows)
    found["zarr, random rows (64, scaled up)"] = lambda count: zarr_64(max(1, count // 16)) * batch / 64
    return found


def as_hf_dataset(bits: np.ndarray, folder: Path):
    """The same rows as Arrow stores them: it has no bfloat16, so float32."""
    import datasets

    datasets.disable_progress_bars()
    values = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    features = datasets.Features({"x": datasets.Array2D((1, D_IN), "float32")})
    made = datasets.Dataset.from_dict({"x": values[:, None]}, features=features)
    made.save_to_disk(str(folder / "hf"))
    return datasets.load_from_disk(str(folder / "hf")).with_format("torch")


PEAK = """
import sys, time
from sae.cache.reader import Cache
from sae.cache.batches import Batches
started = time.perf_counter()
with Batches(Cache(sys.argv[1]), 12, 4096) as batches:
    next(batches)
    first = time.perf_counter() - started
    for _ in range(min(200, 2 * batches.plan.batches_per_epoch)):
        next(batches)
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            anonymous = int(line.split()[1]) / 1e3
print(f"{first * 1e3:.0f} ms to the first batch, {anonymous:.0f} MB of memory of its own")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=64, help="batches a round")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, {platform.system()}, torch {torch.__version__}, zarr {zarr.__version__}"
    )
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        cache = make_cache(folder / "cache", asked.gb)
        for batch in (2048, 4096):
            ways = readers(cache, batch, folder / str(batch))
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(asked.rounds):
                for name in random.sample(list(ways), len(ways)):
                    slow = name.startswith(("zarr", "HF"))
                    times[name].append(ways[name](max(2, asked.batches // (16 if slow else 1))))
            base = statistics.median(times["memory copy"])
            print(
                f"\nbatches of {batch} x {D_IN} bfloat16 from {asked.gb:g} GB, warm, medians of {asked.rounds} rounds"
            )
            for name, found in sorted(times.items(), key=lambda item: statistics.median(item[1])):
                t = statistics.median(found)
                print(
                    f"  {name:36s} {t * 1e3:9.2f} ms  {2 * batch * D_IN / t / 1e9:7.2f} GB/s  {base / t:6.3f} of a memory copy"
                )
        small = make_cache(folder / "small", asked.gb / 4)
        for one, size in ((small, asked.gb / 4), (cache, asked.gb)):
            told = subprocess.run(
                [sys.executable, "-c", PEAK, str(one.folder)], capture_output=True, text=True, check=True
            )
            print(f"\na cache of {size:g} GB: {told.stdout.strip()}", end="")
    print(f"\npeak memory of this script: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
