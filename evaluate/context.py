"""The inputs that every metric shares: the language model, its tokenizer, the held-out text, and cached artifacts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache.context_format import ContextFormat
from ..cache.contexts import Contexts
from ..cache.hooks import Hook
from ..cache.models import model_label
from ..common.device import copy_to_device
from ..common.special_tokens import added_bos_id, bos_or_eos_id, special_token_ids
from ..common.tokenizers import check_embedded
from ..harvest.architectures import hook_width
from ..harvest.model import LanguageModel
from .artifacts import ArtifactCache
from .sae_text import ContextChange


@dataclass(frozen=True)
class ContextBatch:
    """A batch of N contexts, padded on the right to S tokens.

    Attributes:
        ids: token ids (N, S), int64.
        is_token: True where there is a token, not padding (N, S).
        counted: True at the tokens at which metrics are computed (N, S); a harvest would store these tokens as rows.
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
        context_format: the first token of contexts, and the tokens at which no metric is computed (pad, EOS, BOS, and
            those that the harvest left out).
        mode: "0.6.0" or "2024-12", the definitions of the metrics.
        model_identity: identifies the model and the way it computes; part of the settings of every result.
        text_identity: identifies the held-out text; part of the settings of the metrics that read it.
        data: a folder that is searched for datasets before the Hub:
            <data>/<name on the Hub>/<split>.jsonl or .parquet.
        device: where the model computes.
        precision: the precision of the SAEs' matrix products: "float32", "tf32" or "bfloat16".
        model_config: the model's transformers config.
        model_argument: the value of --model for the model: a Hub id, or its folder on this machine.
        change: how the contexts differ from those in the cache; `contexts` already includes this change.
        notes: sentences for the user about the model and its tokenizer.
    """

    load_model: Callable[[], LanguageModel]
    tokenizer: Any
    contexts: Contexts
    context_format: ContextFormat
    mode: str
    model_identity: dict[str, Any]
    text_identity: dict[str, Any]
    artifacts: ArtifactCache
    data: Path | None = None
    device: str = "cpu"
    precision: str = "float32"
    model_config: Any = None
    model_argument: str = ""
    change: ContextChange = ContextChange()
    notes: tuple[str, ...] = ()

    @property
    def model_name(self) -> str:
        """The model's name."""
        return model_label({**self.model_identity, "name": self.model_identity["model"]})

    @property
    def model(self) -> LanguageModel:
        """The language model, loaded on first use: reading earlier results does not need it."""
        return self.load_model()

    @property
    def embedded_tokens(self) -> int | None:
        """The number of token ids for which the model has an embedding; a tokenizer can have more token ids."""
        return getattr(self.model_config, "vocab_size", None)

    def row_bytes(self, hooks: Iterable[Hook]) -> int:
        """The size in bytes of one token's activations at all of these hooks. Does not need the model."""
        size = getattr(torch, self.model_identity["llm_dtype"]).itemsize
        return sum(size * hook_width(hook, self.model_config) for hook in hooks)

    @property
    def special_ids(self) -> list[int]:
        """Ids of the tokens that metrics skip, whatever their position."""
        return list(self.context_format.skip_ids)

    def encode_texts(self, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
        """The token ids of each text, at most `max_tokens`. They begin with the same first token as the cache's
        contexts.

        If the tokenizer itself adds this first token, all tokens that it adds are kept, as in SAEBench. If a text
        spells out a special token, such as "<bos>", this part of the text becomes that special token.

        Raises UsageError if a text contains a token without an embedding in the model.
        """
        bos_id = self.context_format.bos_id
        limit = {"truncation": True, "max_length": max_tokens} if max_tokens else {}
        if added_bos_id(self.tokenizer) == bos_id:
            ids = self.tokenizer(list(texts), verbose=False, **limit)["input_ids"]
        else:
            bodies = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            ids = [[*([] if bos_id is None else [bos_id]), *body][:max_tokens] for body in bodies]
        for number, one in enumerate(ids):
            check_embedded(one, self.embedded_tokens, self.tokenizer, f"Text {number} of {len(ids)}")
        return ids

    @property
    def text_settings(self) -> dict[str, Any]:
        """Additional settings of a metric that has its own texts. Only differences from earlier versions are recorded.
        Earlier versions used the tokenizer's own first token and left out pad, EOS and BOS.
        """
        return self._format_settings(added_bos_id(self.tokenizer))

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """Like `text_settings`, but for prompts built from tokens. In earlier versions, these prompts began with BOS,
        or with EOS if the tokenizer has no BOS."""
        return self._format_settings(bos_or_eos_id(self.tokenizer))

    def _format_settings(self, earlier_bos: int | None) -> dict[str, Any]:
        form, settings = self.context_format, {}
        if form.bos_id != earlier_bos:
            settings["bos"] = form.bos_id
        if self.special_ids != special_token_ids(self.tokenizer) or form.skip_positions:
            settings["skip"] = form.skip_record
        return settings

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in this context that affect the results of every metric."""
        own = {} if self.precision == "float32" else {"sae_precision": self.precision}
        return {"mode": self.mode, **self.model_identity, **own}

    @property
    def logit_settings(self) -> dict[str, Any]:
        """Additional settings of a metric that reads logits. Earlier versions rounded logits to the model's dtype."""
        return {} if self.model_identity.get("llm_dtype") == "float32" else {"logits": "float32"}

    def batches(
        self, size: int, count: int, text: Contexts | None = None, device: torch.device | str | None = None
    ) -> Iterator[ContextBatch]:
        """Yield at most `count` batches of `size` contexts of `text` (default: the held-out text).

        The batches are on `device`. By default, this is the model's device; finding it out loads the model.

        Each batch is as wide as its longest context.
        """
        text = self.contexts if text is None else text
        for start in range(0, min(len(text), count * size), size):
            part = text.select(slice(start, start + size))
            ids = torch.from_numpy(part.ids[:, : int(part.length.max())].astype(np.int64))
            is_token = torch.arange(ids.shape[1]) < torch.from_numpy(part.length.astype(np.int64))[:, None]
            counted = is_token & self.context_format.counted(ids)
            if part.rows is not None:
                counted &= torch.from_numpy(part.rows[:, : ids.shape[1]])
            document = torch.from_numpy(part.document.astype(np.int64))
            device = self.model.device if device is None else device
            ids, is_token, counted = (copy_to_device(one, device) for one in (ids, is_token, counted))
            yield ContextBatch(ids, is_token, counted, document)
