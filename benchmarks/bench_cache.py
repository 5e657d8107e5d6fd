"""How fast a cache is read: `python benchmarks/bench_cache.py [--gb 2]`.

The script writes a cache of synthetic bfloat16 rows of width 2304 with the writer that a harvest uses. The batches are
then read by our loader and by the alternatives, which take turns in random order in every round. The tables show median
times, relative to the time of copying the same bytes in memory in the same run. In `epoch 2` the files are already
mapped and their pages are in memory, because the first epoch verified and touched the chunks. The first epoch is
measured in separate processes, warm and cold; cold means that the files were dropped from the page cache.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
import zarr
from torch import Tensor

from common import (
    ARRAY,
    D_IN,
    AnonymousPeak,
    Spent,
    drop_from_page_cache,
    in_new_process,
    in_rounds,
    machine,
    make_cache,
)
from sae.cache.loader import BatchLoader, ResidentLoader, as_uint16
from sae.cache.reader import Cache

Way = Callable[[], Spent]  # per batch
SLOTS = 4


def timed(read: Callable[[int], object], count: int) -> Way:
    def run() -> Spent:
        started = Spent.now()
        for number in range(count):
            read(number)
        return Spent(*(seconds / count for seconds in Spent.since(started)))

    return run


def from_loader(
    batches: BatchLoader | ResidentLoader, count: int, compute: Callable[[Tensor], object] = lambda x_BD: None
) -> Way:
    """Time the batches of a loader, excluding those that it had already read ahead."""
    way = timed(lambda number: compute(next(batches)), count)

    def run() -> Spent:
        for _ in range(SLOTS):
            next(batches)
        return way()

    return run


def loaders(cache: Cache, packed: Cache, batch: int) -> dict[str, BatchLoader | ResidentLoader]:
    """Our loaders, each after it has read one epoch."""
    opened: dict[str, BatchLoader | ResidentLoader] = {
        "our loader": BatchLoader(cache, ARRAY, batch),
        "our loader, one thread": BatchLoader(cache, ARRAY, batch, threads=1),
        "our loader, compressed cache": BatchLoader(packed, ARRAY, batch),
        "our copy on the device (cpu)": ResidentLoader(cache, ARRAY, batch),
    }
    for loader in opened.values():
        for _ in range(loader.order.batches_per_epoch):
            next(loader)
    return opened


def alternatives(cache: Cache, batch: int, count: int, folder: Path) -> dict[str, Way]:
    """The alternatives. Slow ones read fewer batches."""
    target, source = torch.empty(batch, D_IN, dtype=torch.bfloat16), torch.randn(8, batch, D_IN).bfloat16()
    ring = [torch.zeros_like(target) for _ in range(SLOTS)]
    rows = torch.from_numpy(np.concatenate([cache.read_chunk(ARRAY, n) for n in range(8)])).view(torch.bfloat16)
    hf, opened = as_hf_dataset(rows[: 8 * batch], folder), zarr.open_array(str(cache.folder / ARRAY), mode="r")
    random, few = np.random.default_rng(0), max(2, count // 16)

    def gather(number: int) -> None:
        torch.index_select(rows, 0, torch.from_numpy(random.integers(0, len(rows), batch)), out=target)

    def zarr_slice(number: int) -> None:
        start = int(random.integers(0, opened.shape[0] - batch))
        as_uint16(target)[:] = opened[start : start + batch]

    zarr_rows = timed(lambda number: opened.oindex[np.sort(random.choice(opened.shape[0], 16, replace=False))], 1)
    return {
        "memory copy": timed(lambda number: target.copy_(source[number % 8]), count),
        f"memory copy, into {SLOTS} in turn": timed(
            lambda number: ring[number % SLOTS].copy_(source[number % 8]), count
        ),
        "torch, random rows in memory": timed(gather, count),
        "HF datasets, float32, in order": timed(
            lambda number: hf[number % 8 * batch : (number % 8 + 1) * batch]["x"], few
        ),
        "HF datasets, float32, random rows": timed(lambda number: hf[random.integers(0, len(hf), batch)]["x"], few),
        "zarr, a slice of rows": timed(zarr_slice, few),
        "zarr, random rows (16, scaled up)": lambda: Spent(*(seconds * batch / 16 for seconds in zarr_rows())),
    }


def as_hf_dataset(rows: Tensor, folder: Path) -> datasets.Dataset:
    """The rows as a Hugging Face dataset. Arrow has no bfloat16, so they are float32."""
    datasets.disable_progress_bars()
    features = datasets.Features({"x": datasets.Array2D((1, D_IN), "float32")})
    datasets.Dataset.from_dict({"x": rows.float().numpy()[:, None]}, features=features).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder)).with_format("torch")


def show(title: str, spent: dict[str, list[Spent]], batch: int) -> None:
    median = {name: Spent(*np.median(times, 0)) for name, times in spent.items()}
    base = median["memory copy"]
    print(f"\n| {title} | ms | GB/s | relative to a memory copy | the same in processor time |\n|---|---|---|---|---|")
    for name, (wall, processor) in sorted(median.items(), key=lambda item: item[1]):
        speed = f"{wall * 1e3:.2f} | {2 * batch * D_IN / wall / 1e9:.2f}"
        print(f"| {name} | {speed} | {base.wall / wall:.4f} | {base.processor / processor:.4f} |")


def show_with_compute(cache: Cache, packed: Cache, batch: int, rounds: int, milliseconds: float) -> None:
    """The time that reading a batch adds to a matrix product, with one product after every batch."""
    still, weight = torch.randn(batch, D_IN), torch.randn(D_IN, 4096)
    product = timed(lambda number: still[:64] @ weight, 20)
    product()
    rows = min(batch, max(1, round(64 * milliseconds / 1e3 / min(product().wall for _ in range(5)))))

    def compute(x_BD: Tensor) -> None:
        still[:rows] @ weight

    ways = {"the product alone": timed(lambda number: compute(still), 40)}
    opened = loaders(cache, packed, batch)
    ways |= {name: from_loader(loader, 40, compute) for name, loader in opened.items()}
    times_of = in_rounds(ways, rounds)
    for loader in opened.values():
        loader.close()
    print(f"\n| batches of {batch}, each followed by a product of {rows} rows | ms | ms more than the product alone |")
    print("|---|---|---|")
    for name, times in times_of.items():
        more = statistics.median(x.wall - y.wall for x, y in zip(times, times_of["the product alone"], strict=True))
        print(f"| {name} | {np.median(times, 0)[0] * 1e3:.2f} | {more * 1e3:+.2f} |")


def first_epoch(folder: str, batch: int, drop: bool) -> tuple[float, float, float, float]:
    """Seconds to the first batch, seconds per batch in the first and second epoch, and the peak of memory in MB."""
    torch.set_num_threads(1)
    if drop:
        drop_from_page_cache(Path(folder))
    with AnonymousPeak() as peak:
        started = time.perf_counter()
        with BatchLoader(Cache(folder), ARRAY, batch) as batches:
            next(batches)
            first = time.perf_counter() - started
            one, two = (from_loader(batches, batches.order.batches_per_epoch - SLOTS)().wall for _ in range(2))
    return first, one, two, peak.mb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=48, help="batches that each way reads in a round")
    parser.add_argument("--compute", type=float, default=5.0, help="milliseconds of computation after a batch")
    parser.add_argument("--folder", default=".", help="where caches are written and removed again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine("zarr", "datasets", "numcodecs"))
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        cache = make_cache(folder / "cache", args.gb)
        packed = make_cache(folder / "packed", args.gb / 4, compress=True)
        make_cache(folder / "small", args.gb / 4)
        # The first epochs are timed before any process has mapped the files: mapped pages stay in the page cache.
        print("\n| our loader, batches of 2048 | first batch | ms a batch, epoch 1 | epoch 2 | anonymous memory |")
        print("|---|---|---|---|---|")
        for name, size in (("small", args.gb / 4), ("cache", args.gb)):
            for drop in (False, True):
                run = functools.partial(in_new_process, first_epoch, str(folder / name), 2048, drop)
                first, one, two, mb = np.median([run() for _ in range(3)], 0)
                state = "cold" if drop else "warm"
                print(
                    f"| {size:g} GB, {state} | {first * 1e3:.0f} ms | {one * 1e3:.2f} | {two * 1e3:.2f} | {mb:.0f} MB |"
                )
        for batch in (2048, 4096):
            ways = alternatives(cache, batch, args.batches, folder / f"hf-{batch}")
            opened = loaders(cache, packed, batch)
            ways |= {name: from_loader(loader, args.batches) for name, loader in opened.items()}
            show(f"batches of {batch} x {D_IN}, epoch 2", in_rounds(ways, args.rounds), batch)
            for loader in opened.values():
                loader.close()
        show_with_compute(cache, packed, 2048, args.rounds, args.compute)


if __name__ == "__main__":
    main()
