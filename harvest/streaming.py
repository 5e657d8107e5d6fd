"""A harvest that runs ahead of training: the windows of a ring in order, in a thread, no further than the ring has room.

They are the windows of the same `sae harvest`, bit for bit; training hands them back when it has read them.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from ..cache.layout import CHUNK_ROWS, Layout
from ..cache.ring import AHEAD, RingCache
from ..cache.writer import CacheWriter, begun
from ..common.errors import UnavailableError, UsageError
from ..common.files import folder_bytes, free_space, write_json_if_changed, writer_lock
from ..common.formatting import format_bytes
from .plan import HarvestConfig, HarvestPlan, plan_harvest
from .run import HarvestProgress, WindowComputer, load, text_of, write_windows
from .tokenize_checkpoint import discard

TEXT_BYTES = 5  # a token: its id, and the share of held-out text


class TrainingEnded(Exception):
    """Nobody will read what is being computed."""


def plan_ring(request: HarvestConfig, size: int) -> tuple[HarvestPlan, RingCache]:
    """The plan of a harvest in a folder of its own, and the ring of its windows. Writes nothing.

    Raises UsageError when the number of rows is not known beforehand, or when the folder holds something else.
    """
    if request.tokens is None:
        raise UsageError(
            "--stream needs --tokens: the steps are counted before the text is read. Give how many, such as 10M."
        )
    found = plan_harvest(request)
    if request.out is None:
        found = replace(found, folder=found.folder.with_name(f"{found.folder.name}--stream"))
    layout = Layout(request.tokens, request.window, request.storage_dtype, request.compress)
    ring = RingCache(found.folder, found.identity, layout, found.widths, size)
    if found.folder.is_dir():
        begun(found.folder, ring.fingerprint)
    return found, ring


def check_room(plan: HarvestPlan, ring: RingCache) -> int:
    """The bytes that the ring takes. OutsideError when they do not fit on the disk; it says what would."""
    text = TEXT_BYTES * ring.layout.rows
    needed = bytes_of_ring(plan, ring) + text
    free = free_space(plan.folder) + folder_bytes(plan.folder)
    if 1.02 * needed > free:
        rows = int((free / 1.02 - text) / plan.bytes_per_token)
        windows, half = rows // ring.layout.window_rows // AHEAD * AHEAD, rows // AHEAD
        fits = f"--ring {windows}" if windows else f"--ring {AHEAD} --window {half // CHUNK_ROWS * CHUNK_ROWS or half}"
        raise UnavailableError(
            f"A ring of {ring.size} windows of {ring.layout.window_rows:,} rows needs {format_bytes(1.02 * needed)} and "
            f"{plan.folder} has {format_bytes(free)} for it. {f'{fits} would fit.' if half > 0 else 'Free space first.'}"
        )
    return needed


def bytes_of_ring(plan: HarvestPlan, ring: RingCache) -> int:
    return min(ring.size, ring.layout.windows) * ring.layout.window_rows * plan.bytes_per_token


@contextlib.contextmanager
def harvest_ahead(plan: HarvestPlan, ring: RingCache, groups: range, say: Callable[[str], None]) -> Iterator[None]:
    """While this is open, a thread harvests these groups. Training's end stops it when the window being written is safe."""
    with writer_lock(plan.folder, "sae train --stream", say):
        ring.begin()
        contexts = text_of(plan)
        write_json_if_changed(plan.folder / "harvest.json", plan.record())
        writer = CacheWriter(plan.folder, plan.identity, ring.layout, plan.widths)
        discard(plan.folder)
        ring.start(groups.start)
        wanted = ring.windows(groups)
        missing = {window: arrays for window, arrays in writer.missing().items() if window in wanted}

        def watch(done: int, total: int) -> None:
            if ring.closed:
                raise TrainingEnded

        report = HarvestProgress(watch, say)
        computing = WindowComputer(plan, contexts, ring.layout, report)
        if missing:  # here, not in the thread: loading a model touches torch's default type and random state
            computing.load(load(plan, missing, plan.device))

        def work() -> None:
            try:
                for group in groups:
                    lacking = {w: missing[w] for w in ring.windows(range(group, group + 1)) if w in missing}
                    if not ring.room_for(group):
                        return
                    write_windows(computing, writer, lacking, report)
                    ring.harvested(group)
            except TrainingEnded:
                pass
            except BaseException as error:  # raised again by whoever waits for the group
                ring.fail(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ring.close()
            thread.join()
