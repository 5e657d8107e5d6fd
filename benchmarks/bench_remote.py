"""Training from an object store against training from a disk: `python benchmarks/bench_remote.py [--rounds 3]`.

A cache of synthetic bfloat16 rows is kept in a folder and in a store on loopback. The store is a server that this
script starts in another process; it sends files as fast as it can or at a fixed rate (moto's server, which the tests
use, is slower than any real store). Each round trains the same run several times, in random order: from the disk, from
the store at full speed, and from the store through slower links. With the store, the local folder has room for only
part of the cache. Each training run has its own process and an empty local folder. The chunks of the first batches are
downloaded before training begins; `after ten steps` is the speed without the first ten steps. Ratios are taken within a
round; the tables have the medians of these ratios over rounds. `needed` is the rate at which training reads.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from common import machine, make_cache
from sae.cache.pulled_files import walk

PIECE = 1 << 18  # bytes that are sent at a time
WAYS = ("store", "link at 2x", "link at 0.5x")
CHUNK_ROWS = 1024  # an eighth of the usual size, so that a small cache has as many chunks per lane as a large one


class Files(SimpleHTTPRequestHandler):
    """Serves a folder over HTTP/1.1, without range requests. All connections together get `rate` bytes per second."""

    protocol_version = "HTTP/1.1"
    rate = float("inf")
    lock, free_at, requests = threading.Lock(), [0.0], [0]

    def copyfile(self, source: Any, outputfile: Any) -> None:
        self.requests[0] += 1
        while piece := source.read(PIECE):
            with self.lock:
                self.free_at[0] = max(self.free_at[0], time.monotonic()) + len(piece) / self.rate
                wait = self.free_at[0] - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            outputfile.write(piece)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


def serve(folder: str, rate: float) -> None:
    """Serve a folder, print the port, and count requests until standard input ends."""
    Files.rate = rate
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Files(*a, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    print(Files.requests[0], flush=True)


def train(place: str, out: str, local: str, size: int, steps: int, width: int, batch_size: int) -> None:
    """Train one run, and print the seconds of its steps, the seconds spent waiting, and what was downloaded."""
    import torch

    from sae.cache.local_folder import OPENED
    from sae.train.plan import TrainConfig, plan_training
    from sae.train.progress import TrainProgress
    from sae.train.run import run_training

    torch.set_num_threads(1)
    config = TrainConfig(
        ["topk"], layers=[12], caches=[place], out=Path(out), local_folder=Path(local), local_cache=size, steps=steps,
        batch_size=batch_size, width=str(width), device="cpu", checkpoint_every=10**9, log_every=10,
    )  # fmt: skip
    plan, times, waited, processor = plan_training(config), [time.perf_counter()], [0.0], time.process_time()

    def note(step: int, steps: int, metrics: dict[str, dict[str, float]]) -> None:
        times.append(time.perf_counter())
        waited[0] = max((line["waited_for_data"] for line in metrics.values()), default=waited[0])

    run_training(plan, TrainProgress(step=note))
    pulled = next((one.pulled_bytes for one in OPENED.values()), 0)
    result = {"seconds": times[-1] - times[0], "after_ten": times[-1] - times[1]}
    result["processor"] = time.process_time() - processor
    print(json.dumps({**result, "waited": waited[0], "pulled": pulled}))


@contextmanager
def served(folder: Path, rate: float) -> Any:
    """The address of a folder that another process serves, and a list that receives the number of requests at the
    end."""
    words = [sys.executable, __file__, "--serve", str(folder), str(rate)]
    requests: list[int] = []
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}", requests
        process.stdin.close()
        requests.append(int(process.stdout.readline()))


def measure(place: str, folder: Path, size: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train in a new process, and watch the size of the local folder."""
    numbers = [size, arguments.steps, arguments.width, arguments.batch_size]
    with tempfile.TemporaryDirectory(dir=folder) as work:
        local = Path(work) / "local"
        words = [sys.executable, __file__, "--train", place, f"{work}/runs", str(local), *map(str, numbers)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "SAE_HOME": work})
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(bytes for name, bytes in walk(local, "") if "/" in name))
            time.sleep(0.02)
        assert process.stdout is not None and process.returncode == 0
        return {**json.loads(process.stdout.read()), "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=0.3)
    parser.add_argument("--share", type=float, default=0.6, help="share of the cache that fits into the local folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument(
        "--way", action="append", choices=WAYS, help="compare only this way with the disk; can be repeated"
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=7, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.way = arguments.way or list(WAYS)
    if arguments.serve:
        return serve(arguments.serve[0], float(arguments.serve[1]))
    if arguments.train:
        return train(*arguments.train[:3], *map(int, arguments.train[3:]))
    print(machine())
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        cache = make_cache(folder / "cache", arguments.gb, most=CHUNK_ROWS)
        size = int(arguments.share * arguments.gb * 1e9)
        disk = measure(str(cache.folder), folder, size, arguments)
        needed = 2 * arguments.batch_size * 2304 * arguments.steps / disk["seconds"]
        ways = {"disk": None, "store": float("inf"), "link at 2x": 2 * needed, "link at 0.5x": 0.5 * needed}
        ways = {way: ways[way] for way in ("disk", *arguments.way)}
        rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for number in range(arguments.rounds):
            order = list(ways)
            random.Random(number).shuffle(order)
            for way in order:
                rate = ways[way]
                if rate is None:
                    rounds[way].append(measure(str(cache.folder), folder, size, arguments))
                    continue
                with served(cache.folder, rate) as (address, requests):
                    result = measure(address, folder, size, arguments)
                rounds[way].append({**result, "requests": requests[0]})
        show(rounds, needed, size)


def show(rounds: dict[str, list[dict[str, float]]], needed: float, size: int) -> None:
    """Print the table."""
    print(f"needed {needed / 1e6:.1f} MB/s; the local folder may hold {size / 1e9:.2f} GB\n")
    columns = [
        "from",
        "speed / disk's speed",
        "after ten steps",
        "processor time / disk's",
        "time spent waiting",
        "downloaded",
        "requests",
    ]
    print(f"| {' | '.join([*columns, 'most in the folder'])} |\n{'|---' * 8}|")
    for way, results in rounds.items():
        pairs = list(zip(rounds["disk"], results, strict=True))
        speed = statistics.median(disk["seconds"] / other["seconds"] for disk, other in pairs)
        steady = statistics.median(disk["after_ten"] / other["after_ten"] for disk, other in pairs)
        work = statistics.median(other["processor"] / disk["processor"] for disk, other in pairs)
        middle = {key: statistics.median(result.get(key, 0) for result in results) for key in [*results[0], "requests"]}
        numbers = [f"{speed:.2f}", f"{steady:.2f}", f"{work:.2f}", f"{middle['waited'] / middle['seconds']:.0%}"]
        numbers += [f"{middle['pulled'] / 1e9:.2f} GB", f"{middle['requests']:.0f}"]
        most = max(result["peak"] for result in results)
        print(f"| {' | '.join([way, *numbers, f'{most / 1e9:.2f} GB'])} |")


if __name__ == "__main__":
    main()
