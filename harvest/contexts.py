"""Text -> contexts: tokenise documents, cut them, hold some out, shuffle.

A context is BOS and up to `context - 1` tokens of one document; a document never shares a context with another. With
`pack` contexts are full instead: documents follow each other, each after a BOS of its own, those held out among
themselves; what goes on in the next context begins with BOS there too.

Which documents are held out is a hash of the seed and the document's tokens, so no document that evaluation reads was
trained on, however often it occurs, as text or tokenised before. A document is what the source calls one: a row, or a run
of paragraphs of a text file. Rows into which several documents were packed before are held out as they are.
"""

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..cache.contexts import Contexts
from ..common.errors import UnavailableError, UsageError
from .tokenize_checkpoint import TokenizeCheckpoint

MAX_DOCUMENT = (
    20_000_000  # characters, or ids: a document longer than this is a dump, and its tokens would fill the memory
)
BATCH_DOCUMENTS, BATCH_CHARACTERS = 64, 2**24  # tokenised together
CHECKPOINT_TOKENS = 2_000_000


class Document(NamedTuple):
    text: Any  # str, or a list of ids tokenised before; a document of anything else is skipped
    held_out: bool | None = None  # None: the hash decides


class DocumentReader(Protocol):
    """They come in order. `position`, which JSON can hold, says how far it was read; None is the beginning."""

    position: Any

    def __iter__(self) -> Iterator[Document]: ...
    def go_to(self, position: Any) -> None: ...


class ListedDocuments:
    """Documents that are cheap to read over: the position is their number."""

    def __init__(self, make: Callable[[], Iterable[Document]]) -> None:
        self.make = make
        self.go_to(None)

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            self.position += 1
            yield document

    def go_to(self, position: int | None) -> None:
        self.position = position or 0
        self.documents = itertools.islice(self.make(), self.position, None)


@dataclass
class TextSource:
    """A source of documents, what pins it, and how many of its documents were no text that can be used."""

    name: str
    identity: dict[str, Any]
    source: DocumentReader
    tell: Callable[[str], None] = lambda sentence: None  # to the user
    skipped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "not text": 0, "huge": 0})

    @property
    def documents(self) -> Iterator[Document]:
        for document in self.source:
            if reason := skip_reason(document.text):
                self.skipped[reason] += 1
            else:
                yield document

    @property
    def state(self) -> dict[str, Any]:
        return {"position": self.source.position, "skipped": dict(self.skipped)}

    def go_to(self, state: dict[str, Any] | None) -> None:
        """Where `state` was taken; None is the beginning."""
        self.source.go_to(state and state["position"])
        self.skipped |= state["skipped"] if state else dict.fromkeys(self.skipped, 0)


def skip_reason(text: Any) -> str | None:
    """Why a document is skipped; None when it is not."""
    if not (isinstance(text, str) or is_token_ids(text)):
        return "not text"
    if len(text) > MAX_DOCUMENT:
        return "huge"
    return "empty" if not text or (isinstance(text, str) and text.isspace()) else None


def is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}


def is_held_out(ids: list[int], seed: int, fraction: float) -> bool:
    content = f"{seed}:".encode() + np.array(ids, np.uint32).tobytes()
    hashed = int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    return hashed < fraction * 2**64


def special_token_ids(tokenizer: Any) -> list[int]:
    """The ids of pad, eos and bos: the tokens whose rows are not harvested, and not evaluated."""
    return sorted(
        {i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None}
    )


def require_bos_id(tokenizer: Any) -> int:
    """The id with which every context begins; UsageError where there is none."""
    if tokenizer.bos_token_id is None:
        raise UsageError(
            "This tokenizer has neither a BOS nor an EOS token, and every context begins with one. There is no option to go "
            "without one yet: choose a model whose tokenizer has it, such as Gemma, Llama, Qwen or Pythia."
        )
    return tokenizer.bos_token_id


def row_mask(contexts: Contexts, skip: list[int]) -> np.ndarray:
    """Which positions are rows, (N, S) bool: inside the context, and no token of `skip`."""
    inside = np.arange(contexts.ids.shape[1]) < contexts.length[:, None]
    return inside & ~np.isin(contexts.ids, skip)


class ContextCutter:
    """Documents' ids -> contexts, until there are `tokens` rows to harvest.

    `open` is the context not full yet and its first document, [harvested, held out]; only `pack` leaves them open.
    """

    def __init__(self, bos: int, context: int, skip: list[int], tokens: int, pack: bool) -> None:
        self.bos, self.context, self.skip, self.tokens, self.pack = bos, context, set(skip), tokens, pack
        self.rows = 0
        self.open: list[tuple[list[int], int]] = [([], 0), ([], 0)]
        self.part = empty_contexts()

    def take(self) -> dict[str, np.ndarray]:
        """The contexts since the last call: ids (T,) of all, one after the other; length, document, held_out (N,)."""
        taken, self.part = self.part, empty_contexts()
        return {name: np.asarray(values) for name, values in taken.items()}

    def add(self, body: list[int], document: int, held_out: bool) -> None:
        piece, first = self.open[held_out]
        done = 0
        while done < len(body):
            first = first if piece else document
            piece.append(self.bos)
            taken = body[done : done + self.context - len(piece)]
            piece += taken
            done += len(taken)
            if len(piece) == self.context:
                self.write(piece, first, held_out)
                piece = []
        self.open[held_out] = piece, first
        if not self.pack:
            self.close()

    def close(self) -> None:
        """What is open is a context as it is."""
        for held_out, (piece, first) in enumerate(self.open):
            if piece:
                self.write(piece, first, bool(held_out))
        self.open = [([], 0), ([], 0)]

    def write(self, piece: list[int], first: int, held_out: bool) -> None:
        if not held_out:
            if self.rows >= self.tokens:
                return
            self.rows += sum(token not in self.skip for token in piece)
            while self.rows > self.tokens:  # the last context is cut, so that there are as many rows as were asked for
                self.rows -= piece.pop() not in self.skip
        self.part["ids"].extend(piece)
        self.part["length"].append(len(piece))
        self.part["document"].append(first)
        self.part["held_out"].append(held_out)


def empty_contexts() -> dict[str, array]:
    """Where contexts are gathered: four arrays, however many there are."""
    return {"ids": array("I"), "length": array("H"), "document": array("I"), "held_out": array("B")}


def make_contexts(
    text: TextSource, tokenizer: Any, draft: TokenizeCheckpoint, *, tokens: int, exactly: bool, context: int, held_out: float,
    skip: list[int], seed: int, pack: bool = False, draft_tokens: int = CHECKPOINT_TOKENS,
) -> Contexts:  # fmt: skip
    """Contexts holding `tokens` rows to harvest, in shuffled order, and the held-out ones met on the way.

    It goes on from `draft`, which takes what is cut every `draft_tokens` tokens; the result does not depend on when.
    Memory: 4 bytes for each of those tokens and one batch of documents with its tokens (at most CHARACTERS_AT_ONCE +
    HUGE characters) while the text is read; then 4 * context + 50 bytes for each context.

    With `exactly`, UsageError when the text is too short. OutsideError when the text cannot be read further; the draft
    then holds all that was cut.
    """
    cutter, number, state = ContextCutter(require_bos_id(tokenizer), context, skip, tokens, pack), 0, draft.state
    if state:
        cutter.rows, cutter.open, number = state["rows"], state["open"], state["documents"]
        text.tell(f"Going on with {text.name} after {cutter.rows:,} tokens, which were cut before.")
    text.go_to(state and state["text"])
    documents = text.documents

    def keep(reading: dict[str, Any]) -> None:
        draft.add(cutter.take(), {"text": reading, "documents": number, "rows": cutter.rows, "open": cutter.open})

    while cutter.rows < tokens:
        reading = text.state
        if len(cutter.part["ids"]) >= draft_tokens:
            keep(reading)
        try:
            batch = next_batch(documents)
        except UnavailableError:
            keep(reading)
            raise
        if not batch:
            break
        for document, body in zip(batch, tokenize_batch(batch, tokenizer), strict=True):
            out = document.held_out
            if out is None:
                out = is_held_out(body, seed, held_out)
            cutter.add(body, number, out)
            number += 1
    cutter.close()
    if not cutter.rows:
        unread = ", ".join(f"{count:,} {why}" for why, count in text.skipped.items() if count)
        raise UsageError(
            f"The text {text.name} has no tokens to harvest: {f'its documents were skipped ({unread})' if unread else 'it is empty'}. "
            "Give another --dataset."
        )
    if exactly and cutter.rows < tokens:
        raise UsageError(
            f"The text {text.name} ended at {cutter.rows:,} of {tokens:,} tokens. Ask for --tokens {cutter.rows} or fewer, or give more text."
        )
    last = cutter.take()
    return shuffle_contexts(lambda: itertools.chain(draft.parts(), [last]), context, tokenizer.pad_token_id or 0, seed)


def next_batch(documents: Iterator[Document]) -> list[Document]:
    """The next documents that are tokenised together; none at the end."""
    batch: list[Document] = []
    size = 0
    while len(batch) < BATCH_DOCUMENTS and size < BATCH_CHARACTERS and (document := next(documents, None)):
        batch.append(document)
        size += len(document.text)
    return batch


def tokenize_batch(batch: list[Document], tokenizer: Any) -> list[list[int]]:
    """The ids of each document; a BOS before those tokenised before is dropped, since contexts put their own."""
    texts = [document.text for document in batch if isinstance(document.text, str)]
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
    return [next(encoded) if isinstance(text, str) else text[text[0] == tokenizer.bos_token_id :] for text, _ in batch]


def shuffle_contexts(
    parts: Callable[[], Iterable[dict[str, np.ndarray]]], context: int, padding: int, seed: int
) -> Contexts:
    """The contexts of all parts, padded, in the seed's order, those held out last: row_ctx counts from the first."""
    each = zip(*((part["length"], part["document"], part["held_out"]) for part in parts()), strict=True)
    length, document, held_out = map(np.concatenate, each)
    order = np.random.Generator(np.random.Philox(key=[seed, 2**63])).permutation(len(length))
    order = order[np.argsort(held_out[order], kind="stable")]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    ids, first = np.full((len(length), context), padding, np.uint32), 0
    for part in parts():
        sizes = part["length"].astype(np.int64)
        position = np.arange(len(part["ids"])) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids[np.repeat(place[first : first + len(sizes)], sizes), position] = part["ids"]
        first += len(sizes)
    return Contexts(ids, length[order], document[order], held_out[order].astype(bool))
