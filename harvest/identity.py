"""The identity of a harvest: everything that determines the bytes of its cache."""

from typing import Any

from ..cache.context_format import ContextFormat
from ..cache.layout import BLOSC, CHUNK_ROWS, FORMAT
from ..common.special_tokens import special_tokens
from ..common.tokenizers import tokenizer_digest
from .config import TOKENS, HarvestConfig
from .documents import TextSource
from .model import ModelSource

# This entry of the identity is "text" if special tokens that the text spells out are tokenized as text. If the entry is
# absent, either the text is known to spell out no special token, or, as in earlier versions, those that it spells out
# become special tokens.
LITERALS = "special_tokens"


def identity_of(
    config: HarvestConfig, source: ModelSource, dtype: str, tokenizer: Any, form: ContextFormat, text: TextSource, *,
    held_out_by_name: bool,
) -> dict[str, Any]:  # fmt: skip
    """Everything that determines the bytes of a cache, except layers and sites, which can be added later."""
    return {
        "format": FORMAT,
        "model": source.identity(),
        "dtype": dtype,
        "attention": config.attention,
        "tokenizer": tokenizer_digest(tokenizer),
        "data": text.identity,
        "tokens": config.tokens or f"up to {TOKENS}",
        "context": config.context,
        "held_out": "by name" if held_out_by_name else config.held_out_share,
        **form.identity(tokenizer),
        **({LITERALS: "text"} if config.chat_column or text.may_contain(list(special_tokens(tokenizer))) else {}),
        "pack": config.pack,
        "seed": config.seed,
        "window_rows": config.window,
        "chunk_rows": min(CHUNK_ROWS, config.window),
        "storage_dtype": config.storage_dtype,
        "compress": BLOSC if config.compress else None,
    }
