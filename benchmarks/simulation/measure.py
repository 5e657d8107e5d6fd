"""Measure constants of constants.py on this machine: `python benchmarks/scale.py --measure`."""

import hashlib
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sae.benchmarks.common import AnonymousPeak, identity, machine, write_text
from sae.cache.consistency import check_commit, window_files
from sae.cache.context_format import ContextFormat
from sae.cache.layout import Layout
from sae.cache.writer import CacheWriter, WindowRows
from sae.common.cache_schemas import COMMIT_RECORD
from sae.harvest import mini
from sae.harvest.contexts import ContextCutter, is_held_out, next_batch
from sae.harvest.documents import Document
from sae.harvest.encode import DocumentEncoder
from sae.harvest.model import find_model, load_tokenizer

ARRAY, WIDTH, ROWS, WINDOW = "layer_00", 8, 2_000_000, 262_144
COMMITS, FILES = 600, 37


def measure() -> str:
    lines = [f"{machine('tokenizers', 'transformers')}\n", "| constant | measured here |", "|---|---|"]
    encode, cut = cutting()
    read, merge = commits()
    found = {
        "encode": f"{encode:,.0f} token/s of a thread of the tokenizer",
        "cut": f"{cut:,.0f} token/s of the thread that reads the text",
        "read_commit": f"{1e6 * read:.0f} us",
        "merge_file": f"{1e6 * merge:.1f} us",
        "row_memory": f"{sealing():.0f} B",
        "checkpoint": f"{hashing() / 1e9:.2f} GB/s",
    }
    return "\n".join([*lines, *(f"| `{name}` | {value} |" for name, value in found.items())])


def cutting() -> tuple[float, float]:
    """Tokens per processor second of the tokenizer's threads, and of the thread that does the rest."""
    source, _ = find_model(mini.NAME)
    tokenizer = load_tokenizer(source)
    form = ContextFormat.choose(tokenizer, bos="auto", keep_special=False, skip_positions=0, skip_tokens=[])
    encode, cutter = DocumentEncoder(tokenizer, form.bos_id), ContextCutter(form, 128, 10**9, pack=False)
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(errors="replace") for path in sorted(folder.glob("*.py"))[:150]]
    documents = iter([Document(text) for text in texts])
    process, thread = time.process_time(), time.thread_time()
    number = 0
    while batch := next_batch(documents):
        for ids, marks in encode(batch):
            cutter.add(ids, number, is_held_out(ids, 0, 0.05), marks)
            number += 1
    own = time.thread_time() - thread
    others = time.process_time() - process - own
    return cutter.rows / max(others, 1e-9), cutter.rows / own


def commits() -> tuple[float, float]:
    """Processor seconds to read and check a commit, and to add a file to the manifest."""
    layout, fingerprint = Layout(COMMITS * WINDOW), "f" * 64
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "commits"
        folder.mkdir()
        for window in range(COMMITS):
            names = window_files(layout, [ARRAY], range(window, window + 1))
            record = {
                "format": 1, "fingerprint": fingerprint, "window": window, "array": ARRAY, "rows": WINDOW,
                "made_with": {}, "files": {name: {"bytes": 37748740, "crc32c": "0123abcd"} for name in names},
            }  # fmt: skip
            COMMIT_RECORD.write(folder / f"{window:06d}.{ARRAY}.json", record)

        def read() -> list[dict]:
            found = []
            for path in sorted(folder.glob("*.json")):
                commit = COMMIT_RECORD.read(path)
                check_commit(path, commit, fingerprint, layout)
                found.append(dict(commit))
            return found

        seconds, found = timed(read)
    files: dict[str, object] = {}

    def merge() -> bytes:
        for commit in found:
            files.update(commit["files"])
        return COMMIT_RECORD.encode({**found[0], "files": dict(sorted(files.items()))})

    merging, _ = timed(merge)
    return seconds / COMMITS, merging / len(files)


def sealing() -> float:
    """Bytes of memory for each row while a cache is sealed."""
    with tempfile.TemporaryDirectory() as place:
        folder, layout = Path(place), Layout(ROWS, WINDOW)
        write_text(folder, ROWS)
        writer = CacheWriter(folder, identity(), layout, {ARRAY: WIDTH})
        rng = np.random.default_rng(0)
        for window in writer.missing_windows():
            rows = len(layout.row_range(window))
            bits = (rng.standard_normal((rows, WIDTH)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            writer.write_window(
                window, WindowRows({ARRAY: bits}, np.zeros(rows, np.uint32), np.zeros(rows, np.uint16)), {}
            )
        del bits
        with AnonymousPeak() as before:
            time.sleep(0.05)
        with AnonymousPeak() as peak:
            writer.seal(10.0)
    return 1e6 * (peak.mb - before.mb) / ROWS


def hashing() -> float:
    data = bytes(100_000_000)
    seconds, _ = timed(lambda: hashlib.sha256(data).digest())
    return len(data) / seconds


def timed(work: Callable):
    started = time.process_time()
    result = work()
    return time.process_time() - started, result
