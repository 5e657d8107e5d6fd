"""Activations of a few texts in memory, for a notebook. To train on activations, use `sae harvest`."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.context_format import ContextFormat
from ..cache.hooks import SITES, Hook, is_site
from ..common.device import resolve_device, resolve_dtype
from ..common.errors import UsageError
from ..common.tokenizers import check_embedded
from .architectures import check_context, check_layers, check_sites
from .contexts import ContextCutter
from .encode import DocumentEncoder
from .load_errors import translate_model_errors
from .model import LanguageModel, find_model, load_tokenizer, load_trunk
from .structure import embedding_rows

UNLIMITED = 2**62  # rows


class Activations(NamedTuple):
    """The activations at one hook: one row per token, in the order of the texts."""

    x: Tensor  # (T, d_in) float32
    ids: Tensor  # (T,) int64
    tokens: list[str]  # the text of each id
    text: Tensor  # (T,) int64: the index of its text
    position: Tensor  # (T,) int64: the position in its context, where BOS is 0


def activations(
    texts: Sequence[str], *, model: str | nn.Module, layer: int, site: str = "resid_post", tokenizer: Any = None,
    context: int = 1024, bos: str = "auto", keep_special: bool = False, skip_positions: int = 0,
    skip_tokens: Sequence[str] = (), batch_contexts: int = 32, device: str = "auto", dtype: str = "auto",
    attention: str = "eager",
) -> Activations:  # fmt: skip
    """The activations of texts at a site of a layer, on the CPU.

        acts = sae.activations(["The cat sat."], model="gemma-2-mini", layer=12)
        acts.tokens, acts.x.shape  # one row of x for each token

    As in a harvest, each text begins with a BOS and is cut into contexts of at most `context` tokens, and the rows of
    BOS, EOS and pad are left out unless `keep_special` is set. A special token that is spelled out in a text is encoded
    as ordinary text.

    Args:
        texts: Any number of strings.
        model: A name as for `sae harvest --model`; only the blocks up to the layer are loaded. Or a transformers model
            that is already loaded, together with its `tokenizer`.
        layer: Zero-based block.
        site: "resid_post" (the residual stream after the block), another site such as "mlp_out", or the input or output
            of a module of the block, such as "mlp.gate_proj.output" (harvest/model.py).
        bos: What each context begins with: "auto", "none", or a token as text or id, as for `sae harvest --bos`.
        skip_positions: Leave out this many positions at the beginning of each context. BOS counts as a position.
        skip_tokens: Tokens, as text or id, whose rows are left out too.
        batch_contexts: Contexts in a forward pass.
        device: As in `sae harvest`. Ignored for a model that is already loaded.
        dtype: As in `sae harvest`. Ignored for a model that is already loaded.
        attention: As in `sae harvest`. Ignored for a model that is already loaded.

    Raises:
        UsageError: The layer, the site or the texts are invalid.
        UnavailableError: The model cannot be loaded.
    """
    check_arguments(texts, layer, site, context, skip_positions)
    hook = Hook(layer, site)
    if isinstance(model, str):
        source, config = find_model(model)
        check_hook(config, hook, context, model)
        check_sites(config, [hook])
        device = resolve_device(device)
        language_model = load_trunk(
            source, config, layer, dtype=resolve_dtype(dtype, device), device=device, attention=attention
        )
        tokenizer = tokenizer or load_tokenizer(source)
    elif tokenizer is None:
        raise UsageError("A model that is already loaded needs its tokenizer: activations(..., tokenizer=...).")
    else:
        check_hook(model.config, hook, context, type(model).__name__)
        language_model = LanguageModel(model)
    with translate_model_errors(model if isinstance(model, str) else type(model).__name__, attention):
        language_model.check_hooks([hook])
    form = ContextFormat.choose(
        tokenizer, bos=bos, keep_special=keep_special, skip_positions=skip_positions, skip_tokens=skip_tokens
    )
    return capture_texts(language_model, tokenizer, texts, hook, context, form, batch_contexts)


def check_arguments(texts: Any, layer: Any, site: str, context: int, skip_positions: int) -> None:
    """Raise UsageError for arguments that are invalid for every model."""
    if isinstance(texts, str) or not isinstance(texts, Iterable) or not all(isinstance(text, str) for text in texts):
        raise UsageError("activations() expects a list of strings.")
    if not isinstance(layer, Integral):
        raise UsageError(f"invalid layer={layer!r}: expected the number of a block, such as 12.")
    if not is_site(site):
        raise UsageError(
            f"unknown site {site!r}: expected one of {', '.join(SITES)}, or a module such as 'mlp.gate_proj.output'."
        )
    if not 2 <= context <= 65535:
        raise UsageError(
            f"invalid context={context}: expected 2 to 65,535, since a context is BOS and at least one token."
        )
    if not 0 <= skip_positions < context:
        raise UsageError(f"invalid skip_positions={skip_positions}: expected 0 or more, and fewer than {context}.")


def check_hook(config: Any, hook: Hook, context: int, name: str) -> None:
    """Raise UsageError unless the model has this hook and can read contexts of this length."""
    check_layers(config, [hook.layer], name)
    check_context(config, context, name)


def capture_texts(
    model: LanguageModel, tokenizer: Any, texts: Sequence[str], hook: Hook, context: int, form: ContextFormat,
    batch_contexts: int,
) -> Activations:  # fmt: skip
    """Cut the texts into contexts, run the model on them and collect the rows."""
    cutter = ContextCutter(form, context, UNLIMITED, pack=False)
    encode = DocumentEncoder(tokenizer, form.bos_id, embedded=embedding_rows(model.config))
    for number, body in enumerate(encode.encode_texts(list(texts))):
        bos = [] if form.bos_id is None else [form.bos_id]
        check_embedded([*bos, *body], encode.embedded, tokenizer, f"texts[{number}]")
        cutter.add(body, number, held_out=False)
    contexts = cutter.take()
    ids = [torch.from_numpy(x.astype(np.int64)) for x in np.split(contexts["ids"], np.cumsum(contexts["length"])[:-1])]
    document_N = torch.from_numpy(contexts["document"].astype(np.int64))
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, len(document_N), batch_contexts):
        batch = ids[first : first + batch_contexts]
        ids_NS = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=encode.padding)
        inside_NS = torch.arange(ids_NS.shape[1]) < torch.tensor([len(x) for x in batch])[:, None]
        row, position = torch.nonzero(inside_NS & form.counted(ids_NS), as_tuple=True)
        x_NSD = model.capture_hooks(ids_NS.to(model.device), [hook])[hook]
        parts.append((x_NSD.float().cpu()[row, position], ids_NS[row, position], document_N[first + row], position))
    if not any(len(x) for x, *_ in parts):
        raise UsageError("The texts contain only BOS, EOS, pad and tokens in skip_tokens. Give other texts.")
    x_TD, ids_T, text_T, position_T = map(torch.cat, zip(*parts, strict=True))
    return Activations(x_TD, ids_T, [tokenizer.decode([i]) for i in ids_T.tolist()], text_T, position_T)
