"""Our side of a comparison: `python ours.py rows.bin folder [--no-flush] [--check]` prints a line of JSON."""

import argparse
import contextlib
import os
from collections.abc import Generator
from pathlib import Path

import feed
import numpy as np
import torch
import zarr

from sae.cache.contexts import Contexts
from sae.cache.layout import Layout
from sae.cache.loader import BatchLoader
from sae.cache.reader import Cache
from sae.cache.writer import CacheWriter, WindowRows
from sae.common.locks import writer_lock

LAYER = "layer_12"
IDENTITY = {"model": {"name": "none"}, "data": {"name": "benchmarks/peers"}}


def write(folder: Path, fed: np.ndarray) -> None:
    """Write a cache as a harvest does: the text, then windows of shuffled rows, each committed, then the seal."""
    n = len(fed)
    layout = Layout(n * feed.CONTEXT)
    with writer_lock(folder, "benchmark"):
        documents = np.arange(n, dtype=np.uint32)
        Contexts(feed.ids(n), np.full(n, feed.CONTEXT, np.uint16), documents, np.zeros(n, bool)).write(folder)
        writer = CacheWriter(folder, IDENTITY, layout, {LAYER: feed.D_IN})
        for window in writer.missing_windows():
            rows = layout.row_range(window)
            slot = np.random.default_rng(window).permutation(len(rows))
            bits = np.empty((len(rows), feed.D_IN), np.uint16)
            row_ctx, row_pos = np.empty(len(rows), np.uint32), np.empty(len(rows), np.uint16)
            for row in range(rows.start, rows.stop, feed.TOKENS_A_BATCH):  # this step divides a window evenly
                number = np.arange(row, row + feed.TOKENS_A_BATCH)
                target = slot[number - rows.start]
                first = row // feed.CONTEXT
                bits[target] = fed[first : first + feed.BATCH_CONTEXTS].reshape(-1, feed.D_IN)
                row_ctx[target], row_pos[target] = np.divmod(number, feed.CONTEXT)
            writer.write_window(window, WindowRows({LAYER: bits}, row_ctx, row_pos), {})
        writer.finish()


def batches(folder: Path, batch: int, target: torch.Tensor | None = None) -> Generator[torch.Tensor]:
    """An endless iterator of batches; if `target` is given, they are copied into it and so converted to its dtype."""
    with BatchLoader(Cache(folder), LAYER, batch) as found:
        for rows in found:
            yield rows if target is None else target.copy_(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-flush", action="store_true", help="do not flush files, like the peer")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    fed = feed.load(args.rows)
    if args.no_flush:
        os.fsync = lambda descriptor: None
        feed.print_result({"write": fed.size / feed.D_IN / feed.timed(lambda: write(args.folder, fed))})
        return

    tokens = fed.size // feed.D_IN
    result = {
        "versions": f"torch {torch.__version__}, zarr {zarr.__version__}",
        "write": tokens / feed.timed(lambda: write(args.folder, fed)),
        "bytes": feed.size(args.folder),
    }
    result |= feed.passes(args.folder, tokens, lambda batch: batches(args.folder, batch))
    in_float32 = feed.passes(
        args.folder, tokens, lambda batch: batches(args.folder, batch, torch.empty(batch, feed.D_IN))
    )
    result |= {f"{name} float32": rate for name, rate in in_float32.items()}
    if args.check:
        cache = Cache(args.folder)
        held = (cache.read_chunk(LAYER, i) for i in range(len(cache.chunk_rows)))
        with contextlib.closing(batches(args.folder, 4096)) as served:
            given = [
                feed.row_hashes(next(served).view(torch.int16).numpy().view(np.uint16)) for _ in range(tokens // 4096)
            ]
        result["check"] = feed.check(fed, map(feed.row_hashes, held), given)
    feed.print_result(result)


if __name__ == "__main__":
    main()
