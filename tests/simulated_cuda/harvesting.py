"""A harvest on the simulated GPU, beside the same on the CPU."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sae.cache.reader import Cache
from sae.common.errors import Interrupted
from sae.harvest import device_window, windows
from sae.harvest.description import describe_harvest
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.progress import HarvestProgress
from sae.harvest.run import run_harvest
from sae.harvest.windows import WindowComputer

from .functions import Memory, simulated_gpu
from .ledger import Ledger, watched


def harvest(folder: Path, case: str = "", **config: Any) -> dict[str, Any]:
    """Harvest the same rows on both devices, into cpu/ and cuda/ of `folder`. `case`: see `made_difficult`.

    Returns the names of the chunk files that differ (`apart`), the number of chunk files (`chunks`), the number of
    forward passes (`passes`), what made the host wait while a window was computed and sent (`waits`), how many copies
    were queued (`queued`), and the messages of the plan and of the harvest (`said`).
    """
    passes: list[Ledger] = []
    windows_seen: list[Ledger] = []
    said: list[str] = []
    expected = run_harvest(plan_harvest(HarvestConfig(**config, device="cpu", out=folder / "cpu")))
    with (
        simulated_gpu(),
        made_difficult(case),
        watched(WindowComputer, "_compute", windows_seen),
        watched(WindowComputer, "_compute_batch", passes),
    ):
        plan = plan_harvest(HarvestConfig(**config, device="cuda", out=folder / "cuda"))
        described = [line for line in describe_harvest(plan) if line.startswith("window ")]
        while True:
            with contextlib.suppress(Interrupted):
                found = run_harvest(plan, HarvestProgress(say=said.append))
                break
    files = chunk_files(expected)
    assert files == chunk_files(found)
    return {
        "chunks": len(files),
        "apart": [
            name for name in files if (found.folder / name).read_bytes() != (expected.folder / name).read_bytes()
        ],
        "passes": len(passes),
        "waits": sorted({wait for ledger in windows_seen for wait in ledger.waits}),
        "queued": [sum(ledger.queued for ledger in seen) for seen in (passes, windows_seen)],
        "said": described + said,
    }


@contextlib.contextmanager
def made_difficult(case: str) -> Iterator[None]:
    """Simulate one of these cases:

    - "little memory": the GPU has too little memory for a window
    - "memory that ends": the GPU runs out of memory during a window
    - "Ctrl-C": the harvest is interrupted in a window, and later continues the window's draft
    - "no pinned memory": the system cannot pin memory
    """
    compute, full = WindowComputer._compute_batch, torch.OutOfMemoryError("CUDA out of memory")
    calls = 0

    def fail_once(computer: WindowComputer, *given: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise full if case == "memory that ends" else KeyboardInterrupt
        return compute(computer, *given)

    with contextlib.ExitStack() as stack:
        if case == "little memory":
            stack.enter_context(mock.patch.object(Memory, "free", 1 << 10))
        elif case in ("memory that ends", "Ctrl-C"):
            stack.enter_context(mock.patch.object(WindowComputer, "_compute_batch", fail_once))
            stack.enter_context(mock.patch.object(windows, "WORTH_SAVING", 0))
        elif case == "no pinned memory":
            stack.enter_context(mock.patch.object(windows, "host_memory", partial(host_memory_of, full)))
        yield


def host_memory_of(error: Exception, rows: int, widths: Mapping[str, int], *, pinned: bool) -> dict[str, Tensor]:
    assert pinned
    with mock.patch.object(device_window.torch, "empty", partial(empty, torch.empty, error)):
        return device_window.host_memory(rows, widths, pinned=True)


def empty(original: Callable[..., Tensor], error: Exception, *size: Any, **options: Any) -> Tensor:
    if options.get("pin_memory"):
        raise error
    return original(*size, **options)


def chunk_files(cache: Cache) -> list[str]:
    return sorted(str(path.relative_to(cache.folder)) for path in cache.folder.glob("*/c.*"))
