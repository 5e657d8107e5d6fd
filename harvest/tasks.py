"""Harvest a share as one of several independent tasks, which can run in any order and be restarted at any time."""

import contextlib
import time

from ..cache.contexts import Contexts
from ..cache.writer import CacheWriter
from ..common.cache_schemas import HARVEST_RECORD
from ..common.locks import shared_lock, writer_lock
from .claim import ClaimLost, TextClaim
from .plan import HarvestPlan
from .progress import HarvestProgress
from .request import request_differs, request_of, request_turn
from .share import shares_of
from .stages import check_before_text, check_folder, harvest_windows, open_cache, start_cache
from .window_draft import remove_draft

POLL, POLL_STORE = 1.0, 5.0  # seconds between checks whether the text is cut, on disk and in a store


def harvest_share(plan: HarvestPlan, progress: HarvestProgress) -> None:
    """Harvest a share, independently of other tasks, and complete the cache if nothing is missing afterwards."""
    check_folder(plan)
    if plan.store is None:
        lock = shared_lock(plan.folder, plan.command)
    else:  # each task has its own working folder
        lock = writer_lock(plan.folder, plan.command, progress.say)
    with lock:
        plan.place.fetch()
        if plan.config.prepare and plan.config.dtype == "auto" and plan.device == "cpu":
            progress.say(
                "This prepares shares in float32, the default on a CPU. For shares on GPUs, add --dtype bfloat16 here."
            )
        writer, contexts = begin_together(plan, progress)
        n_windows = writer.layout.n_windows
        if plan.share is None:
            progress.say(
                f"The text is cut: {writer.layout.rows:,} rows in {n_windows} windows. Run the shares now, in any "
                f"order: --share 1/N to N/N, where N is at most {n_windows}."
            )
            return
        committed = writer.committed_windows()
        left = {window: list(plan.widths) for window in range(n_windows) if window not in committed}
        mine = writer.missing_windows(plan.share.windows(n_windows))
        for window in set(plan.share.windows(n_windows)) - mine.keys():
            remove_draft(plan.folder, window)
        harvest_windows(plan, writer, contexts, left | mine, mine, progress)
        if not writer.seal(plan.config.max_norm, plan.token_text):
            absent = sorted(set(range(n_windows)) - writer.committed_windows()) or list(writer.missing_windows())
            state = f"{len(absent)} of {n_windows} windows are missing, from {shares_of(absent, plan.share.count)}"
            state = state if absent else "A window is being written again"
            progress.say(f"Share {plan.share} is done. {state}: the task that finishes last completes the cache.")


def is_cut(plan: HarvestPlan) -> bool:
    """Whether a task has cut the text and written everything that precedes the first window.

    If it returns True, the folder of this task contains these files too.
    """
    return plan.place.is_begun() and Contexts.is_complete(plan.folder)


def begin_together(plan: HarvestPlan, progress: HarvestProgress) -> tuple[CacheWriter, Contexts]:
    """Like `start_cache`, for several tasks: one of them cuts the text, and the others wait for it."""
    claim, told = TextClaim(plan.place, plan.command), ""
    while not is_cut(plan):
        if file := claim.take():
            with contextlib.suppress(ClaimLost), claim.held(file) as check:
                if is_cut(plan):  # another task cut the text before this task claimed it
                    break
                check_before_text(plan)
                return start_cache(plan, check)
        elif claim.holder != told:
            progress.say(
                f"Waiting for the text, which {claim.holder} is cutting into contexts. To cut the text in advance, "
                "run with --prepare."
            )
            told = claim.holder
        time.sleep(POLL if plan.store is None else POLL_STORE)
    with request_turn(plan.folder):
        if request_differs(plan):
            HARVEST_RECORD.write(plan.folder / "harvest.json", request_of(plan))
    writer, contexts = open_cache(plan)
    writer.place.begin()
    writer.place.remove_claims(reversed(writer.place.claim_files()))  # of a task that died after the text was cut
    return writer, contexts
