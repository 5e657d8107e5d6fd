"""The options of `sae train`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..cache.planned import PlannedCache
from ..cache.ring import RingCache
from ..common.errors import UsageError

# The flags that define a run, and the fields of TrainConfig that hold them. None of these flags can be given with
# --resume.
FIXED = {
    "--variant": "variants",
    "--layer": "layers",
    "--site": "site",
    "--module": "modules",
    "--seed": "seeds",
    "--model": "model",
    "--steps": "steps",
    "--width": "width",
    "--batch-size": "batch_size",
    "--l0": "l0",
    "--paper-exact": "paper_exact",
    "--set": "options",
    "--shuffle-seed": "shuffle_seed",
    "--out": "out",
    "--compile": "compiled",
    "--precision": "precision",
}


@dataclass(frozen=True)
class TrainConfig:
    """The options of `sae train`.

    Fields have the names of the command's flags, in the plural if a flag can be repeated.
    """

    variants: Sequence[str] = ()  # names of recipes
    layers: Sequence[int] = (12,)
    site: str = "resid_post"
    modules: Sequence[str] = ()  # modules to use instead of the site; e.g. model.layers.{layer}.mlp.gate_proj:output
    seeds: Sequence[int] = (0,)
    caches: Sequence[str | Path] = ()  # folders or addresses, read as one cache; (): the cache of the model and layer
    local_cache: int | None = None  # maximum bytes from stores to keep on the disk; None: half of the free space
    local_folder: Path | None = None  # where these bytes are kept; None: activations/.pulled
    source: RingCache | PlannedCache | None = None  # replaces caches: a cache harvested during training or later
    model: str | None = None
    steps: int | None = None  # None: one epoch of the cache
    batch_size: int | None = None  # tokens; None: the recipe's batch size
    accumulate: int | None = None  # number of equal parts of a batch; None: 1, or as in the resumed run
    width: str | None = None  # d_sae: "4x" (times d_in), "16k" or a number; None: the recipe's width
    l0: Sequence[float] = ()  # target latents per token, for every recipe; empty: the recipe's default
    paper_exact: bool = False  # the paper's settings verbatim, unscaled
    options: Mapping[str, Any] | Sequence[str] = ()  # {"k": 64, "topk.lr": 1e-3}, or "k=64", "topk.lr=1e-3"
    shuffle_seed: int = 0  # seed of the batch order, which all runs share
    resume: Sequence[Path] = ()  # run folders to resume, instead of new runs
    out: Path | None = None  # where run folders go; None: runs/
    device: str = "auto"
    log_every: int | None = None  # steps; None: `default_log_interval`
    checkpoint_every: int = 1000  # steps
    log: Sequence[str] = ()  # names of loggers
    compiled: bool = False  # compile the training step
    capture: str = "auto"  # whether the steps of a pass run as one CUDA graph: auto (if possible) or off
    precision: str | None = None  # float32, tf32 or bfloat16; None: bfloat16 on a GPU, float32 on a CPU
    origins: Mapping[str, str] = field(default_factory=dict)  # non-default flag -> "flag" or "file:line"

    def record(self) -> dict[str, Any]:
        """The config as JSON, under the keys of run.json. Two of these keys are former names of their fields."""
        on_disk = {"paper_exact": "literal", "shuffle_seed": "order_seed"}
        values = {on_disk.get(f.name, f.name): getattr(self, f.name) for f in fields(self) if f.name != "source"}
        for newer in ("modules", "accumulate", "precision", "local_cache", "local_folder"):
            if not values[newer]:
                del values[newer]  # so that the record equals records from before this option existed
        if self.capture == "auto":
            del values["capture"]
        return json.loads(json.dumps(values, default=str))


def check_seeds(*seeds: int) -> None:
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise UsageError(f"The seed {seed} is out of range: --seed and --shuffle-seed must be 0 to 2^63 - 1.")
