"""Harvest while training: a thread harvests the windows of a ring in order, as far ahead as the ring has room.

The windows are bit-identical to those that the same `sae harvest` writes. Training releases the windows once it has
read them.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

from ..cache.layout import CHUNK_ROWS, Layout
from ..cache.ring import GROUPS_ON_DISK, RingCache
from ..cache.writer import harvest_started
from ..common.errors import UnavailableError, UsageError
from ..common.files import folder_bytes, free_space
from ..common.formatting import format_bytes
from ..common.locks import writer_lock
from .config import HarvestConfig
from .plan import HarvestPlan, plan_harvest
from .progress import HarvestProgress
from .stages import load_model_for, start_cache
from .windows import WindowComputer, write_windows

TEXT_BYTES = 5  # disk space per token to train on: its id, plus the held-out text divided by the number of these tokens


class TrainingEnded(Exception):  # noqa: N818  (not an error)
    """Raised in the harvesting thread once training needs no more windows."""


def plan_ring(config: HarvestConfig, size: int) -> tuple[HarvestPlan, RingCache]:
    """Plan a harvest in a folder of its own, and the ring that will hold its windows. Writes nothing.

    Raises UsageError if config.tokens is not given, or if the folder holds something else.
    """
    if config.tokens is None:
        raise UsageError(
            "--stream needs --tokens, since the number of steps is fixed before the text is read. "
            "Give a number of tokens, such as 10M."
        )
    plan = plan_harvest(config, suffix="--stream")
    layout = Layout(config.tokens, config.window, config.storage_dtype, config.compress)
    ring = RingCache(plan.folder, plan.identity, layout, plan.widths, size, config.max_norm)
    if plan.folder.is_dir():
        harvest_started(plan.folder, ring.fingerprint)
    return plan, ring


def check_room(plan: HarvestPlan, ring: RingCache) -> int:
    """The bytes that the ring takes. Raises UnavailableError, with sizes that would fit, if the disk is too small."""
    text = TEXT_BYTES * ring.layout.rows
    needed = ring_bytes(plan, ring) + text
    free = free_space(plan.folder) + folder_bytes(plan.folder)
    if 1.02 * needed > free:
        rows = int((free / 1.02 - text) / plan.bytes_per_token)
        windows, half = rows // ring.layout.window_rows // GROUPS_ON_DISK * GROUPS_ON_DISK, rows // GROUPS_ON_DISK
        fits = (
            f"--ring {windows}"
            if windows
            else f"--ring {GROUPS_ON_DISK} --window {half // CHUNK_ROWS * CHUNK_ROWS or half}"
        )
        raise UnavailableError(
            f"A ring of {ring.capacity} windows of {ring.layout.window_rows:,} rows needs "
            f"{format_bytes(1.02 * needed)}, but {plan.folder} has room for {format_bytes(free)}. "
            f"{f'{fits} would fit.' if half > 0 else 'Free space first.'}"
        )
    return needed


def ring_bytes(plan: HarvestPlan, ring: RingCache) -> int:
    """Bytes of the activations on the disk when the ring is full."""
    return min(ring.capacity, ring.layout.n_windows) * ring.layout.window_rows * plan.bytes_per_token


@contextlib.contextmanager
def harvest_ahead(plan: HarvestPlan, ring: RingCache, groups: range, say: Callable[[str], None]) -> Iterator[None]:
    """Harvest these groups of windows in a thread during the `with` block.

    Leaving the block stops the thread once the window being written is on disk.
    """
    with writer_lock(plan.folder, "sae train --stream", say):
        ring.create(groups.start)
        writer, contexts = start_cache(plan)
        ring.start_at(groups.start)
        # If a run is resumed without the folder that recorded the limits, the first window is harvested again to find
        # them.
        first_window = {} if ring.has_norm_limits or not groups.start else {0: list(plan.widths)}
        windows_to_read = ring.windows(groups)
        missing = {window: arrays for window, arrays in writer.missing_windows().items() if window in windows_to_read}

        def stop_when_closed(done: int, total: int) -> None:
            if ring.closed:
                raise TrainingEnded

        progress = HarvestProgress(stop_when_closed, say)
        computer = WindowComputer(plan, contexts, ring.layout, progress)
        if missing or first_window:  # not in the thread: loading a model changes torch's default dtype and random state
            computer.set_model(load_model_for(plan, missing | first_window, plan.device))
        if first_window:
            write_windows(computer, writer, first_window, progress)
            ring.fix_norm_limits()
            ring.start_at(groups.start)

        def harvest_groups() -> None:
            try:
                for group in groups:
                    windows = {w: missing[w] for w in ring.windows(range(group, group + 1)) if w in missing}
                    if not ring.wait_for_room(group):
                        return
                    write_windows(computer, writer, windows, progress)
                    for sentence in ring.fix_norm_limits():
                        say(sentence)
                    ring.mark_harvested(group)
            except TrainingEnded:
                pass
            except BaseException as error:  # raised in the thread that waits for the group
                ring.report_failure(error)

        thread = threading.Thread(target=harvest_groups, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ring.close()
            thread.join()
