"""The inputs that every metric shares: the language model, its tokenizer, the held-out text, and cached artifacts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache.contexts import Contexts
from ..cache.models import model_label
from ..harvest.model import LanguageModel
from .artifacts import ArtifactCache


@dataclass(frozen=True)
class ContextBatch:
    """A batch of N contexts, padded on the right to S tokens.

    Attributes:
        ids: token ids (N, S), int64.
        is_token: True where there is a token, not padding (N, S).
        counted: True where metrics are computed: tokens that are not special tokens (N, S).
        document: the document that each context was cut from (N,), on the CPU.
    """

    ids: Tensor
    is_token: Tensor
    counted: Tensor
    document: Tensor


@dataclass(frozen=True)
class EvalContext:
    """The language model, the held-out text and the settings that apply to every metric.

    Attributes:
        load_model: returns the model; called repeatedly, it returns the same object.
        contexts: the held-out text.
        special_ids: token ids at which no metric is computed (pad, EOS, BOS).
        mode: "0.6.0" or "2024-12", the definitions of the metrics.
        model_identity: identifies the model and how it computes; part of every result's settings.
        text_identity: identifies the held-out text; part of the settings of the metrics that read it.
        data: a folder that is searched for datasets before the Hub:
            <data>/<name on the Hub>/<split>.jsonl or .parquet.
        device: where the model computes.
        model_config: the model's transformers config.
        model_argument: what --model takes for the model: a Hub id, or its folder on this machine.
    """

    load_model: Callable[[], LanguageModel]
    tokenizer: Any
    contexts: Contexts
    special_ids: list[int]
    mode: str
    model_identity: dict[str, Any]
    text_identity: dict[str, Any]
    artifacts: ArtifactCache
    data: Path | None = None
    device: str = "cpu"
    model_config: Any = None
    model_argument: str = ""

    @property
    def model_name(self) -> str:
        """What the model is called."""
        return model_label({**self.model_identity, "name": self.model_identity["model"]})

    @property
    def model(self) -> LanguageModel:
        """The language model, loaded on first use: reading earlier results does not need it."""
        return self.load_model()

    @property
    def settings(self) -> dict[str, Any]:
        """The part of this context that every metric's result depends on."""
        return {"mode": self.mode, **self.model_identity}

    def batches(self, size: int, count: int, text: Contexts | None = None) -> Iterator[ContextBatch]:
        """Yield at most `count` batches of `size` contexts of `text` (default: the held-out text).

        Each batch is as wide as its longest context.
        """
        text = self.contexts if text is None else text
        for start in range(0, min(len(text), count * size), size):
            part = text.select(slice(start, start + size))
            ids = torch.from_numpy(part.ids[:, : int(part.length.max())].astype(np.int64))
            is_token = torch.arange(ids.shape[1]) < torch.from_numpy(part.length.astype(np.int64))[:, None]
            counted = is_token & ~torch.isin(ids, torch.tensor(self.special_ids, dtype=torch.int64))
            document = torch.from_numpy(part.document.astype(np.int64))
            device = self.model.device
            yield ContextBatch(ids.to(device), is_token.to(device), counted.to(device), document)
