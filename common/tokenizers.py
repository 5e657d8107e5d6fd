"""Identify a tokenizer, and find tokens that the model has no embedding for."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import digest_of

SHOWN_TOKENS = 5
# Options of a Python tokenizer that do not affect token ids: where its files are, and how it was loaded.
PLACES = {
    "name_or_path", "is_local", "local_files_only", "backend", "model_max_length", "trust_remote_code", "auto_map",
}  # fmt: skip


def is_fast(tokenizer: Any) -> bool:
    """Whether a tokenizer is implemented by the tokenizers library, which also returns each token's place in a text."""
    return getattr(tokenizer, "backend_tokenizer", None) is not None


def tokenizer_digest(tokenizer: Any) -> str:
    """The sha256 of everything that affects how text is converted to token ids; part of a cache's identity.

    The digest does not depend on the location of the tokenizer's files. A tokenizer written in Python, such as ByT5's,
    is identified by its class, vocabulary, added tokens, options and files.
    """
    if is_fast(tokenizer):
        return digest_of(tokenizer.backend_tokenizer.to_str())
    options = {
        name: value
        for name, value in getattr(tokenizer, "init_kwargs", {}).items()
        if isinstance(value, bool | int | str) and name not in PLACES and not name.endswith("_file")
    }
    added = {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()}
    folder = Path(str(getattr(tokenizer, "name_or_path", "")))
    files = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in sorted(set(getattr(tokenizer, "vocab_files_names", {}).values()))
        if (folder / name).is_file()
    }
    return digest_of(
        {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "added": added,
            "options": options,
            "files": files,
        }
    )


def tokens_without_embedding(tokenizer: Any, rows: int | None) -> dict[int, str]:
    """{id: text} of the tokens whose ids are beyond the `rows` rows of a model's embedding, in the order of their ids.

    A fine-tune can add tokens without enlarging its embedding. The opposite, an embedding with more rows than tokens,
    is common.
    """
    if rows is None:
        return {}
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    return dict(sorted(beyond.items()))


def describe_tokens(tokens: dict[int, str]) -> str:
    """Tokens with their ids, for a message: `'<a>' (id 8192), '<b>' (id 8193) and 3 more`."""
    shown = [f"{token!r} (id {number:,})" for number, token in list(tokens.items())[:SHOWN_TOKENS]]
    more = f" and {len(tokens) - SHOWN_TOKENS:,} more" if len(tokens) > SHOWN_TOKENS else ""
    return ", ".join(shown) + more


def check_embedded(ids: Iterable[int], rows: int | None, tokenizer: Any, where: str) -> None:
    """Raise UsageError if a text has a token that the model has no embedding for. `where` begins the sentence."""
    if rows is None or (largest := max(ids, default=0)) < rows:
        return
    token = {largest: str(tokenizer.convert_ids_to_tokens(largest))}
    raise UsageError(
        f"{where} contains the token {describe_tokens(token)}, but the model's embedding has only {rows:,} rows: "
        "tokens were added to the tokenizer without enlarging the model. Leave such texts out, remove the token from "
        "the tokenizer's files, or use the model whose embedding includes it."
    )
