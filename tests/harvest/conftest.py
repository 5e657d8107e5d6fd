"""Fixtures for tests that read text: the embedded tokenizer, `read` for sources and `cut_up` for texts."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.harvest import mini
from sae.harvest.contexts import make_contexts
from sae.harvest.datasets import open_text
from sae.harvest.documents import Document, ListedDocuments, TextSource
from sae.harvest.encode import DocumentEncoder
from sae.harvest.model import find_model, load_tokenizer
from sae.harvest.tokenize_checkpoint import TokenizeCheckpoint


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(find_model(mini.NAME)[0])


@pytest.fixture
def read(tokenizer: Any) -> Callable[..., TextSource]:
    return lambda path, column="text", split="train", say=lambda sentence: None: open_text(
        str(path), tokenizer=tokenizer, revision=None, split=split, column=column, seed=0, say=say
    )


@pytest.fixture
def same() -> Callable[[Contexts, Contexts], bool]:
    return lambda one, other: all(
        np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Contexts)
    )


@pytest.fixture
def cut_up(tokenizer: Any, tmp_path: Path) -> Callable[..., Contexts]:
    """cut_up(texts, tokens=..., context=...) returns contexts; `texts` may be a TextSource."""

    def cut_texts(texts: Any, tokens: int = 10**6, exactly: bool = False, held_out: float = 0.0, **more: Any):
        text = (
            texts
            if isinstance(texts, TextSource)
            else TextSource("some", {}, ListedDocuments(lambda: map(Document, texts)))
        )
        settings = {
            "checkpoint": TokenizeCheckpoint(tmp_path, {}),
            "encode": DocumentEncoder(tokenizer, tokenizer.bos_token_id),
            "form": ContextFormat.choose(tokenizer),
            "context": 8,
            "seed": 0,
        } | more
        return make_contexts(text, tokens=tokens, exactly=exactly, held_out=held_out, **settings)

    return cut_texts
