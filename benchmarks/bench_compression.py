"""Savings and cost of the compressed profile: `python benchmarks/bench_compression.py`.

The script uses rows of gemma-2-mini, which it harvests (layers 5, 12, 19; width 128), and synthetic rows of width 2304
with outlier dimensions. The cache's own code encodes and decodes each chunk, in one thread. The bound is the
compression ratio given by the order-0 entropy of each dimension's high byte; the low byte is noise and is counted in
full.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common import D_IN, in_rounds, machine, model_like_rows
from sae.cache.chunks import Shard, encode_chunk, write_chunk
from sae.cache.hooks import Hook
from sae.cache.layout import Layout
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest

LAYERS = (5, 12, 19)


def harvested_rows(folder: Path, tokens: int) -> dict[str, np.ndarray]:
    """The bfloat16 bits of each layer, shape (rows, 128)."""
    config = HarvestConfig(
        model="gemma-2-mini", layers=LAYERS, tokens=tokens, window=tokens, device="cpu", out=folder / "harvested"
    )
    cache = run_harvest(plan_harvest(config))
    chunks = range(len(cache.chunk_rows))
    return {
        f"gemma-2-mini, layer {n}": np.concatenate([cache.read_chunk(Hook(n).array, i) for i in chunks]) for n in LAYERS
    }


def entropy_bound(bits_RD: np.ndarray) -> float:
    """Compression ratio if a value took 8 bits plus the mean entropy of a dimension's high byte."""
    entropy = 0.0
    for high in (bits_RD >> 8).T:
        share = np.bincount(high, minlength=256) / len(high)
        entropy -= (share[share > 0] * np.log2(share[share > 0])).sum()
    return 16 / (8 + entropy / bits_RD.shape[1])


def table_row(name: str, bits: np.ndarray, folder: Path, rounds: int) -> str:
    array = Layout(len(bits), len(bits), compress=True).activation_arrays("layer_00", bits.shape[1])[0]
    bits = bits[: array.chunk_shape[0]]
    folder.mkdir()
    _, record = write_chunk(folder, array, 0, bits)
    shard = Shard(folder, array, 0, record["bytes"])

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started

        return run

    raw = Layout(len(bits), len(bits)).activation_arrays("layer_00", bits.shape[1])[0]
    ways = {
        "encode": timed(lambda: encode_chunk(array, bits)),
        "decode": timed(lambda: [shard.decode_block(n) for n in range(len(shard.index))]),
        "checksum": timed(lambda: encode_chunk(raw, bits)),
    }
    speeds = [bits.nbytes / statistics.median(t) / 1e6 for t in in_rounds(ways, rounds).values()]
    ratio = bits.nbytes / record["bytes"]
    return (
        f"| {name} | {bits.shape[1]} | {ratio:.3f} | {entropy_bound(bits):.3f} | "
        + " | ".join(f"{s:,.0f}" for s in speeds)
        + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens to harvest from gemma-2-mini")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", default=".", help="where caches are written and removed again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine('numcodecs', 'transformers')}\n")
    print("| rows | width | ratio | bound | encode MB/s | decode MB/s | raw chunk with its checksum MB/s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        rows = harvested_rows(Path(temporary), args.tokens) | {"synthetic": model_like_rows(8192, D_IN)}
        for number, (name, bits) in enumerate(rows.items()):
            print(table_row(name, bits, Path(temporary) / str(number), args.rounds))


if __name__ == "__main__":
    main()
