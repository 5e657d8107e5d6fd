"""The first token and the length of the contexts on which an SAE is evaluated.

An SAE that was trained here is evaluated on the unchanged contexts of its cache. An imported SAE was trained on other
text. The contexts for an imported SAE begin with the token that the SAE's files name or, if they name none, with the
token that a new harvest would use. They are cut to the length of the contexts on which the SAE was trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cache.context_format import ContextFormat
from ..cache.contexts import Contexts
from ..common.special_tokens import BOS_OR_EOS, choose_bos, special_tokens, token_text


@dataclass(frozen=True)
class ContextChange:
    """How contexts of a cache are changed for an SAE.

    Attributes:
        bos: the (earlier, new) first token of contexts; None if it stays the same.
        max_tokens: contexts are cut to this many tokens; None if none is longer.
    """

    bos: tuple[int | None, int | None] | None = None
    max_tokens: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The settings, besides those of the cache, on which a result depends; empty if the contexts do not change."""
        bos = {} if self.bos is None else {"bos": self.bos[1]}
        return bos | ({} if self.max_tokens is None else {"max_tokens": self.max_tokens})

    def format(self, form: ContextFormat) -> ContextFormat:
        """The format of the changed contexts. The first token of a changed context is not counted."""
        if self.bos is None:
            return form
        new = self.bos[1]
        return ContextFormat(new, tuple(sorted({*form.skip_ids, *([] if new is None else [new])})), form.skip_positions)

    def apply(self, contexts: Contexts) -> Contexts:
        """The contexts with their first token changed, in packed contexts also the first token of each document. They
        are cut to `max_tokens`, and empty contexts are left out.

        If a context was full, the added first token displaces its last token.
        """
        if self == ContextChange():
            return contexts
        size = min(contexts.ids.shape[1], self.max_tokens or contexts.ids.shape[1])
        ids_NS, length_N = np.zeros((len(contexts), size), np.uint32), np.zeros(len(contexts), np.uint16)
        rows_NS = None if contexts.rows is None else np.zeros(ids_NS.shape, bool)
        for number, length in enumerate(contexts.length):
            ids, index = self._begin(contexts.ids[number, :length])
            ids, index = ids[:size], index[:size]
            ids_NS[number, : len(ids)], length_N[number] = ids, len(ids)
            if rows_NS is not None and contexts.rows is not None:
                rows_NS[number, : len(ids)] = np.where(index < 0, False, contexts.rows[number, index])
        changed = Contexts(ids_NS, length_N, contexts.document, contexts.held_out, rows_NS)
        return changed.select(length_N > 0)

    def _begin(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a context with its new beginning, and the earlier position of each id (-1 for a new one)."""
        position = np.arange(len(ids))
        if self.bos is None:
            return ids, position
        earlier, new = self.bos
        if earlier is None:
            return np.concatenate([[new], ids]), np.concatenate([[-1], position])
        at = ids == earlier
        if new is None:
            return ids[~at], position[~at]
        return np.where(at, new, ids), position


def change_for(origin: Mapping[str, Any], form: ContextFormat, context: int, tokenizer: Any) -> ContextChange:
    """How contexts of `context` tokens in the format `form` are changed for an SAE with this origin."""
    if not is_imported(origin):
        return ContextChange()
    bos_id = choose_bos(tokenizer, bos_request(origin, tokenizer)).id
    trained_on = origin.get("context")
    shorter = trained_on if isinstance(trained_on, int) and 1 < trained_on < context else None
    return ContextChange(None if bos_id == form.bos_id else (form.bos_id, bos_id), shorter)


def is_imported(origin: Mapping[str, Any]) -> bool:
    """Whether an SAE comes from another library's files."""
    return "format" in origin


def bos_request(origin: Mapping[str, Any], tokenizer: Any) -> str:
    """The first token of contexts according to the files of an imported SAE, as a value for `sae harvest --bos`."""
    token, prepend_bos = origin.get("bos_token"), origin.get("prepend_bos")
    if prepend_bos is False:
        return "none"
    if isinstance(token, str) and token in special_tokens(tokenizer):
        return token
    return BOS_OR_EOS if prepend_bos else "auto"  # SAELens' tokenizers use EOS where there is no BOS


def text_request(origin: Mapping[str, Any]) -> tuple[Any, ...]:
    """A key that is equal for SAEs that are evaluated on the same contexts of a cache."""
    return tuple(origin.get(key) for key in ("bos_token", "prepend_bos", "context")) if is_imported(origin) else ()


def describe_change(
    name: str, origin: Mapping[str, Any], change: ContextChange, form: ContextFormat, context: int, tokenizer: Any
) -> list[str]:
    """Sentences about the contexts on which an imported SAE is evaluated."""
    if not is_imported(origin):
        return []

    def shown(token: int | None) -> str:
        return "no special token" if token is None else token_text(tokenizer, token)

    bos_id = form.bos_id if change.bos is None else change.bos[1]
    is_recorded = bos_request(origin, tokenizer) != "auto"
    lines = [
        f"{name}: contexts begin with {shown(bos_id)}, "
        f"{'as recorded in its files' if is_recorded else 'as in a new harvest (its files do not record the token)'}"
        + (f"; the contexts of the cache begin with {shown(change.bos[0])}" if change.bos else "")
    ]
    trained_on = origin.get("context")
    if change.max_tokens:
        lines.append(f"{name}: contexts are cut from {context} tokens to {change.max_tokens}, as it was trained on")
    elif isinstance(trained_on, int) and trained_on > context:
        lines.append(
            f"{name}: it was trained on contexts of {trained_on} tokens; the contexts of the cache have "
            f"{context} tokens"
        )
    return lines
