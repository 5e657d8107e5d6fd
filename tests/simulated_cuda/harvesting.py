"""A harvest on the simulated GPU, beside the same on the CPU."""

from pathlib import Path
from typing import Any

from sae.cache.reader import Cache
from sae.harvest import windows
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest

from .functions import simulated_gpu
from .ledger import Ledger, watched


def harvest(folder: Path, **config: Any) -> dict[str, Any]:
    """The same rows of `config` on both devices, in cpu/ and cuda/ of `folder`.

    Returns the chunk files that are not equal byte for byte (`apart`), how many there are, what made the host wait
    between two passes of the model (`waits`), and how many copies were queued.
    """
    seen: list[Ledger] = []
    expected = run_harvest(plan_harvest(HarvestConfig(**config, device="cpu", out=folder / "cpu")))
    with simulated_gpu(), watched(windows.WindowComputer, "_compute_batch", seen):
        found = run_harvest(plan_harvest(HarvestConfig(**config, device="cuda", out=folder / "cuda")))
    files = chunk_files(expected)
    assert files == chunk_files(found)
    return {
        "chunks": len(files),
        "apart": [
            name for name in files if (found.folder / name).read_bytes() != (expected.folder / name).read_bytes()
        ],
        "passes": len(seen),
        "waits": sorted({wait for ledger in seen for wait in ledger.waits}),
        "queued": sum(ledger.queued for ledger in seen),
    }


def chunk_files(cache: Cache) -> list[str]:
    return sorted(str(path.relative_to(cache.folder)) for path in cache.folder.glob("*/c.*"))
