"""What every metric measures with: the model, its tokenizer, text, and a shelf for what no SAE changes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache.contexts import Contexts
from ..harvest.model import LanguageModel
from .artifacts import ArtifactCache


@dataclass(frozen=True)
class ContextBatch:
    """Contexts, padded on the right: their ids, which positions hold a token, and which of those count; each (N, S).

    `document` (N,), on the CPU, says which of them are cut from one text.
    """

    ids: Tensor
    is_token: Tensor
    counted: Tensor
    document: Tensor


@dataclass(frozen=True)
class EvalContext:
    """The model and the held-out text; `skip` are the ids that no number is taken at (pad, eos, bos).

    `identity` pins the model and how it computes; `text` pins the held-out text, for the metrics that read it. `data`
    is a folder where a dataset is looked for before the Hub: <data>/<name on the Hub>/<split>.jsonl or .parquet.
    """

    load: Callable[[], LanguageModel]  # may be asked again and again, and gives the same one
    tokenizer: Any
    contexts: Contexts
    skip: list[int]
    mode: str
    identity: dict[str, Any]
    text: dict[str, Any]
    artifacts: ArtifactCache
    data: Path | None = None
    device: str = "cpu"  # where the model computes
    config: Any = None  # of the model

    @property
    def model(self) -> LanguageModel:
        """Loaded when it is first needed: what was measured before can be read without."""
        return self.load()

    @property
    def settings(self) -> dict[str, Any]:
        """What of the bench decides every metric's result."""
        return {"mode": self.mode, **self.identity}

    def batches(self, size: int, count: int, text: Contexts | None = None) -> Iterator[ContextBatch]:
        """At most `count` batches of `size` contexts of the held-out text or another, as wide as their longest."""
        text = self.contexts if text is None else text
        for start in range(0, min(len(text), count * size), size):
            part = text.select(slice(start, start + size))
            ids = torch.from_numpy(part.ids[:, : int(part.length.max())].astype(np.int64))
            inside = torch.arange(ids.shape[1]) < torch.from_numpy(part.length.astype(np.int64))[:, None]
            kept = inside & ~torch.isin(ids, torch.tensor(self.skip, dtype=torch.int64))
            document = torch.from_numpy(part.document.astype(np.int64))
            yield ContextBatch(*(tensor.to(self.model.device) for tensor in (ids, inside, kept)), document)
