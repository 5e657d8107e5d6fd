"""`sae train --stream`: the harvest and training joined by a ring of windows on the disk."""

from dataclasses import replace
from functools import partial
from typing import Any

from .console import echo

RING = 4  # windows


def run_stream(request: Any, given: dict[str, Any], run_train: Any, dry_run: bool = False) -> list[Any]:
    """Train on text whose activations are removed when every run has read them. `given`: the options of --stream."""
    from ..common.errors import UsageError
    from ..common.files import folder_bytes, free_space
    from ..common.formatting import format_bytes
    from ..harvest.plan import HarvestConfig as Harvest
    from ..harvest.streaming import check_room, harvest_ahead, plan_ring
    from ..train.streaming import train_streaming

    if request.resume:
        raise UsageError("--resume cannot be given with --stream. The command that began a run goes on with it.")
    if len(request.caches) > 1:
        raise UsageError("--stream fills one folder: give --cache once, for another than the default.")
    of_harvest = {name: value for name, value in given.items() if name != "ring"}
    if request.model is not None:
        of_harvest["model"] = request.model
    folder = request.caches[0] if request.caches else None
    asked = Harvest(
        layers=request.layers,
        sites=(request.site,),
        device=request.device,
        out=folder,
        origins=request.origins,
        **of_harvest,
    )
    plan, ring = plan_ring(asked, given.get("ring", RING))
    request = replace(request, source=ring)
    for line in plan.describe_source():
        echo(line)
    bytes_of_ring = check_room(plan, ring)
    echo(
        f"size     {plan.tokens:,} tokens in {ring.layout.n_windows:,} windows of {ring.layout.window_rows:,}, at most {ring.capacity} "
        f"at a time: {format_bytes(bytes_of_ring)}; {format_bytes(free_space(plan.folder))} free"
    )
    echo(f"order    {ring.n_groups:,} groups of windows, each once; normalised by the mean and the norm of the first")
    echo(f"time     {plan.describe_time()}; training runs at the same time")
    echo(f"cache    {plan.folder}")
    beside = {plan.folder: max(bytes_of_ring - folder_bytes(plan.folder), 0)}
    runs = run_train(request, dry_run, partial(train_streaming, harvest=partial(harvest_ahead, plan, ring)), beside)
    for batch_size in sorted({run.config.batch_size for run in runs}):
        dropped = plan.tokens - ring.cumulative_batches(batch_size)[-1] * batch_size
        echo(f"dropped  {dropped:,} rows that are left over at the ends of groups, with batches of {batch_size:,}")
    return runs
