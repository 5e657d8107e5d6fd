"""Measure everything that depends on a GPU, in at most eight minutes on an H200: `python benchmarks/gpu/run.py`.

It needs torch for CUDA and an installation of this checkout; nothing is downloaded. Each part runs in its own process
with a time limit, and its results are written at once to the file given by --out, so a part that fails or hangs loses
only its own results. `benchmarks/gpu_report.py FILE` makes a page from that file. With --simulated the parts run at
small sizes on the tests' simulated GPU, which exercises the code and measures nothing.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIMITS = {  # seconds of each part, the most important first
    "ceilings": 30, "steps": 110, "harvest": 90, "recipes": 90, "border": 30, "kernels": 40, "resume": 40,
    "checkpoints": 30, "loader": 30, "core": 60,
}  # fmt: skip
WHOLE = 480.0  # seconds


def simulate(folder: Path) -> None:
    """Load the simulated GPU, which must be loaded before torch is imported."""
    from sae.tests.simulated_cuda.build import build_hooks

    ctypes.CDLL(str(build_hooks(folder)), mode=ctypes.RTLD_GLOBAL)
    import torch

    from sae.tests.simulated_cuda.functions import install

    install()
    torch.set_num_threads(1)
    cuda: Any = torch.cuda
    cuda.set_sync_debug_mode = cuda.reset_peak_memory_stats = lambda *_: None
    cuda.max_memory_allocated = cuda.memory_allocated


def run_part(name: str, simulated: bool, limit: float) -> Iterator[tuple[str, Any]]:
    """Yield the results of a part as they arrive, then its seconds, then its error if it failed or took too long."""
    started = time.monotonic()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(name, simulated, theirs))
    process.start()
    theirs.close()
    error = f"stopped after {limit:.0f} s"
    while ours.poll(max(0.0, started + limit - time.monotonic())):
        try:
            key, found = ours.recv()
        except EOFError:
            process.join(10)
            error = "" if process.exitcode == 0 else f"its process ended with {process.exitcode}"
            break
        yield key, found
    if process.is_alive():
        process.kill()
    yield "seconds", time.monotonic() - started
    if error:
        yield "error", error


def work(name: str, simulated: bool, results: Connection) -> None:
    """Run a part; called in the part's own process."""
    import ceilings
    import data
    import steps
    from sizes import SMALL, Sizes

    modules: tuple[Any, ...] = (ceilings, steps, data)
    part = next(vars(module)[name] for module in modules if name in vars(module))
    context: Any = nullcontext()
    if simulated:
        from sae.tests.simulated_cuda.functions import simulated_gpu

        context = simulated_gpu()
    with context:
        try:
            for key, found in part(SMALL if simulated else Sizes()):
                results.send(("found", {key: found}))
        except Exception as error:  # the other parts continue
            results.send(("error", f"{type(error).__name__}: {error}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(f"{date.today()}-gpu.json"), help="(%(default)s)")
    parser.add_argument("--part", action="append", choices=LIMITS, help="default: all; can be repeated")
    parser.add_argument("--seconds", type=float, default=WHOLE, help="for all parts together (%(default)s)")
    parser.add_argument("--simulated", action="store_true", help="try the code on the simulated GPU")
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # look for a GPU without starting CUDA, so that forks work
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if args.simulated:
            simulate(Path(folder))
        import data  # noqa: F401  (imported once, before the processes are forked; none of it starts CUDA)
        import steps  # noqa: F401

        record: dict[str, Any] = {"date": str(date.today()), "simulated": args.simulated, "parts": {}}
        for name in args.part or LIMITS:
            left = started + args.seconds - time.monotonic()
            part = record["parts"][name] = {"found": {}}
            limit = min(LIMITS[name] * (5 if args.simulated else 1), left)
            for key, value in run_part(name, args.simulated, limit) if left > 5 else [no_time()]:
                if key == "found":
                    part["found"] |= value
                else:
                    part[key] = value
                temporary = args.out.with_name(f"{args.out.name}.tmp")
                temporary.write_text(json.dumps(record, indent=1))
                temporary.replace(args.out)
            print(f"{name:12s} {part.get('seconds', 0):6.1f} s  {part.get('error') or count(part)}")
    print(f"{args.out} is written. A page of it: python benchmarks/gpu_report.py {args.out}")
    sys.exit(any("error" in part for part in record["parts"].values()))


def count(part: dict[str, Any]) -> str:
    failed = sum("error" in found for found in part["found"].values())
    return f"{len(part['found'])} results" + (f", {failed} of them errors" if failed else "")


def no_time() -> tuple[str, str]:
    return "error", "not run: no time was left"


if __name__ == "__main__":
    main()
