"""Text -> contexts: tokenize documents, cut them, hold some out, shuffle.

A context is BOS and up to `context - 1` tokens of one document; two documents never share a context. With `pack`,
contexts are full instead: documents follow each other, each after a BOS of its own, and a document that continues in
the next context gets a BOS there too. Held-out documents are packed only with each other.

A hash of the seed and the document's tokens decides which documents are held out. So no document that evaluation reads
was trained on, however often it occurs, and whether it comes as text or as token ids.
"""

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ..cache.contexts import Contexts
from ..common.errors import UnavailableError, UsageError
from .documents import Document, TextSource
from .tokenize_checkpoint import TokenizeCheckpoint

BATCH_DOCUMENTS, BATCH_CHARACTERS = 64, 2**24  # tokenized together
CHECKPOINT_TOKENS = 2_000_000  # between two checkpoints


def make_contexts(
    text: TextSource, tokenizer: Any, checkpoint: TokenizeCheckpoint, *, tokens: int, exactly: bool, context: int,
    held_out: float, skip: list[int], seed: int, pack: bool = False, checkpoint_tokens: int = CHECKPOINT_TOKENS,
) -> Contexts:  # fmt: skip
    """Contexts with `tokens` rows to harvest, shuffled, and the held-out ones that were met on the way.

    Continues from `checkpoint`, which is saved every `checkpoint_tokens` tokens; the result does not depend on when.
    While the text is read, memory holds 4 bytes for each of those tokens and one batch of documents with its tokens (at
    most BATCH_CHARACTERS + MAX_DOCUMENT characters), then 4 * context + 50 bytes for each context.

    Raises UsageError if the text has no tokens or, with `exactly`, too few, and UnavailableError if the text cannot be
    read any further; the checkpoint then holds everything read so far.
    """
    cutter = ContextCutter(require_bos_id(tokenizer), context, skip, tokens, pack)
    cut_documents(text, tokenizer, cutter, checkpoint, seed, held_out, checkpoint_tokens)
    if not cutter.rows:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in text.skipped.items() if count)
        why = f"all of its documents were skipped ({skipped})" if skipped else "it is empty"
        raise UsageError(f"The text {text.name} has no tokens to harvest: {why}. Give another --dataset.")
    if exactly and cutter.rows < tokens:
        raise UsageError(
            f"The text {text.name} has only {cutter.rows:,} of the requested {tokens:,} tokens. "
            f"Use --tokens {cutter.rows} or fewer, or give a longer text."
        )
    last = cutter.take()
    return shuffle_contexts(
        lambda: itertools.chain(checkpoint.read_parts(), [last]), context, tokenizer.pad_token_id or 0, seed
    )


def cut_documents(
    text: TextSource, tokenizer: Any, cutter: "ContextCutter", checkpoint: TokenizeCheckpoint, seed: int,
    held_out: float, checkpoint_tokens: int,
) -> None:  # fmt: skip
    """Feed documents to the cutter until it has enough rows or the text ends, saving checkpoints on the way."""
    number, state = 0, checkpoint.state
    if state:
        cutter.rows, cutter.unfinished, number = state["rows"], state["open"], state["documents"]
        text.say(f"Continuing {text.name} after {cutter.rows:,} tokens, which are already tokenized.")
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
        for document, ids in zip(batch, tokenize_batch(batch, tokenizer), strict=True):
            side = is_held_out(ids, seed, held_out) if document.held_out is None else document.held_out
            cutter.add(ids, number, side)
            number += 1
    cutter.flush()


class ContextCutter:
    """Cuts the token ids of documents into contexts until there are `tokens` rows to harvest.

    `unfinished` holds the context that is not full yet and the number of its first document, once for harvested and
    once for held-out documents. Without `pack` both are empty between documents.
    """

    def __init__(self, bos: int, context: int, skip: list[int], tokens: int, pack: bool) -> None:
        self.bos, self.context, self.skip, self.tokens, self.pack = bos, context, set(skip), tokens, pack
        self.rows = 0
        self.unfinished: list[tuple[list[int], int]] = [([], 0), ([], 0)]
        self.contexts = empty_contexts()

    def take(self) -> dict[str, np.ndarray]:
        """The contexts since the last call: ids (T,) of all, one after the other; length, document, held_out (N,)."""
        columns, self.contexts = self.contexts, empty_contexts()
        return {name: np.asarray(values) for name, values in columns.items()}

    def add(self, body: list[int], document: int, held_out: bool) -> None:
        """Add the ids of a document, without its BOS."""
        ids, first_document = self.unfinished[held_out]
        done = 0
        while done < len(body):
            first_document = first_document if ids else document
            ids.append(self.bos)
            part = body[done : done + self.context - len(ids)]
            ids += part
            done += len(part)
            if len(ids) == self.context:
                self._append(ids, first_document, held_out)
                ids = []
        self.unfinished[held_out] = ids, first_document
        if not self.pack:
            self.flush()

    def flush(self) -> None:
        """End the unfinished contexts where they are."""
        for held_out, (ids, first_document) in enumerate(self.unfinished):
            if ids:
                self._append(ids, first_document, bool(held_out))
        self.unfinished = [([], 0), ([], 0)]

    def _append(self, ids: list[int], first_document: int, held_out: bool) -> None:
        if not held_out:
            if self.rows >= self.tokens:
                return
            self.rows += sum(token not in self.skip for token in ids)
            while self.rows > self.tokens:  # shorten the last context, so that the number of rows is exact
                self.rows -= ids.pop() not in self.skip
        self.contexts["ids"].extend(ids)
        self.contexts["length"].append(len(ids))
        self.contexts["document"].append(first_document)
        self.contexts["held_out"].append(held_out)


def empty_contexts() -> dict[str, array]:
    """Four growing arrays, for any number of contexts: an object per context would take too much memory."""
    return {"ids": array("I"), "length": array("H"), "document": array("I"), "held_out": array("B")}


def next_batch(documents: Iterator[Document]) -> list[Document]:
    """The next documents to tokenize together. Empty at the end."""
    batch: list[Document] = []
    size = 0
    while len(batch) < BATCH_DOCUMENTS and size < BATCH_CHARACTERS and (document := next(documents, None)):
        batch.append(document)
        size += len(document.text)
    return batch


def tokenize_batch(batch: list[Document], tokenizer: Any) -> list[list[int]]:
    """The ids of each document, without BOS: every context adds its own, so that of pre-tokenized ids is removed."""
    texts = [document.text for document in batch if isinstance(document.text, str)]
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
    return [next(encoded) if isinstance(text, str) else text[text[0] == tokenizer.bos_token_id :] for text, _ in batch]


def shuffle_contexts(
    parts: Callable[[], Iterable[dict[str, np.ndarray]]], context: int, padding: int, seed: int
) -> Contexts:
    """The contexts of all parts, padded, in the seed's order. The held-out ones come last, so row_ctx starts at 0."""
    columns = zip(*((part["length"], part["document"], part["held_out"]) for part in parts()), strict=True)
    length, document, held_out = map(np.concatenate, columns)
    order = np.random.Generator(np.random.Philox(key=[seed, 2**63])).permutation(len(length))
    order = order[np.argsort(held_out[order], kind="stable")]
    destination = np.empty_like(order)
    destination[order] = np.arange(len(order))
    ids, first = np.full((len(length), context), padding, np.uint32), 0
    for part in parts():
        sizes = part["length"].astype(np.int64)
        position = np.arange(len(part["ids"])) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids[np.repeat(destination[first : first + len(sizes)], sizes), position] = part["ids"]
        first += len(sizes)
    return Contexts(ids, length[order], document[order], held_out[order].astype(bool))


def is_held_out(ids: list[int], seed: int, share: float) -> bool:
    """Whether a document is held out, by a hash of the seed and its tokens."""
    content = f"{seed}:".encode() + np.array(ids, np.uint32).tobytes()
    hashed = int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    return hashed < share * 2**64


def special_token_ids(tokenizer: Any) -> list[int]:
    """The ids of pad, EOS and BOS: the tokens whose rows are neither harvested nor evaluated."""
    return sorted(
        {i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None}
    )


def require_bos_id(tokenizer: Any) -> int:
    """The id with which every context begins. Raises UsageError if the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise UsageError(
            "This tokenizer has neither a BOS nor an EOS token, and every context begins with one. "
            "Choose a model whose tokenizer has one, such as Gemma, Llama, Qwen or Pythia."
        )
    return tokenizer.bos_token_id


def row_mask(contexts: Contexts, skip: list[int]) -> np.ndarray:
    """Which positions are rows, (N, S) bool: inside the context, and not a token of `skip`."""
    inside = np.arange(contexts.ids.shape[1]) < contexts.length[:, None]
    return inside & ~np.isin(contexts.ids, skip)
