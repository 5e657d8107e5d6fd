"""Shuffle quality of a cache's batches: `python benchmarks/shuffle_quality.py`. Uses row numbers only, no data.

Row r of a harvest belongs to context r // L, since contexts are shuffled before they are harvested. Each window is
permuted as in `harvest.run`, and batches follow the loader's own order. For comparison: rows in file order, the
half-refilled buffer of SAELens and dictionary_learning (permute, serve half, refill), and a fresh permutation of all
rows.

    P                  the number of other rows of its own context that a row meets in its batch; the closed form for
                       this design is B L (1/(lanes W) + 1/T)
    rank correlation   between the positions of the rows in one epoch and in the next: 0 is as good as a fresh
                       permutation
    moved              mean distance between these positions, as a fraction of T; 1/3 for a fresh permutation
"""

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from common import machine
from sae.cache.batch_order import BatchOrder
from sae.cache.layout import Layout

Order = Callable[[int], np.ndarray]  # epoch -> the rows in the order in which they are served


def generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=list(key)))


def harvested_rows(layout: Layout, seed: int) -> np.ndarray:
    """For each position in the cache, the index in the text of the row that harvest.windows places there."""
    placed = np.empty(layout.rows, np.int64)
    for window in range(layout.n_windows):
        rows = layout.row_range(window)
        slot = generator(seed, rows.start).permutation(len(rows))
        placed[rows.start + slot] = np.arange(rows.start, rows.stop)
    return placed


def ours(layout: Layout, batch: int, seed: int) -> Order:
    rows = harvested_rows(layout, seed)
    first = np.arange(0, layout.rows, layout.chunk_rows)
    plan = BatchOrder(np.diff([*first, layout.rows]).tolist(), batch, seed)

    def order(epoch: int) -> np.ndarray:
        start = epoch * plan.batches_per_epoch
        pieces = (piece for n in range(plan.batches_per_epoch) for piece in plan.spans(start + n))
        return np.concatenate([rows[first[p.chunk] + p.start :][: p.rows] for p in pieces])

    return order


def half_refill(rows: int, size: int, seed: int) -> Order:
    """Permute the buffer, serve half of it, refill it from the file."""

    def order(epoch: int) -> np.ndarray:
        random, served, held = generator(seed, epoch), [], np.arange(size)
        for start in range(size, rows, size // 2):
            held = held[random.permutation(len(held))]
            served.append(held[: len(held) // 2])
            held = np.concatenate([held[len(held) // 2 :], np.arange(start, min(rows, start + size // 2))])
        return np.concatenate([*served, held[random.permutation(len(held))]])

    return order


def ways(layout: Layout, batch: int, buffer: int, seed: int) -> Iterator[tuple[str, Order]]:
    yield "file order", lambda epoch: np.arange(layout.rows)
    yield f"half-refill buffer of {buffer:,} rows", half_refill(layout.rows, buffer, seed)
    yield "ours", ours(layout, batch, seed)
    yield "permutation of all", lambda epoch: generator(seed, epoch).permutation(layout.rows)


def mixing(rows: np.ndarray, batch: int, context: int, sample: int) -> dict[str, float]:
    """Means over `sample` batches spread over the epoch."""
    whole, found = len(rows) // batch, []
    for number in np.linspace(0, whole - 1, sample).astype(int):
        _, counts = np.unique(rows[number * batch :][:batch] // context, return_counts=True)
        partners = (counts * (counts - 1)).sum() / batch
        found.append((partners, 1 - (counts == 1).sum() / batch, len(counts)))
    return dict(zip(("partners", "met", "contexts"), np.mean(found, 0), strict=True))


def moving(served: list[np.ndarray], rows: int) -> dict[str, float]:
    """Rank correlation and mean distance of the positions of rows in two epochs, for rows served in both."""
    place = np.full((2, rows), -1, np.int64)
    for epoch in range(2):
        place[epoch, served[epoch]] = np.arange(len(served[epoch]))
    first, second = place[:, (place >= 0).all(0)]  # almost ranks: each epoch leaves out a few rows
    return {
        "correlation": float(np.corrcoef(first, second)[0, 1]),
        "moved": float(np.abs(first - second).mean() / rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1 << 24)
    parser.add_argument("--context", type=int, action="append", help="repeatable; default: 128 and 1024")
    parser.add_argument("--batch-size", type=int, action="append", help="repeatable; default: 2048 and 4096")
    parser.add_argument("--buffer", type=int, default=1 << 18, help="rows of the peers' buffer, 1.2 GB at width 2304")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=200, help="number of batches of an epoch that are examined")
    args = parser.parse_args()
    layout, contexts = Layout(args.rows), args.context or [128, 1024]
    print(machine())
    print(f"{args.rows:,} rows in windows of {layout.window_rows:,}; means of {args.seeds} seeds (and the range of P)")
    print("\n| batch B | context L | order | P | rows with P > 0 | contexts in a batch | rank correlation | moved |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in args.batch_size or (2048, 4096):
        found: dict[tuple[int, str], list[dict[str, float]]] = {}
        for seed in range(args.seeds):
            for name, order in ways(layout, batch, args.buffer, seed):
                served = [order(epoch) for epoch in range(2)]
                moved = moving(served, args.rows)
                for context in contexts:
                    mixed = mixing(served[0], batch, context, args.sample)
                    found.setdefault((context, name), []).append(mixed | moved)
        lanes = BatchOrder([args.rows], batch, 0).lanes
        for (context, name), seeds in sorted(found.items(), key=lambda item: item[0][0]):
            mean = {key: float(np.mean([one[key] for one in seeds])) for key in seeds[0]}
            spread = f"{min(one['partners'] for one in seeds):.3f} to {max(one['partners'] for one in seeds):.3f}"
            formula = batch * context * (1 / (lanes * layout.window_rows) + 1 / args.rows)
            closed = f", closed form {formula:.3f}" if name == "ours" else ""
            print(
                f"| {batch} | {context} | {name} | {mean['partners']:.3f} ({spread}{closed}) | {mean['met']:.1%} "
                f"| {mean['contexts']:,.0f} | {mean['correlation']:.3f} | {mean['moved']:.3f} |"
            )


if __name__ == "__main__":
    main()
