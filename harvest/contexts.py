"""Turn text into contexts: tokenize documents, hold some of them out, cut them into contexts, and shuffle.

A context is BOS and up to `context - 1` tokens of one document; two documents never share a context. With `pack`,
contexts are filled up: documents follow each other, each after its own BOS, and a document that continues in the next
context gets a BOS there too. Held-out documents are packed only with each other. The `ContextFormat` determines the BOS
token, if any, and which tokens are rows.

A hash of the seed and the document's tokens decides which documents are held out. So training never sees a document
that evaluation reads, even if it occurs several times, no matter whether it is given as text or as token ids.
"""

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..cache.context_format import ContextFormat
from ..cache.contexts import Contexts
from ..common.errors import UnavailableError, UsageError
from ..common.formatting import format_count
from ..common.tokenizers import check_embedded
from .documents import Conversation, Document, TextSource, describe_unreadable
from .encode import DocumentEncoder, TemplateRefusal
from .tokenize_checkpoint import TokenizeCheckpoint

BATCH_DOCUMENTS, BATCH_CHARACTERS = 64, 2**24  # tokenized together
CHECKPOINT_TOKENS = 2_000_000  # between two checkpoints


def make_contexts(
    text: TextSource, encode: DocumentEncoder, form: ContextFormat, checkpoint: TokenizeCheckpoint, *, tokens: int,
    exactly: bool, context: int, held_out: float, seed: int, pack: bool = False,
    checkpoint_tokens: int = CHECKPOINT_TOKENS,
) -> Contexts:  # fmt: skip
    """Shuffled contexts with `tokens` rows to harvest, and the held-out contexts found while reading them.

    Continues from `checkpoint`, which is saved every `checkpoint_tokens` tokens; this does not affect the result. While
    the text is read, memory use is 4 bytes for each of these `checkpoint_tokens` tokens, plus one batch of documents
    with its tokens (at most BATCH_CHARACTERS + MAX_DOCUMENT characters); afterwards, it is 4 * context + 50 bytes per
    context. Conversations take one more byte per token.

    Raises UsageError if the text has no tokens, if it has too few and `exactly` is set, or if the model has no
    embedding for one of its tokens. Raises UnavailableError if the text cannot be read any further; the checkpoint then
    contains everything read so far.
    """
    cutter = ContextCutter(form, context, tokens, pack, marked=encode.marks_rows)
    cut_documents(text, encode, cutter, checkpoint, seed, held_out, checkpoint_tokens)
    text.check_readable()
    remarks = "".join(f" {remark}" for remark in [*text.remarks, describe_unreadable(text.unreadable_rows)] if remark)
    if not cutter.rows:
        if checkpoint.checksums or cutter.contexts["length"]:
            raise UsageError(
                f"Every token of the text {text.name} is left out or held out.{remarks} Check --skip-positions, "
                "--skip-token, --roles and --held-out, or give another --dataset."
            )
        raise UsageError(
            f"The text {text.name} has no tokens to harvest: {why_no_rows(text)}.{remarks} Give another --dataset."
        )
    if exactly and cutter.rows < tokens:
        raise UsageError(
            f"The text {text.name} has only {cutter.rows:,} of the requested {tokens:,} tokens.{remarks} "
            f"Use --tokens {cutter.rows} or fewer, or give a longer text."
        )
    last = cutter.take()
    return shuffle_contexts(lambda: itertools.chain(checkpoint.read_parts(), [last]), context, encode.padding, seed)


def why_no_rows(text: TextSource) -> str:
    """Explain why a text has no rows to harvest."""
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in text.skipped.items() if count)
    return f"all of its documents were skipped ({skipped})" if skipped else "it is empty"


def cut_documents(
    text: TextSource, encode: DocumentEncoder, cutter: "ContextCutter", checkpoint: TokenizeCheckpoint, seed: int,
    held_out: float, checkpoint_tokens: int,
) -> None:  # fmt: skip
    """Feed documents to the cutter until it has enough rows or the text ends, saving checkpoints on the way."""
    number, state = 0, checkpoint.state
    if state:
        cutter.rows, number = state["rows"], state["documents"]
        cutter.unfinished = [Unfinished(*saved) for saved in state["open"]]
        text.say(f"Continuing {text.name} after {cutter.rows:,} tokens, which are already tokenized.")
    elif checkpoint.discarded:
        text.say(f"The tokens of an earlier run cannot be used, so tokenizing starts over: {checkpoint.discarded}")
    text.seek(state and state["text"])
    documents = text.documents

    def save(text_state: dict[str, Any]) -> None:
        state = {"text": text_state, "documents": number, "rows": cutter.rows, "open": cutter.unfinished}
        checkpoint.save(cutter.take(), state)

    while cutter.rows < cutter.tokens:
        text_state = text.state
        if len(cutter.contexts["ids"]) >= checkpoint_tokens:
            save(text_state)
        try:
            batch = next_batch(documents)
        except UnavailableError:
            save(text_state)
            raise
        if not batch:
            break
        if number == 0 and (sentence := describe_absent_roles(encode.roles, [one.text for one in batch])):
            text.remark(sentence)
        for document, encoded in zip(batch, encode(batch), strict=True):
            if isinstance(encoded, TemplateRefusal):
                text.refuse(str(encoded))
                continue
            ids, marks = encoded
            check_embedded(ids, encode.embedded, encode.tokenizer, name_document(document, number, text.name))
            side = is_held_out(ids, seed, held_out) if document.held_out is None else document.held_out
            cutter.add(ids, number, side, marks)
            number += 1
    cutter.flush()


def name_document(document: Document, number: int, text: str) -> str:
    """A description of a document, for a message."""
    begins = f", which begins {document.text[:40]!r}," if isinstance(document.text, str) else ""
    return f"Document {number:,} (counted from 0) of the text {text}{begins}"


def describe_absent_roles(roles: Sequence[str], conversations: Sequence[Any]) -> str:
    """A message that names the `roles` that occur nowhere, since they may be misspelled; empty if every role occurs."""
    present = {message["role"] for one in conversations if isinstance(one, Conversation) for message in one.messages}
    absent = [role for role in roles if role not in present]
    if not absent or not present:
        return ""
    return (
        f"No message of the first {format_count(len(conversations), 'conversation')} has the role "
        f"{' or '.join(map(repr, absent))}; their roles are {', '.join(sorted(present))}."
    )


class Unfinished(NamedTuple):
    """A context that is not full yet: its ids, the number of its first document, and the marks of the ids, if any."""

    ids: list[int]
    document: int = 0
    marks: Sequence[int] = ()


class ContextCutter:
    """Cuts the token ids of documents into contexts until there are `tokens` rows to harvest.

    `unfinished` holds the contexts that are not full yet: one for harvested documents, one for held-out documents.
    Without `pack` both are empty between documents. With `marked`, every document comes with marks that say which of
    its tokens are rows.
    """

    def __init__(self, form: ContextFormat, context: int, tokens: int, pack: bool, marked: bool = False) -> None:
        self.form, self.context, self.tokens, self.pack, self.marked = form, context, tokens, pack, marked
        self.skip = frozenset(form.skip_ids)
        self.rows = 0
        self.unfinished = [Unfinished([]), Unfinished([])]
        self.contexts = empty_contexts(marked)

    def take(self) -> dict[str, np.ndarray]:
        """The contexts added since the last call: their concatenated ids (T,), and length, document, held_out (N,).

        With `marked` also rows (T,).
        """
        columns, self.contexts = self.contexts, empty_contexts(self.marked)
        return {name: np.asarray(values) for name, values in columns.items()}

    def add(self, body: list[int], document: int, held_out: bool, marks: Sequence[int] = ()) -> None:
        """Add the ids of a document, without its BOS; with `marked`, also their marks."""
        ids, first_document, ids_marks = self.unfinished[held_out]
        ids, ids_marks, done = list(ids), list(ids_marks), 0
        while done < len(body):
            first_document = first_document if ids else document
            if self.form.bos_id is not None:
                ids.append(self.form.bos_id)
                ids_marks += [0] * self.marked
            taken = slice(done, done + self.context - len(ids))
            ids += body[taken]
            ids_marks += marks[taken]
            done = min(taken.stop, len(body))
            if len(ids) == self.context:
                self._append(ids, first_document, held_out, ids_marks)
                ids, ids_marks = [], []
        self.unfinished[held_out] = Unfinished(ids, first_document, ids_marks)
        if not self.pack:
            self.flush()

    def flush(self) -> None:
        """End the unfinished contexts."""
        for held_out, (ids, first_document, marks) in enumerate(self.unfinished):
            if ids:
                self._append(ids, first_document, bool(held_out), marks)
        self.unfinished = [Unfinished([]), Unfinished([])]

    def _append(self, ids: list[int], first_document: int, held_out: bool, marks: Sequence[int]) -> None:
        if not held_out:
            if self.rows >= self.tokens:
                return
            self.rows += self._count_rows(ids, marks)
            while self.rows > self.tokens:  # shorten the last context, so that the number of rows is exact
                self.rows -= self._is_row(ids, marks, len(ids) - 1)
                ids.pop()
        self.contexts["ids"].extend(ids)
        self.contexts["length"].append(len(ids))
        self.contexts["document"].append(first_document)
        self.contexts["held_out"].append(held_out)
        if self.marked:
            self.contexts["rows"].extend(marks[: len(ids)])

    def _count_rows(self, ids: list[int], marks: Sequence[int]) -> int:
        if self.marked:
            return sum(self._is_row(ids, marks, position) for position in range(len(ids)))
        return sum(token not in self.skip for token in ids[self.form.skip_positions :])  # same result, faster

    def _is_row(self, ids: list[int], marks: Sequence[int], position: int) -> bool:
        marked = not self.marked or bool(marks[position])
        return marked and position >= self.form.skip_positions and ids[position] not in self.skip


def empty_contexts(marked: bool) -> dict[str, array]:
    """Empty growable arrays for all contexts, since one object per context would take too much memory."""
    columns = {"ids": array("I"), "length": array("H"), "document": array("I"), "held_out": array("B")}
    return columns | ({"rows": array("B")} if marked else {})


def next_batch(documents: Iterator[Document]) -> list[Document]:
    """The next batch of documents, which are tokenized in one call. Empty at the end of the text."""
    batch: list[Document] = []
    size = 0
    while len(batch) < BATCH_DOCUMENTS and size < BATCH_CHARACTERS and (document := next(documents, None)):
        batch.append(document)
        size += len(document.text)
    return batch


def shuffle_contexts(
    parts: Callable[[], Iterable[dict[str, np.ndarray]]], context: int, padding: int, seed: int
) -> Contexts:
    """All contexts, padded, in a random order that depends on the seed; the held-out contexts come after all others."""
    columns = zip(*((part["length"], part["document"], part["held_out"]) for part in parts()), strict=True)
    length, document, held_out = map(np.concatenate, columns)
    order = np.random.Generator(np.random.Philox(key=[seed, 2**63])).permutation(len(length))
    order = order[np.argsort(held_out[order], kind="stable")]
    destination = np.empty_like(order)
    destination[order] = np.arange(len(order))
    ids, first = np.full((len(length), context), padding, np.uint32), 0
    rows: np.ndarray | None = None
    for part in parts():
        sizes = part["length"].astype(np.int64)
        position = np.arange(len(part["ids"])) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        place = np.repeat(destination[first : first + len(sizes)], sizes), position
        ids[place] = part["ids"]
        if "rows" in part:
            rows = np.zeros(ids.shape, bool) if rows is None else rows
            rows[place] = part["rows"]
        first += len(sizes)
    return Contexts(ids, length[order], document[order], held_out[order].astype(bool), rows)


def is_held_out(ids: list[int], seed: int, share: float) -> bool:
    """Whether a document is held out, decided by a hash of the seed and its tokens."""
    content = f"{seed}:".encode() + np.array(ids, np.uint32).tobytes()
    hashed = int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    return hashed < share * 2**64
