"""The harvest: text -> model -> cache, one pass for all layers.

While the model computes one window, the one before is checked, written and flushed by another thread; a full queue makes
the model wait, so at most two windows are in memory.
"""

import contextlib
import functools
import queue
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache.contexts import Contexts
from ..cache.device import best_device, best_dtype
from ..cache.errors import Interrupted, OutsideError, SaeError, UsageError
from ..cache.files import bytes_text, digest_of, one_writer
from ..cache.layout import CHUNK_ROWS, FORMAT, WINDOW_ROWS, Layout, home
from ..cache.reader import Cache
from ..cache.writer import Writer, begun
from . import mini
from .draft import Draft, discard
from .model import LanguageModel, Source, check_layers, find_model, load_tokenizer, load_trunk
from .sources import EMBEDDED, PILE, open_text
from .text import Text, cut, rows_of, specials

LAYERS = (5, 12, 19)
TOKENS = 10_000_000

Progress = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True)
class Request:
    """What a user can ask of a harvest."""

    model: str = "google/gemma-2-2b"
    revision: str | None = None
    layers: Sequence[int] = LAYERS
    dataset: str | None = None  # None: the Pile, or the embedded text for the embedded model
    dataset_revision: str | None = None
    split: str = "train"
    text_column: str = "text"
    tokens: int | None = None  # None: ten million, or all of a shorter text
    context: int = 128
    held_out: float | None = None  # None: 0.05; the embedded text holds out its own documents
    keep_special: bool = False
    pack: bool = False
    window: int = WINDOW_ROWS
    storage_dtype: str = "bfloat16"
    dtype: str = "auto"
    attention: str = "eager"  # the implementation in which Gemma's soft-capping is exact
    batch_contexts: int = 32
    seed: int = 0
    device: str = "auto"
    out: Path | None = None

    @property
    def held_out_share(self) -> float:
        return 0.05 if self.held_out is None else self.held_out


@dataclass(frozen=True)
class Plan:
    """A request, resolved: what will be read, computed and written, and where."""

    request: Request
    source: Source
    config: Any
    tokenizer: Any
    text: Text
    identity: dict[str, Any]
    folder: Path
    layers: list[int]
    tokens: int
    dtype: str
    device: str

    @property
    def d_in(self) -> int:
        return self.config.hidden_size

    @property
    def bytes_per_token(self) -> int:
        return len(self.layers) * (2 * self.d_in + 4) + 6


def plan(request: Request, tell: Callable[[str], None] = lambda sentence: None) -> Plan:
    """Resolve everything to what pins it. Loads no weights and writes nothing. `tell` takes sentences about the text."""
    name = request.dataset or (EMBEDDED if request.model == mini.NAME else PILE)
    check(request, name)
    source, config = find_model(request.model, request.revision)
    layers = sorted(set(request.layers))
    check_layers(config, layers, request.model)
    device = best_device(request.device)
    dtype = best_dtype(request.dtype, device)
    tokenizer = load_tokenizer(source)
    text = open_text(
        name,
        tokenizer=tokenizer,
        revision=request.dataset_revision,
        split=request.split,
        column=request.text_column,
        seed=request.seed,
        tell=tell,
    )
    identity = {
        "format": FORMAT,
        "model": source.identity(),
        "dtype": dtype,
        "attention": request.attention,
        "tokenizer": digest_of(tokenizer.backend_tokenizer.to_str()),
        "data": text.identity,
        "tokens": request.tokens or f"up to {TOKENS}",
        "context": request.context,
        "held_out": "by name" if name == EMBEDDED else request.held_out_share,
        "skip": [] if request.keep_special else specials(tokenizer),
        "pack": request.pack,
        "seed": request.seed,
        "window_rows": request.window,
        "chunk_rows": min(CHUNK_ROWS, request.window),
        "storage_dtype": request.storage_dtype,
    }
    short = source.name.rstrip("/").split("/")[-1]
    folder = request.out or home() / "activations" / f"{short}--{text.name}--{digest_of(identity)[:8]}"
    return Plan(
        request, source, config, tokenizer, text, identity, folder, layers, request.tokens or TOKENS, dtype, device
    )


def check(request: Request, text: str) -> None:
    """UsageError for what can be seen to be wrong before anything is opened."""
    if request.tokens is not None and request.tokens <= 0:
        raise UsageError(f"--tokens {request.tokens} is not positive. Give how many rows to harvest, such as 10M.")
    if request.tokens is not None and request.tokens > 2**40:
        raise UsageError(
            f"--tokens {request.tokens} is more than 2^40, a million million. Give how many rows to harvest, such as 10M."
        )
    if not 2 <= request.context <= 65535:
        raise UsageError(
            f"--context {request.context} is out of range: a context is BOS and at least one token, at most 65,535."
        )
    if request.window <= 0 or request.window % min(CHUNK_ROWS, request.window):
        raise UsageError(
            f"--window {request.window} is no whole number of chunks: give a multiple of {CHUNK_ROWS:,}, or less than that."
        )
    if not 0 <= request.seed < 2**63:
        raise UsageError(f"--seed {request.seed} is out of range: give 0 to 2^63 - 1.")
    if text == EMBEDDED and request.held_out is not None:
        raise UsageError(f"--held-out cannot be given for {EMBEDDED}: it holds out its own documents, one in ten.")
    if not 0 <= request.held_out_share < 1:
        raise UsageError(
            f"--held-out {request.held_out} is no fraction of the documents: give 0 up to, but not including, 1."
        )
    if request.storage_dtype not in ("bfloat16", "uint16"):
        raise UsageError(
            f"--storage-dtype {request.storage_dtype} is unknown: bfloat16, or uint16 for readers that lack it."
        )


def harvest(plan: Plan, progress: Progress = lambda done, total: None) -> Cache:
    """Carry out a plan, or the rest of it, and open the result.

    Raises OutsideError when the disk is too small or another process writes, Interrupted on Ctrl-C with every
    committed window safe.
    """
    with one_writer(plan.folder, "sae harvest"), terminated_as_interrupted():
        contexts = text_of(plan)
        wanted = contexts.select(~contexts.held_out)
        kept = rows_of(wanted, plan.identity["skip"])
        layout = Layout(int(kept.sum()), plan.request.window, plan.request.storage_dtype)
        writer = Writer(plan.folder, plan.identity, layout, dict.fromkeys(plan.layers, plan.d_in))
        discard(plan.folder)  # the harvest has begun, so its tokens will be read, never cut again
        missing = writer.missing()
        if missing:
            check_space(plan, sum(len(layout.window(w)) * len(layers) for w, layers in missing.items()))
            model = load_trunk(
                plan.source,
                plan.config,
                max(max(layers) for layers in missing.values()),
                dtype=plan.dtype,
                device=plan.device,
                attention=plan.request.attention,
            )
            write_windows(plan, model, writer, wanted, kept, missing, progress)
        if missing or not writer.finished:
            writer.finish()
    return Cache(plan.folder)


def text_of(plan: Plan) -> Contexts:
    """The ids to run: those of an earlier start of the same harvest, or cut now and written down first."""
    request = plan.request
    if not (begun(plan.folder, digest_of(plan.identity)) and Contexts.written(plan.folder)):
        if request.tokens is not None:
            check_space(plan, request.tokens * len(plan.layers))  # before the text is read, which may take long
        cut(
            plan.text, plan.tokenizer, Draft(plan.folder, plan.identity), tokens=plan.tokens, exactly=request.tokens is not None,
            context=request.context, held_out=request.held_out_share, skip=plan.identity["skip"], seed=request.seed, pack=request.pack,
        ).write(plan.folder)  # fmt: skip
    return Contexts.read(plan.folder)


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


def check_space(plan: Plan, rows: int) -> None:
    """OutsideError when `rows`, counted once for each layer, do not fit on the disk."""
    needed, free = rows / len(plan.layers) * plan.bytes_per_token * 1.02, free_space(plan.folder)
    if needed > free:
        fits = int(free / plan.bytes_per_token / 1.02)
        raise OutsideError(
            f"The harvest needs {bytes_text(needed)} and {plan.folder} has {bytes_text(free)} free. --tokens {fits} would fit."
        )


def write_windows(
    plan: Plan,
    model: LanguageModel,
    writer: Writer,
    wanted: Contexts,
    kept: np.ndarray,
    missing: dict[int, list[int]],
    progress: Progress,
) -> None:
    """Compute and write the missing windows; the two overlap."""
    waiting: queue.Queue[Any] = queue.Queue(maxsize=1)
    failed: list[BaseException] = []
    made_with = {
        "batch_contexts": plan.request.batch_contexts,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }

    def write() -> None:
        while (job := waiting.get()) is not None:
            if failed:
                continue  # keep taking, so that the producer never blocks on a dead writer
            try:
                writer.write_window(*job, made_with)
            except BaseException as error:  # raised again by the producer
                failed.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    rows_before = np.concatenate([[0], np.cumsum(kept.sum(1))])
    done, total = 0, sum(len(writer.layout.window(w)) for w in missing)
    try:
        for window, layers in missing.items():
            rows = writer.layout.window(window)
            tell = functools.partial(lambda before, filled: progress(before + filled, total), done)
            waiting.put((window, *compute_window(plan, model, layers, wanted, kept, rows_before, rows, tell)))
            done += len(rows)
            if failed:
                break
    except KeyboardInterrupt:  # Ctrl-C, or SIGTERM
        waiting.put(None)
        thread.join()
        left = len(writer.missing())
        raise Interrupted(
            f"Stopped. {writer.layout.windows - left} of {writer.layout.windows} windows are safe; the same command goes on from there."
        ) from None
    finally:
        if thread.is_alive():
            waiting.put(None)
            thread.join()
    if failed:
        raise failed[0]


def compute_window(
    plan: Plan,
    model: LanguageModel,
    layers: list[int],
    wanted: Contexts,
    kept: np.ndarray,
    rows_before: np.ndarray,
    rows: range,
    progress: Callable[[int], None],
) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray]:
    """The rows of a window in the window's own order: a pure function of the text, the seed and the window."""
    size = len(rows)
    slot = np.random.Generator(np.random.Philox(key=[plan.request.seed, rows.start])).permutation(size)
    bits = {layer: np.empty((size, plan.d_in), np.uint16) for layer in layers}
    row_ctx, row_pos = np.empty(size, np.uint32), np.empty(size, np.uint16)
    first = int(np.searchsorted(rows_before, rows.start, side="right")) - 1
    last = int(np.searchsorted(rows_before, rows.stop, side="left"))
    filled = 0
    for batch in batches_of(range(first, last), plan.request.batch_contexts):
        part = slice(batch.start, batch.stop)
        longest = int(wanted.length[part].max())
        ids = torch.from_numpy(wanted.ids[part, :longest].astype(np.int64)).to(plan.device)
        which, where = np.nonzero(kept[part, :longest])
        # A context at the edge of the window belongs to two; only its rows inside this one are taken.
        number = rows_before[batch.start] + np.arange(len(which))
        inside = (number >= rows.start) & (number < rows.stop)
        which, where = which[inside], where[inside]
        target = slot[filled : filled + len(which)]
        captured = model.capture(ids, layers)
        for layer, residual_NSD in captured.items():
            taken = residual_NSD[torch.from_numpy(which).to(plan.device), torch.from_numpy(where).to(plan.device)]
            bits[layer][target] = taken.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
        row_ctx[target], row_pos[target] = batch.start + which, where
        filled += len(which)
        progress(filled)
    if filled != size:
        raise SaeError(f"{filled:,} rows were captured for a window of {size:,}: its tokens and its layout disagree.")
    return bits, row_ctx, row_pos


def batches_of(contexts: range, size: int) -> Iterator[range]:
    for start in range(contexts.start, contexts.stop, size):
        yield range(start, min(start + size, contexts.stop))


def free_space(folder: Path) -> int:
    """Bytes free on the disk that will hold `folder`."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
