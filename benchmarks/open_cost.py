"""The time to open a run, and to open a cache of 10,000 chunks: the cost of checking their records.

    python benchmarks/open_cost.py                         this checkout
    python benchmarks/open_cost.py --against ../before     and another checkout, each on files that it writes itself

The package in each checkout (a folder called `sae`) writes the records of a one-layer cache, without its chunks. The
script then times two operations, each in a new process, once the imports are done: opening the cache with its
manifest, as training does, and loading the SAE of a run (--run). It prints the median over several processes, and the
load of the machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

PROCESSES = 9
WRITE = """
import os, sys
from pathlib import Path
import numpy as np
from sae.cache import statistics, writer as module
from sae.cache.contexts import Contexts
from sae.cache.layout import Layout
from sae.cache.writer import CacheWriter, WindowRows

folder, chunks = Path(sys.argv[1]) / "cache", int(sys.argv[2])
layout = Layout(chunks * 8192)
contexts, length = 64, 128
document, held_out = np.arange(contexts, dtype=np.uint32), np.zeros(contexts, bool)
ids, lengths = np.zeros((contexts, length), np.uint32), np.full(contexts, length, np.uint16)
Contexts(ids, lengths, document, held_out).write(folder)
identity = {
    "format": 1, "model": {"name": "none", "revision": "0"}, "data": {"name": "none", "revision": "0"},
    "dtype": "float32", "attention": "eager", "tokenizer": "0" * 64, "tokens": layout.rows, "context": length,
    "held_out": 0.0, "skip": [], "pack": False, "seed": 0, "window_rows": layout.window_rows,
    "chunk_rows": layout.chunk_rows, "storage_dtype": "bfloat16", "compress": None,
}

# The records are those of a harvest; the chunks are not written, since opening a cache does not read them.
def chunks_to_write(self, window, rows, run=map):
    one = range(window, window + 1)
    yield "", [(array, window, None) for array in layout.origin_arrays()]
    for name in rows.bits:
        arrays = layout.activation_arrays(name, 2304)
        yield name, [(array, chunk, None) for array in arrays for chunk in layout.chunk_range(array, one)]

def describe_chunk(folder, array, chunk, rows):
    return array.chunk_file(chunk), {"bytes": array.chunk_bytes + 4, "crc32c": f"{chunk:08x}"}

numbers = {
    "count": layout.rows, "marked": 0, "max_norm": None, "norm_limit": None, "variance": 1.0, "mean_square_norm": 1.0,
    "mean_norm": 1.0, "norm_of_mean": 1.0, "norm_quantiles": {"0.5": 1.0}, "outlier_dimensions": {},
}
CacheWriter.chunks_to_write, module.write_chunk = chunks_to_write, describe_chunk
module.files_exist, statistics.array_statistics = (lambda *arguments: True), (lambda *arguments: numbers)
os.fsync = lambda descriptor: None  # the files are not meant to last
writer = CacheWriter(folder, identity, layout, {"layer_12": 2304})
for window in range(layout.n_windows):
    row = np.broadcast_to(np.uint32(0), len(layout.row_range(window)))
    writer.write_window(window, WindowRows({"layer_12": row}, row, row), {})
writer.finish()
"""
OPEN = """
import json, sys, time
from pathlib import Path
from sae.cache.reader import Cache
folder, run = Path(sys.argv[1]) / "cache", Path(sys.argv[2])
from sae import load_sae
def timed(work):
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)
def open_manifest():
    cache = Cache(folder)
    assert len(cache.manifest["files"]) > 10_000
    cache.array(cache.require_array(12))
result = {"open": timed(lambda: Cache(folder)), "open and read the manifest": timed(open_manifest)}
if run.exists():
    load_sae(run)  # the first call imports torch
    result["load the SAE of a run"] = timed(lambda: load_sae(run))
print(json.dumps(result))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="the folder of another checkout, called sae")
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--run", type=Path, default=Path("no-run"), help="a run folder to open as well")
    args = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    checkouts = [here] + ([args.against.resolve()] if args.against else [])
    print(f"{date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for checkout in checkouts:
        with tempfile.TemporaryDirectory() as folder:
            in_python(checkout, WRITE, folder, args.chunks)
            runs = [json.loads(in_python(checkout, OPEN, folder, args.run.resolve())) for _ in range(PROCESSES)]
        commit = subprocess.run(["git", "-C", checkout, "log", "-1", "--format=%h"], capture_output=True, text=True)
        print(
            f"\n{commit.stdout.strip()}, {args.chunks:,} chunks, median of {PROCESSES} processes (smallest, largest):"
        )
        for what in runs[0]:
            times = sorted(run[what] for run in runs)
            print(f"  {what:28} {statistics.median(times):7.1f} ms ({times[0]:.1f}, {times[-1]:.1f})")


def in_python(checkout: Path, script: str, *words: object) -> str:
    """The output of a script that runs with the package of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout.parent), "OMP_NUM_THREADS": "1"}
    words_of_command = [sys.executable, "-W", "ignore", "-c", script, *map(str, words)]
    done = subprocess.run(words_of_command, env=environment, capture_output=True, text=True, cwd="/")
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
