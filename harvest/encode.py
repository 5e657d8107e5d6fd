"""Turn documents into token ids. A special token that is spelled out in a text is encoded as ordinary text."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..common.special_tokens import special_tokens
from ..common.tokenizers import is_fast
from .documents import Conversation, Document


class EncodedDocument(NamedTuple):
    """The ids of a document, without the token that its contexts begin with; conversations also have marks."""

    ids: list[int]
    marks: Sequence[int] = ()  # 1 at the tokens of the roles that are harvested


class TemplateRefusal(Exception):  # noqa: N818  (counted; the harvest continues)
    """The chat template does not render a conversation, for example because of the order of its roles."""


class ConversationEncoder(Protocol):
    """The interface of an object that turns conversations into token ids; see chat.py."""

    @property
    def roles(self) -> tuple[str, ...]: ...
    def encode(self, conversation: Conversation) -> EncodedDocument: ...


@dataclass(frozen=True)
class DocumentEncoder:
    """Turns documents into token ids.

    Attributes:
        bos_id: the token that contexts begin with. Every context gets it anyway, so it is removed from documents that
            are given as token ids.
        literals_are_text: whether `<bos>` in a text is encoded as five characters. Earlier versions encoded it as the
            special token.
        chat: the encoder of conversations, for a text that consists of them.
        embedded: the number of token ids for which the model has an embedding, if the tokenizer may have more.
    """

    tokenizer: Any
    bos_id: int | None
    literals_are_text: bool = True
    chat: ConversationEncoder | None = None
    embedded: int | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The conversation roles whose tokens are rows; empty if the tokens of all roles are rows."""
        return () if self.chat is None else self.chat.roles

    @property
    def padding(self) -> int:
        """The token that pads contexts; the model's outputs at padding are never used."""
        padding = self.tokenizer.pad_token_id or 0
        return padding if self.embedded is None or padding < self.embedded else 0

    @property
    def marks_rows(self) -> bool:
        """Whether documents come with marks."""
        return bool(self.roles)

    def __call__(self, batch: Sequence[Document]) -> list[EncodedDocument | TemplateRefusal]:
        """The ids of each document; for a conversation that the template does not render, the reason."""
        encoded = iter(self.encode_texts([document.text for document in batch if isinstance(document.text, str)]))

        def encode_one(text: Any) -> EncodedDocument | TemplateRefusal:
            if isinstance(text, str):
                return EncodedDocument(next(encoded))
            if not isinstance(text, Conversation):
                return EncodedDocument(text[text[0] == self.bos_id :])
            assert self.chat is not None
            try:
                ids, marks = self.chat.encode(text)
            except TemplateRefusal as refusal:
                return refusal
            own_bos = int(bool(ids) and ids[0] == self.bos_id)
            return EncodedDocument(ids[own_bos:], marks[own_bos:])

        return [encode_one(document.text) for document in batch]

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts, without any special tokens around them."""
        if not texts:
            return []
        if not self.literals_are_text:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return encode_as_text(self.tokenizer, texts)


def encode_as_text(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts. Special tokens that the texts spell out are tokenized as ordinary text.

    A tokenizer's Unigram or WordPiece model can have a special token as a piece in its own vocabulary and find it in
    the text. Then the special token is cut into parts, and the ids of the parts replace its id.
    """
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]  # fmt: skip
    spelled = special_tokens(tokenizer)
    number_of = {number: token for token, number in spelled.items()}
    for index, (text, found) in enumerate(zip(texts, ids, strict=True)):
        if not number_of.keys().isdisjoint(found) and any(token in text for token in spelled):
            ids[index] = split_literals(tokenizer, text, number_of)
    return ids


def split_literals(tokenizer: Any, text: str, number_of: dict[int, str]) -> list[int]:
    """The ids of a text. Each special token recognized in the text is replaced by the ids of the token's parts.

    A special token that replaces other text, such as `<unk>` for an unknown character, is kept.
    """
    if not is_fast(tokenizer):
        return split_before_encoding(tokenizer, text, list(number_of.values()))
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    ids: list[int] = []
    for number, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        token = number_of.get(number)
        ids += spell(tokenizer, token) if token is not None and text[start:end].strip() == token else [number]
    return ids


def split_before_encoding(tokenizer: Any, text: str, tokens: list[str]) -> list[int]:
    """The ids of a text, for a tokenizer written in Python: each special token is cut in two before tokenization."""
    pattern = re.compile("|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))))
    cuts = [0, *(match.start() + 1 for match in pattern.finditer(text)), len(text)]
    parts = [text[first:last] for first, last in itertools.pairwise(cuts) if first < last]
    encoded = tokenizer(parts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [number for ids in encoded for number in ids]


def spell(tokenizer: Any, token: str) -> list[int]:
    """The ids of a special token's text, cut in two at the first place that leaves no special token in the ids."""
    model = tokenizer.backend_tokenizer.model
    special = set(special_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
    for cut in range(1, len(token)):
        ids = [piece.id for part in (token[:cut], token[cut:]) for piece in model.tokenize(part)]
        if special.isdisjoint(ids):
            return ids
    return [piece.id for character in token for piece in model.tokenize(character)]
