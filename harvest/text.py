"""Text -> contexts: stream documents, tokenise, cut, hold documents out, shuffle.

A context is BOS and up to `context - 1` tokens of one document; a document never shares a context with another. Which
documents are held out is a hash of the seed and the document's text, so no document that evaluation reads was trained
on, however often it occurs.
"""

import contextlib
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cache.contexts import Contexts
from ..cache.errors import OutsideError, SaeError, UsageError
from .mini import corpus, spelling

PILE = "monology/pile-uncopyrighted"
EMBEDDED = "python-stdlib"
READERS = {".jsonl": "json", ".json": "json", ".zst": "json", ".parquet": "parquet", ".txt": "text"}
SPELLED_LINES = 40  # of spelling after each embedded document: about one token in ten
DOCUMENTS_AT_ONCE = 64  # tokenised together


class Document(NamedTuple):
    text: str
    held_out: bool | None  # None: the hash decides


@dataclass
class Text:
    """A source of documents, and what pins it."""

    name: str
    identity: dict[str, Any]
    documents: Iterator[Document]
    skipped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "not text": 0})


def open_text(name: str, *, tokenizer: Any, revision: str | None, split: str, column: str, seed: int) -> Text:
    """The embedded corpus, a local file or folder, or a dataset of the Hub, streamed.

    Raises UsageError for a file that cannot be read or a column that is not there, OutsideError without network.
    """
    if name == EMBEDDED:
        return embedded(tokenizer, seed)
    path = Path(name)
    if path.exists():
        return local(path, column)
    if path.suffix in READERS or name.startswith((".", "/")):
        raise UsageError(
            f"There is no file {name}. Give a .txt, .jsonl or .parquet file, a folder of them, a Hub dataset, or {EMBEDDED}."
        )
    return hub(name, revision, split, column)


def embedded(tokenizer: Any, seed: int) -> Text:
    """The standard library of the running Python, each harvested document followed by a little spelling."""
    found = sorted(
        corpus.documents(), key=lambda d: hashlib.sha256(d.name.encode()).digest()
    )  # a small harvest is a fair sample
    digest = hashlib.sha256()
    for document in found:
        digest.update(f"{document.name}\0{document.text}\0".encode())
    pool, rng = spelling.words(tokenizer), random.Random(seed)

    def documents() -> Iterator[Document]:
        for document in found:
            yield Document(document.text, document.held_out)
            if not document.held_out:  # a held-out line of spelling would hardly ever be a new one
                lines = (spelling.example(rng.choice(pool)) for _ in range(SPELLED_LINES))
                yield Document("".join(f"\n{line}" for line in lines), held_out=False)

    return Text(
        EMBEDDED, {"name": EMBEDDED, "revision": digest.hexdigest(), "spelled_lines": SPELLED_LINES}, documents()
    )


def local(path: Path, column: str) -> Text:
    """Files of one kind. A line of JSON or a row of Parquet is a document; a text file is cut at blank lines."""
    files = sorted(p for p in path.rglob("*") if p.suffix in READERS) if path.is_dir() else [path]
    kinds = {READERS.get(p.suffix) for p in files}
    if len(kinds) != 1 or None in kinds:
        raise UsageError(
            f"{path} has {sorted({p.suffix for p in files}) or 'no files'}; give files of one kind: {', '.join(READERS)}."
        )
    digest = hashlib.sha256()
    try:
        if not any(file.stat().st_size for file in files):
            raise UsageError(f"{path} is empty. Give a text to --dataset.")
        for file in files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}.") from error
    (kind,) = kinds
    name = path.stem.removesuffix(".jsonl") or path.name
    identity = {"name": name, "revision": digest.hexdigest(), "column": column if kind != "text" else None}
    text = Text(name, identity, iter(()))
    if kind == "text":
        text.documents = (Document(section, None) for file in files for section in sections(read_text(file)))
        return text
    import datasets

    def unreadable(problem: str) -> SaeError:
        return UsageError(f"{path} cannot be read as {kind}: {problem}")

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would say the same before us, with a traceback
    with told(unreadable):
        rows = datasets.load_dataset(kind, data_files=[str(f) for f in files], split="train", streaming=True)
        text.documents = column_of(rows, column, str(path), text.skipped, unreadable)
    return text


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 text (byte {error.start}). Convert it, or give .jsonl or .parquet."
        ) from error


def sections(text: str, at_least: int = 2000) -> Iterator[str]:
    """Runs of paragraphs of at least `at_least` characters: the documents of a plain text file."""
    held, size = [], 0
    for paragraph in text.split("\n\n"):
        held.append(paragraph)
        size += len(paragraph)
        if size >= at_least:
            yield "\n\n".join(held)
            held, size = [], 0
    if any(paragraph.strip() for paragraph in held):
        yield "\n\n".join(held)


def hub(name: str, revision: str | None, split: str, column: str) -> Text:
    import datasets
    import huggingface_hub

    def unreachable(problem: str) -> SaeError:
        return OutsideError(
            f"The dataset {name} could not be read: {problem} Check the network and the name, give a local file to --dataset, "
            f"or use the embedded text: --dataset {EMBEDDED}"
        )

    with told(unreachable):
        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=20).sha
        rows = datasets.load_dataset(name, revision=commit, split=split, streaming=True)
        text = Text(name.split("/")[-1], {"name": name, "revision": commit, "split": split, "column": column}, iter(()))
        text.documents = column_of(rows, column, name, text.skipped, unreachable)
    return text


@contextlib.contextmanager
def told(sentence: Callable[[str], SaeError]) -> Iterator[None]:
    """Turn whatever is raised into our sentence about it."""
    try:
        yield
    except SaeError:
        raise
    except Exception as error:  # datasets and the Hub raise through pyarrow, httpx, fsspec and classes of their own
        problem = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise sentence(problem) from error


def column_of(
    rows: Any, column: str, name: str, skipped: dict[str, int], sentence: Callable[[str], SaeError]
) -> Iterator[Document]:
    """The texts of a dataset; UsageError at once when the column is not there."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise UsageError(f"{name} has no rows.")
    if column not in first:
        raise UsageError(
            f"{name} has no column {column!r}; its columns are {', '.join(map(repr, first))}. Choose one with --text-column."
        )

    def documents() -> Iterator[Document]:
        with told(sentence):  # a file broken further down, a network lost on the way
            for row in itertools.chain([first], rows):
                value = row.get(column)
                if not isinstance(value, str):
                    skipped["not text"] += 1
                elif not value.strip():
                    skipped["empty"] += 1
                else:
                    yield Document(value, None)

    return documents()


def is_held_out(text: str, seed: int, fraction: float) -> bool:
    hashed = int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode(errors="surrogatepass")).digest()[:8], "little")
    return hashed < fraction * 2**64


def specials(tokenizer: Any) -> list[int]:
    """The ids of pad, eos and bos: the tokens whose rows are not harvested, and not evaluated."""
    return sorted(
        {i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None}
    )


def rows_of(contexts: Contexts, skip: list[int]) -> np.ndarray:
    """Which positions are rows, (N, S) bool: inside the context, and no token of `skip`."""
    inside = np.arange(contexts.ids.shape[1]) < contexts.length[:, None]
    return inside & ~np.isin(contexts.ids, skip)


def cut(
    text: Text, tokenizer: Any, *, tokens: int, exactly: bool, context: int, held_out: float, skip: list[int], seed: int
) -> Contexts:
    """Contexts holding `tokens` rows to harvest, in shuffled order, and the held-out ones met on the way.

    With `exactly`, UsageError when the text is too short.
    """
    if tokenizer.bos_token_id is None:
        raise UsageError("This tokenizer has no BOS token; contexts begin with it.")
    ids: list[np.ndarray] = []
    document_of: list[int] = []
    held: list[bool] = []
    rows, skipped = 0, set(skip)
    numbered = enumerate(text.documents)
    while rows < tokens and (batch := list(itertools.islice(numbered, DOCUMENTS_AT_ONCE))):
        encoded = tokenizer([d.text for _, d in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for (number, document), body in zip(batch, encoded, strict=True):
            out = is_held_out(document.text, seed, held_out) if document.held_out is None else document.held_out
            for start in range(0, len(body), context - 1):
                if not out and rows >= tokens:
                    break
                piece = [tokenizer.bos_token_id, *body[start : start + context - 1]]
                if not out:
                    rows += sum(token not in skipped for token in piece)
                    while rows > tokens:  # the last context is cut, so that there are as many rows as were asked for
                        rows -= piece.pop() not in skipped
                ids.append(np.array(piece, np.uint32))
                document_of.append(number)
                held.append(out)
    if not rows:
        raise UsageError(f"The text {text.name} has no tokens to harvest: it is empty. Give another --dataset.")
    if exactly and rows < tokens:
        raise UsageError(
            f"The text {text.name} ended at {rows:,} of {tokens:,} tokens. Ask for --tokens {rows} or fewer, or give more text."
        )
    length = np.array([len(c) for c in ids], np.uint16)
    padded = np.full((len(ids), context), tokenizer.pad_token_id or 0, np.uint32)
    for row, one in zip(padded, ids, strict=True):
        row[: len(one)] = one
    order = np.random.Generator(np.random.Philox(key=[seed, 2**63])).permutation(len(ids))
    order = order[
        np.argsort(np.array(held)[order], kind="stable")
    ]  # held out comes last: row_ctx counts from the first
    return Contexts(padded, length, np.array(document_of, np.uint32), np.array(held)).select(order)
