"""What `sae harvest` prints: its plan, its progress, what came of it."""

import os
import time
from typing import Any

from .cache import describe
from .console import QUIET, bar, echo


def run_harvest(request: Any, dry_run: bool = False) -> Any:
    """The cache; of a dry run the plan."""
    plan = show_harvest(request)
    return plan if dry_run else execute(plan)


def show_harvest(request: Any) -> Any:
    """The plan, as lines, too."""
    from ..common.files import free_space
    from ..common.formatting import format_bytes
    from ..harvest.plan import plan as resolve

    plan = resolve(request, echo)
    size = plan.tokens * plan.bytes_per_token
    show_source(plan)
    echo(
        f"size     {'' if plan.request.tokens else 'up to '}{plan.tokens:,} tokens x {plan.bytes_per_token:,} B = {format_bytes(size)}"
        f"{' before compression' if request.compress else ''}; {format_bytes(free_space(plan.folder))} free"
    )
    echo(f"time     {time_of(plan)}")
    echo(f"cache    {plan.folder}")
    return plan


def execute(plan: Any) -> Any:
    """The cache of a plan, with a bar meanwhile and what came of it as lines."""
    from ..harvest.plan import IMPLIED_VARIANCE
    from ..harvest.run import HarvestProgress, harvest

    started = time.monotonic()
    with bar("harvest", "tokens") as shown:
        cache = harvest(plan, HarvestProgress(shown, shown.say))
    for hook in plan.hooks:
        implied = IMPLIED_VARIANCE.get((cache.model, hook.layer)) if hook.site == "resid_post" else None
        expected = f" (the papers' numbers imply about {implied:g})" if implied else ""
        echo(f"{hook.array:8s} {describe(cache.statistics(hook.array))}{expected}")
    contexts = cache.contexts(held_out=False)
    special = int(contexts.length.sum()) - cache.rows
    unread = ", ".join(f"{count:,} {why} documents skipped" for why, count in plan.text.skipped.items() if count)
    echo(
        f"done     {cache.rows:,} rows of {len(contexts):,} contexts ({special:,} special tokens left out{', ' + unread if unread else ''}) "
        f"in {time.monotonic() - started:.0f} s; `sae cache verify` reads every byte again"
    )
    return cache


def time_of(plan: Any) -> str:
    """How long the model will take; of several processes the first asks for all."""
    from ..common.formatting import format_duration
    from ..harvest.plan import estimated_seconds

    if QUIET:
        return ""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    on = plan.device if processes == 1 else f"{processes} processes"
    return (
        f"about {format_duration(estimated_seconds(plan) / processes)} of the model on {on}, by the time of one block"
    )


def show_source(plan: Any) -> None:
    """What will be read and computed, as lines."""
    echo(f"model    {plan.source.name} at {plan.source.revision[:12]}, computed in {plan.dtype} on {plan.device}")
    for hook in plan.hooks:
        echo(f"hook     {hook.name} = {plan.modules[hook.array]}, {plan.widths[hook.array]} wide")
    held_out = "a tenth" if plan.identity["held_out"] == "by name" else f"{plan.request.held_out_share:.0%}"
    echo(f"text     {plan.text.name} at {plan.text.identity['revision'][:12]}, {held_out} of the documents held out")
