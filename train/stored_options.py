"""The options that a run was started with. run.json records them, and they override defaults that have changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import DamagedError
from ..common.schemas import RUN_RECORD, RunRecord


def stored_options(record: RunRecord | None, folder: Path) -> dict[str, Any] | None:
    """All options with which a run was started, from its run.json; None if there is no record."""
    if record is None or "resolved" not in record:
        return None
    given, stored = record.get("options", {}), record["resolved"]
    if differing := [name for name in given.keys() & stored.keys() if given[name] != stored[name]]:
        raise DamagedError(
            f"{folder / 'run.json'} has two values of {', '.join(sorted(differing))}, one in `options` and one in "
            f"`resolved`: it was damaged or edited. {RUN_RECORD.remedy}"
        )
    return dict(stored)


def describe_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Describe options whose values differ from a new run's: name -> (value in this run, value in a new run)."""
    return ", ".join(f"{name}={was} ({now} in a new run)" for name, (was, now) in changed.items())
