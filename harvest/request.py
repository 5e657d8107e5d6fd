"""harvest.json: the request for a cache, from which `sae cache repair` repeats the harvest."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cache.reader import read_hook_modules
from ..common.cache_schemas import HARVEST_RECORD
from ..common.environment import environment_record
from ..common.errors import DamagedError
from ..common.locks import held_if_possible
from ..common.records import as_read
from ..common.special_tokens import token_text
from .plan import HarvestPlan

OF_ONE_PROCESS = ("share", "prepare")  # options that do not describe the cache


def request_of(plan: HarvestPlan) -> dict[str, Any]:
    """The content of harvest.json: the last request for this cache, with which `sae cache repair` harvests again.

    Paths are absolute and Hub revisions pinned, so the request works from any folder and after the Hub has changed.
    Each window's commit file records the settings that the window was harvested with.
    """
    record = asdict(plan.config)
    record["adapters"] = [str(Path(one).resolve()) if Path(one).exists() else one for one in plan.config.adapters]
    for name in ("adapters", "compiled"):
        if not record[name]:
            del record[name]
    for name in ("model", "dataset"):
        if record[name] and Path(record[name]).exists():
            record[name] = str(Path(record[name]).resolve())
    record |= {name: list(getattr(plan.config, name)) for name in ("skip_tokens", "roles")}
    if plan.source.on_hub:
        record["revision"] = plan.source.revision
    if "split" in plan.text.identity:  # a dataset of the Hub
        record["dataset_revision"] = plan.text.identity["revision"]
    if unreadable := plan.unreadable_rows():
        record["unreadable"] = unreadable
    record["origins"] = {name: at for name, at in plan.config.origins.items() if name not in OF_ONE_PROCESS}
    not_recorded = ("layers", "sites", "modules", "device", "out", *OF_ONE_PROCESS)
    record = {name: value for name, value in record.items() if name not in not_recorded}
    bos_id = plan.context_format.bos_id
    record["bos_token"] = None if bos_id is None else token_text(plan.tokenizer, bos_id)
    modules = read_hook_modules(plan.folder) | plan.modules  # keeps the modules of layers harvested earlier
    environment = environment_record()
    environment["variables"].pop("WORLD_SIZE", None)  # the number of processes does not change the cache
    return record | {
        "device": plan.device if ":" in plan.config.device else plan.device.partition(":")[0],
        "modules": dict(sorted(modules.items())),
        "environment": environment,
    }


@contextlib.contextmanager
def request_turn(folder: Path) -> Iterator[None]:
    """A context manager that locks harvest.json, so that tasks that add layers do not lose each other's entries."""
    lock = folder / ".lock.request"
    with held_if_possible(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def request_differs(plan: HarvestPlan) -> bool:
    """Whether harvest.json is missing or differs from this plan in anything but environment and device."""
    ours, path = as_read(request_of(plan)), plan.folder / "harvest.json"
    with contextlib.suppress(DamagedError):  # also raised if it is missing
        theirs = HARVEST_RECORD.read(path)
        return any(theirs.get(name) != ours[name] for name in ours.keys() - {"environment", "device"})
    return True
