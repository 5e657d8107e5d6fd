"""Compute the windows of a cache and write them.

While the model computes one window, threads measure, compress (if requested), write and flush the previous one. There
is memory for two windows and no more: if neither is free, the model waits. If a GPU has room for a window, the rows are
placed and measured on the GPU, and the finished window is copied to host memory as a whole (device_window.py).
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache.contexts import Contexts
from ..cache.hooks import Hook
from ..cache.layout import Layout
from ..cache.loader import as_uint16
from ..cache.writer import CacheWriter, WindowRows
from ..common.device import copy_to_device, empty_gpu_cache
from ..common.environment import source_revision
from ..common.errors import Interrupted, SaeError, UnavailableError
from ..common.memory import available_memory, out_of_memory
from .device_copy import DeviceCopy
from .device_window import DeviceWindow, fits_on_gpu, host_memory
from .division import WINDOWS_IN_MEMORY, window_bytes
from .model import LanguageModel
from .plan import HarvestPlan
from .progress import HarvestProgress
from .window_draft import SAVE_SECONDS, WORTH_SAVING, ComputedRows, WindowDraft, remove_draft

ORIGINS = ("row_ctx", "row_pos")
Memory = dict[str, Tensor]  # host memory for a window: array name -> (rows, d) bfloat16
Pending = Callable[[], WindowRows]  # waits for the rows of a window being copied from a GPU


def write_windows(
    computer: "WindowComputer", writer: CacheWriter, windows: Mapping[int, list[str]], progress: HarvestProgress
) -> None:
    """Compute the arrays of each window while the arrays of the previous window are written.

    Arrays that another worker has committed meanwhile are skipped; this is checked before computing and before writing.

    Raises Interrupted on Ctrl-C, once the window being written is safe.
    """
    thread = WriterThread(writer, [computer.memory(list(writer.widths)) for _ in range(WINDOWS_IN_MEMORY)])
    total, done = sum(len(writer.layout.row_range(window)) for window in windows), 0

    def report_rows(rows: int) -> None:
        thread.raise_error()
        progress.rows(done + rows, total)

    computer.report_rows = report_rows
    try:
        for window, arrays in windows.items():
            memory = thread.free.get()
            if thread.error is not None:
                break
            if left := [name for name in arrays if not writer.is_committed(window, name)]:
                rows = computer.compute(window, {name: memory[name] for name in left})
                thread.write(window, rows, computer.made_with(), memory)
            else:
                thread.free.put(memory)
            done += len(writer.layout.row_range(window))
        thread.finish()
    except KeyboardInterrupt:  # Ctrl-C, or SIGTERM
        with contextlib.suppress(KeyboardInterrupt):
            progress.say("Stopping once the window being written is safe; press Ctrl-C again to stop at once.")
            thread.finish()
        safe = writer.layout.n_windows - len(writer.missing_windows())
        begun = f", and {computer.rows_in_draft:,} rows of the next" if computer.rows_in_draft else ""
        raise Interrupted(
            f"Stopped. {safe} of {writer.layout.n_windows} windows are safe{begun}; run the same command again to "
            "continue."
        ) from None
    except BaseException:  # from the model or a progress callback
        thread.finish()
        raise
    thread.raise_error()


class WriterThread:
    """Writes windows in a thread. After an error the thread writes nothing more; `raise_error` raises the error in the
    caller.
    """

    def __init__(self, writer: CacheWriter, memory: Sequence[Memory]) -> None:
        self.writer = writer
        self.error: BaseException | None = None
        self.free: queue.SimpleQueue[Memory] = queue.SimpleQueue()
        for one in memory:
            self.free.put(one)
        self._jobs: queue.SimpleQueue[tuple[int, Pending, dict[str, Any], Memory] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)  # a second Ctrl-C does not wait for this thread
        self._thread.start()

    def write(self, window: int, rows: Pending, made_with: dict[str, Any], memory: Memory) -> None:
        """Queue a window. `memory` returns to `free` once the window is written."""
        self._jobs.put((window, rows, made_with, memory))

    def finish(self) -> None:
        """Wait until all queued windows are written."""
        self._jobs.put(None)
        self._thread.join()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            window, rows, made_with, memory = job
            try:
                if self.error is None:
                    self.writer.write_window(window, rows(), made_with)
                    remove_draft(self.writer.folder, window)
            except BaseException as error:
                self.error = error
            self.free.put(memory)


class WindowComputer:
    """Computes the rows of windows; with `drafts`, continues interrupted windows.

    The rows are a pure function of the text, the seed, the window and the number of contexts in a forward pass.
    """

    def __init__(
        self, plan: HarvestPlan, contexts: Contexts, layout: Layout, progress: HarvestProgress, *, drafts: bool = False
    ) -> None:
        self.plan, self.layout, self.progress, self.drafts = plan, layout, progress, drafts
        self.report_rows: Callable[[int], None] = lambda rows: None  # called with the computed rows of the window
        self.rows_in_draft = 0  # of the window that was interrupted
        self.contexts = contexts.select(slice(0, int((~contexts.held_out).sum())))  # a view: held-out ones come last
        self.kept_NS = plan.context_format.row_mask(self.contexts)
        self.rows_before = np.concatenate([[0], np.cumsum(self.kept_NS.sum(1))])
        self.batch_contexts = plan.config.batch_contexts
        self.device_window: DeviceWindow | None = None

    def set_model(self, model: LanguageModel) -> None:
        self.model, self.device_copy = model, DeviceCopy(model.device)
        if model.device.type == "cuda":
            rows = min(self.layout.window_rows, self.layout.rows)
            size = window_bytes(self.layout, 2 * sum(self.plan.widths.values()))
            if fits_on_gpu(size, available_memory(str(model.device))):
                self.device_window = DeviceWindow(model.device, rows)

    def memory(self, arrays: Sequence[str]) -> Memory:
        """Host memory for a window. Memory that is not pinned is provided by the system only when it is first written
        to.
        """
        rows = min(self.layout.window_rows, self.layout.rows)
        return host_memory(rows, {name: self.plan.widths[name] for name in arrays}, pinned=bool(self.device_window))

    def made_with(self) -> dict[str, Any]:
        """The part of a commit that says how its window was computed."""
        versions = {"torch": torch.__version__, "transformers": version("transformers")}
        own_versions = {"sae-pipeline": version("sae-pipeline"), "source": source_revision()}
        compiled = {"compiled": True} if self.plan.config.compiled else {}
        where = {"batch_contexts": self.batch_contexts, "device": self.model.device.type, **compiled}
        return {**where, **versions, **own_versions}

    def compute(self, window: int, memory: Mapping[str, Tensor]) -> Pending:
        """Compute a window into `memory`.

        If GPU memory runs out, the computation is retried without a window on the GPU. If memory still does not
        suffice, or if the device is a CPU, it is retried with half as many contexts per pass.
        """
        while True:
            try:
                return self._compute(window, memory)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            if self.device_window is not None:
                self.device_window.drop()
                self.device_window = None
                self.progress.say(f"{self.model.device} is out of memory: windows are kept in host memory.")
                empty_gpu_cache(self.model.device)
                continue
            if self.batch_contexts == 1:
                raise UnavailableError(
                    f"Not even one context of {self.plan.config.context} tokens fits into the memory of "
                    f"{self.model.device}. Use a smaller --context, --dtype bfloat16, or a larger device."
                )
            before = self.batch_contexts
            self.batch_contexts //= 2
            self.progress.say(
                f"{self.model.device} is out of memory: continuing with {self.batch_contexts} contexts per pass. "
                f"These rows can differ in the last bit from rows computed with {before}; commits/ records the number "
                "for each window. To compute all rows alike, harvest into another --out with --batch-contexts "
                f"{self.batch_contexts}."
            )
            self.device_copy.drop()
            empty_gpu_cache(self.model.device)

    def _compute(self, window: int, memory: Mapping[str, Tensor]) -> Pending:
        rows = self.layout.row_range(window)
        slot = np.random.Generator(np.random.Philox(key=[self.plan.config.seed, rows.start])).permutation(len(rows))
        bits = {name: as_uint16(part[: len(rows)]) for name, part in memory.items()}
        row_ctx, row_pos = np.empty(len(rows), np.uint32), np.empty(len(rows), np.uint16)
        arrays: dict[str, np.ndarray] = {**bits, "row_ctx": row_ctx, "row_pos": row_pos}
        first = int(np.searchsorted(self.rows_before, rows.start, side="right")) - 1
        last = int(np.searchsorted(self.rows_before, rows.stop, side="left"))
        if self.device_window:
            self.device_window.begin({name: self.plan.widths[name] for name in memory})
        draft, done = self._open_draft(window, memory), ComputedRows(0, first)
        if draft and (done := draft.load(arrays, slot, done)).rows:
            self.progress.say(f"{done.rows:,} of the {len(rows):,} rows of window {window} are already computed.")
            if self.device_window:
                self.device_window.restore(bits, slot[: done.rows])
        try:
            for start in range(done.context, last, self.batch_contexts):
                batch = slice(start, min(start + self.batch_contexts, last))
                new = self._compute_batch(batch, rows, slot[done.rows :], arrays)
                done = ComputedRows(done.rows + new, batch.stop)
                self.report_rows(done.rows)
                if draft and draft.seconds > SAVE_SECONDS:
                    self._bring(bits, slot[draft.saved_rows : done.rows])
                    draft.save(arrays, slot, done)
        except KeyboardInterrupt:
            if draft and draft.seconds > WORTH_SAVING:
                self._bring(bits, slot[draft.saved_rows : done.rows])
                draft.save(arrays, slot, done)
            self.rows_in_draft = draft.saved_rows if draft else 0
            raise
        if done.rows != len(rows):
            raise SaeError(
                f"{done.rows:,} rows were captured for a window of {len(rows):,}: the cache's tokens and layout do not "
                "match."
            )
        if self.device_window is None:
            self.device_copy.wait()
            return lambda: WindowRows(bits, row_ctx, row_pos)
        arrived = self.device_window.send(memory, len(rows), self.layout.chunk_rows)
        return lambda: WindowRows(bits, row_ctx, row_pos, arrived())

    def _bring(self, bits: Mapping[str, np.ndarray], target: np.ndarray) -> None:
        """Copy the rows at these positions of a window to host memory, if they are on a GPU."""
        if self.device_window is None:
            self.device_copy.wait()
        else:
            self.device_window.fetch(bits, target)

    def _compute_batch(self, batch: slice, rows: range, slot: np.ndarray, arrays: Mapping[str, np.ndarray]) -> int:
        """Compute a batch of contexts; row n goes to slot[n] of the activations, row_ctx and row_pos in `arrays`.

        Returns the number of rows of the batch that are in the window. `rows` are the rows of the window.
        """
        longest = int(self.contexts.length[batch].max())
        ids_NS = torch.from_numpy(self.contexts.ids[batch, :longest].astype(np.int64))
        context, position = np.nonzero(self.kept_NS[batch, :longest])
        # A context at the edge of a window belongs to two windows; only its rows in this window are kept.
        number = self.rows_before[batch.start] + np.arange(len(context))
        inside = (number >= rows.start) & (number < rows.stop)
        context, position = context[inside], position[inside]
        target = slot[: len(context)]
        places = np.stack([context * longest + position, target])
        flat, target_T = copy_to_device(torch.from_numpy(places), self.model.device)
        hooks = [Hook.from_array(name) for name in arrays if name not in ORIGINS]
        captured = self.model.capture_hooks(copy_to_device(ids_NS, self.model.device), hooks)
        x_TD = {hook.array: captured[hook].flatten(0, 1)[flat].to(torch.bfloat16) for hook in hooks}
        if self.device_window is None:
            self.device_copy.send(x_TD, target, arrays)
        else:
            self.device_window.place(x_TD, target_T)
        arrays["row_ctx"][target], arrays["row_pos"][target] = batch.start + context, position
        return len(context)

    def _open_draft(self, window: int, arrays: Iterable[str]) -> WindowDraft | None:
        if not self.drafts:
            return None
        owner = [self.plan.identity, window, sorted(arrays), self.made_with()]
        return WindowDraft(self.plan.folder, window, owner)
