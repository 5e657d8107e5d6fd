"""Activations of a few texts in memory, for a notebook. What is to be trained on comes from `sae harvest`."""

import copy
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.layout import SITES, Hook
from ..common.device import resolve_device, resolve_dtype
from ..common.errors import UsageError
from .architectures import check_context, check_layers, check_sites
from .contexts import ContextCutter, Document, require_bos_id, special_token_ids, tokenize_batch
from .model import LanguageModel, ensure_bos, find_model, load_tokenizer, load_trunk

UNLIMITED = 2**62  # rows


class Activations(NamedTuple):
    """What stands at one hook, a row for each token, the texts one after the other."""

    x: Tensor  # (T, d_in) float32
    ids: Tensor  # (T,) int64
    tokens: list[str]  # what each id stands for
    text: Tensor  # (T,) int64: the number of its text
    position: Tensor  # (T,) int64: in its context, where BOS is 0


def activations(
    texts: Sequence[str], *, model: str | nn.Module, layer: int, site: str = "resid_post", tokenizer: Any = None,
    context: int = 1024, keep_special: bool = False, batch_contexts: int = 32, device: str = "auto", dtype: str = "auto",
    attention: str = "eager",
) -> Activations:  # fmt: skip
    """The activations of texts at a site of a layer, on the CPU.

    `model` is a name as for `sae harvest --model`, of which only the blocks up to the layer are loaded; or a model of
    transformers, with its `tokenizer`. As in a harvest each text comes after a BOS, is cut into contexts of at most
    `context` tokens, and the rows of BOS, EOS and pad are left out unless `keep_special`.

    Raises UsageError for a layer, a site or a text that is not there, OutsideError when the model cannot be loaded.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable) or not all(isinstance(text, str) for text in texts):
        raise UsageError("activations takes a list of texts, each a string.")
    if not isinstance(layer, Integral):
        raise UsageError(f"layer={layer!r} is no block: give its number, such as 12.")
    if site not in SITES:
        raise UsageError(f"The site {site} is unknown: give one of {', '.join(SITES)}.")
    if not 2 <= context <= 65535:
        raise UsageError(f"context={context} is out of range: a context is BOS and at least one token, at most 65,535.")
    hook = Hook(layer, site)
    if isinstance(model, str):
        source, config = find_model(model)
        name, tokenizer = model, tokenizer or load_tokenizer(source)
    elif tokenizer is None:
        raise UsageError("A model that is loaded already needs its tokenizer: activations(..., tokenizer=...).")
    else:
        config, name = model.config, type(model).__name__
        if tokenizer.bos_token_id is None:
            tokenizer = ensure_bos(copy.deepcopy(tokenizer))  # the caller's stays as it is
    check_layers(config, [layer], name)
    check_sites(config, [hook])
    check_context(config, context, name)
    if isinstance(model, str):
        device = resolve_device(device)
        language_model = load_trunk(
            source, config, layer, dtype=resolve_dtype(dtype, device), device=device, attention=attention
        )
    else:
        language_model = LanguageModel(model)
    return capture_texts(language_model, tokenizer, texts, hook, context, keep_special, batch_contexts)


def capture_texts(
    model: LanguageModel, tokenizer: Any, texts: Sequence[str], hook: Hook, context: int, keep_special: bool, at_once: int
) -> Activations:  # fmt: skip
    skip = [] if keep_special else special_token_ids(tokenizer)
    cutter = ContextCutter(require_bos_id(tokenizer), context, skip, UNLIMITED, pack=False)
    for number, body in enumerate(tokenize_batch([Document(text) for text in texts], tokenizer)):
        cutter.add(body, number, held_out=False)
    cut = cutter.take()
    lengths, documents = cut["length"].astype(np.int64), cut["document"]
    ends = np.cumsum(lengths)
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, len(lengths), at_once):
        these = range(first, min(first + at_once, len(lengths)))
        ids_NS = torch.full((len(these), int(lengths[first : these.stop].max())), tokenizer.pad_token_id or 0)
        for row, number in enumerate(these):
            ids_NS[row, : lengths[number]] = torch.from_numpy(
                cut["ids"][ends[number] - lengths[number] : ends[number]].astype(np.int64)
            )
        inside_NS = torch.arange(ids_NS.shape[1]) < torch.from_numpy(lengths[first : these.stop])[:, None]
        which, position = torch.nonzero(inside_NS & ~torch.isin(ids_NS, torch.tensor(skip)), as_tuple=True)
        x_NSD = model.capture_hooks(ids_NS.to(model.device), [hook])[hook]
        document = torch.from_numpy(documents[first : these.stop].astype(np.int64))
        parts.append((x_NSD.float().cpu()[which, position], ids_NS[which, position], document[which], position))
    if not any(len(x) for x, *_ in parts):
        raise UsageError("The texts have no tokens besides BOS, EOS and pad.")
    x_TD, ids_T, text_T, position_T = map(torch.cat, zip(*parts, strict=True))
    return Activations(x_TD, ids_T, [tokenizer.decode([i]) for i in ids_T.tolist()], text_T, position_T)
