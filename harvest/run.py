"""The harvest: text -> model -> cache, one pass for all layers and sites.

While the model computes one window, the one before is measured, compressed if asked, written and flushed by another
thread. There are two windows of memory and no more: without a free one the model waits. Besides them each process holds
the token ids, four bytes a token.
"""

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache.contexts import Contexts
from ..cache.layout import Hook, Layout, fingerprint_of
from ..cache.reader import Cache, is_ring
from ..cache.writer import CacheWriter, WindowRows, begun
from ..common.device import free_memory, keep_freed_memory
from ..common.environment import source_revision
from ..common.errors import Interrupted, SaeError, UnavailableError, UsageError
from ..common.files import write_json_if_changed, writer_lock
from .contexts import cut, rows_of
from .device_copy import DeviceCopy, out_of_memory
from .distributed import current_process_group
from .model import LanguageModel, load_trunk
from .plan import HarvestPlan
from .tokenize_checkpoint import TokenizeCheckpoint, discard

WINDOWS = 2  # in memory: one is computed, one is written


@dataclass(frozen=True)
class HarvestProgress:
    """What a harvest tells whoever watches: (rows done, rows in all), and sentences."""

    rows: Callable[[int, int], None] = lambda done, total: None
    say: Callable[[str], None] = lambda sentence: None


UNWATCHED = HarvestProgress()


def run_harvest(plan: HarvestPlan, report: HarvestProgress = UNWATCHED) -> Cache:
    """Carry out a plan, or the rest of it, and open the result. Several launched processes share the windows out.

    Raises OutsideError when the disk is too small or another process writes, Interrupted on Ctrl-C with every
    committed window safe.
    """
    team = current_process_group(plan.device)
    keep_freed_memory()
    with contextlib.ExitStack() as held, terminated_as_interrupted():
        if team.first:
            refuse_foreign(plan)
            held.enter_context(writer_lock(plan.folder, "sae harvest", report.say))
            for member in plan.folder.glob(".rank*"):  # of another launch, whose first process is gone
                with writer_lock(member, "sae harvest"):
                    pass
            if plan.request.tokens is not None and not Contexts.written(plan.folder):  # reading the text may take long
                plan.check_space(plan.request.tokens * plan.bytes_per_token, plan.bytes_per_token)
            contexts = text_of(plan)
            write_json_if_changed(plan.folder / "harvest.json", plan.record())
            writer = CacheWriter(plan.folder, plan.identity, layout_of(plan, contexts), plan.widths)
            discard(plan.folder)  # the harvest has begun, so its tokens will be read, never cut again
        team.meet()  # the text and what the arrays are is written
        if not team.first:
            held.enter_context(writer_lock(plan.folder / f".rank{team.index}", "sae harvest", report.say))
            contexts = Contexts.read(plan.folder)
            writer = CacheWriter(plan.folder, plan.identity, layout_of(plan, contexts), plan.widths)
        missing = writer.missing()
        team.meet()  # all have seen the same list
        if missing:
            rows = {window: len(writer.layout.window(window)) for window in missing}
            needed = sum(rows[window] * plan.bytes_of(arrays) for window, arrays in missing.items())
            plan.check_space(needed, plan.bytes_per_token)
            if len(missing) < writer.layout.windows:
                report.say(
                    f"{writer.layout.windows - len(missing)} of {writer.layout.windows} windows are there already."
                )
            mine = dict(list(missing.items())[team.index :: team.count])
            if mine:
                computing = WindowComputer(plan, contexts, writer.layout, report)
                computing.load(load(plan, mine, team.device))
                write_windows(computing, writer, mine, report)
        team.meet()
        if team.first and (missing or not writer.finished(plan.request.max_norm)):
            writer.finish(plan.request.max_norm)
        team.meet()
    return Cache(plan.folder)


def refuse_foreign(plan: HarvestPlan) -> None:
    """UsageError when the folder holds something else than this harvest; nothing in it was touched then."""
    if plan.folder.is_dir():
        begun(plan.folder, fingerprint_of(plan.identity))
        refuse_ring(plan.folder)


def refuse_ring(folder: Path) -> None:
    """UsageError when the windows that lack here were removed on purpose."""
    if is_ring(folder):
        raise UsageError(
            f"{folder} keeps only the windows that `sae train --stream` is about to read. For a cache to keep, harvest with another --out."
        )


def layout_of(plan: HarvestPlan, contexts: Contexts) -> Layout:
    kept = rows_of(contexts, plan.identity["skip"])[~contexts.held_out]
    return Layout(int(kept.sum()), plan.request.window, plan.request.storage_dtype, plan.request.compress)


def load(plan: HarvestPlan, windows: Mapping[int, Sequence[str]], device: str) -> LanguageModel:
    """The model up to the deepest layer that these windows lack."""
    last = max(Hook.of(name).layer for names in windows.values() for name in names)
    return load_trunk(plan.source, plan.config, last, dtype=plan.dtype, device=device, attention=plan.request.attention)


def text_of(plan: HarvestPlan) -> Contexts:
    """The ids to run: those of an earlier start of the same harvest, or cut now and written down first."""
    if not (begun(plan.folder, fingerprint_of(plan.identity)) and Contexts.written(plan.folder)):
        cut_text(plan).write(plan.folder)
    return Contexts.read(plan.folder)


def cut_text(plan: HarvestPlan) -> Contexts:
    request = plan.request
    return cut(
        plan.text, plan.tokenizer, TokenizeCheckpoint(plan.folder, plan.identity), tokens=plan.tokens, exactly=request.tokens is not None,
        context=request.context, held_out=request.held_out_share, skip=plan.identity["skip"], seed=request.seed, pack=request.pack,
    )  # fmt: skip


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, with which schedulers preempt, is taken as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # whoever runs us in a thread keeps the signals
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def write_windows(
    computing: "WindowComputer", writer: CacheWriter, windows: Mapping[int, list[str]], report: HarvestProgress
) -> None:
    """Compute and write windows; the two overlap."""
    free: queue.SimpleQueue[dict[str, np.ndarray]] = queue.SimpleQueue()
    for _ in range(WINDOWS):
        free.put(computing.buffers(list(writer.widths)))
    full: queue.SimpleQueue[Any] = queue.SimpleQueue()
    failed: list[BaseException] = []

    def write() -> None:
        while (job := full.get()) is not None:
            window, rows, made_with, buffers = job
            try:
                if not failed:
                    writer.write_window(window, rows, made_with)
            except BaseException as error:  # raised again by the producer
                failed.append(error)
            free.put(buffers)

    thread = threading.Thread(target=write, daemon=True)  # a second Ctrl-C does not wait for it
    thread.start()
    total, done = sum(len(writer.layout.window(window)) for window in windows), 0

    def tell(rows: int) -> None:
        if failed:
            raise failed[0]
        report.rows(done + rows, total)

    computing.tell = tell
    try:
        for window, arrays in windows.items():
            buffers = free.get()
            if failed:
                break
            rows = computing.window(window, {name: buffers[name] for name in arrays})
            full.put((window, rows, computing.made_with(), buffers))
            done += len(writer.layout.window(window))
        full.put(None)
        thread.join()
    except KeyboardInterrupt:  # Ctrl-C, or SIGTERM
        with contextlib.suppress(KeyboardInterrupt):
            report.say("Stopping when the window being written is safe; Ctrl-C again stops at once.")
            full.put(None)
            thread.join()
        left = len(writer.missing())
        raise Interrupted(
            f"Stopped. {writer.layout.windows - left} of {writer.layout.windows} windows are safe; the same command goes on from there."
        ) from None
    except BaseException:  # of the model, or of whoever watches
        full.put(None)
        thread.join()
        raise
    if failed:
        raise failed[0]


class WindowComputer:
    """The rows of windows: a pure function of the text, the seed, the window and the number of contexts in a pass."""

    def __init__(self, plan: HarvestPlan, contexts: Contexts, layout: Layout, report: HarvestProgress) -> None:
        self.plan, self.layout, self.report = plan, layout, report
        self.tell: Callable[[int], None] = lambda rows: None  # of the window being computed
        self.contexts = contexts.select(slice(0, int((~contexts.held_out).sum())))  # held out come last; no copy
        self.kept_NS = rows_of(self.contexts, plan.identity["skip"])
        self.rows_before = np.concatenate([[0], np.cumsum(self.kept_NS.sum(1))])
        self.at_once = plan.request.batch_contexts

    def load(self, model: LanguageModel) -> None:
        self.model, self.transfer = model, DeviceCopy(model.device)

    def buffers(self, arrays: Sequence[str]) -> dict[str, np.ndarray]:
        """Memory for a window; it is taken from the system when it is first written to."""
        return {name: np.empty((self.plan.request.window, self.plan.widths[name]), np.uint16) for name in arrays}

    def made_with(self) -> dict[str, Any]:
        versions = {"torch": torch.__version__, "transformers": version("transformers")}
        ours = {"sae-pipeline": version("sae-pipeline"), "source": source_revision()}
        return {"batch_contexts": self.at_once, "device": self.model.device.type, **versions, **ours}

    def window(self, window: int, buffers: Mapping[str, np.ndarray]) -> WindowRows:
        """Compute a window into `buffers`; where the memory does not do, again with half as many contexts in a pass."""
        while True:
            try:
                return self._window(self.layout.window(window), buffers)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            if self.at_once == 1:
                raise UnavailableError(
                    f"Not even one context of {self.plan.request.context} tokens fits into the memory of {self.model.device}. "
                    "Use a smaller --context, --dtype bfloat16, or a larger device."
                )
            self.at_once //= 2
            self.report.say(
                f"The memory of {self.model.device} is too small: from here on {self.at_once} contexts in a pass."
            )
            self.transfer.drop()
            free_memory(self.model.device)

    def _window(self, rows: range, buffers: Mapping[str, np.ndarray]) -> WindowRows:
        size = len(rows)
        slot = np.random.Generator(np.random.Philox(key=[self.plan.request.seed, rows.start])).permutation(size)
        bits = {name: buffer[:size] for name, buffer in buffers.items()}
        row_ctx, row_pos = np.empty(size, np.uint32), np.empty(size, np.uint16)
        hooks = [Hook.of(name) for name in buffers]
        first = int(np.searchsorted(self.rows_before, rows.start, side="right")) - 1
        last = int(np.searchsorted(self.rows_before, rows.stop, side="left"))
        filled = 0
        for start in range(first, last, self.at_once):
            part = slice(start, min(start + self.at_once, last))
            longest = int(self.contexts.length[part].max())
            ids = torch.from_numpy(self.contexts.ids[part, :longest].astype(np.int64)).to(self.model.device)
            which, where = np.nonzero(self.kept_NS[part, :longest])
            # A context at the edge of the window belongs to two; only its rows inside this one are taken.
            number = self.rows_before[start] + np.arange(len(which))
            inside = (number >= rows.start) & (number < rows.stop)
            which, where = which[inside], where[inside]
            target = slot[filled : filled + len(which)]
            flat = torch.from_numpy(which * longest + where).to(self.model.device)
            captured = self.model.capture_hooks(ids, hooks)
            taken = {hook.array: captured[hook].flatten(0, 1)[flat].to(torch.bfloat16) for hook in hooks}
            self.transfer.send(taken, target, bits)
            row_ctx[target], row_pos[target] = start + which, where
            filled += len(which)
            self.tell(filled)
        self.transfer.arrive()
        if filled != size:
            raise SaeError(
                f"{filled:,} rows were captured for a window of {size:,}: its tokens and its layout disagree."
            )
        return WindowRows(bits, row_ctx, row_pos)
