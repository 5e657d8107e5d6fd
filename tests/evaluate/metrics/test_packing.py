"""Texts are packed as specified, and latents are selected by rounded frequencies."""

import numpy as np
import torch

from sae.evaluate.inputs import make_context
from sae.evaluate.metrics.packing import pack_contexts, pack_texts, select_forget_latents


def test_corpora_are_packed_as_specified(ctx):
    """The texts are joined with EOS and cut into twenty parts, each with a BOS. In rows of eight tokens, BOS replaces
    the first."""
    texts = ["the value of a list and the number of names in a file " * 2, "another line " * 6]
    joined = "<eos>".join(texts)
    size = -(-len(joined) // 20)
    flat = [
        i for start in range(0, len(joined), size) for i in ctx.tokenizer(joined[start : start + size])["input_ids"]
    ]
    assert flat.count(2) == 20
    rows = pack_texts(texts, ctx.tokenizer, 8, bos_id=2)
    assert len(rows) == len(flat) // 8 > 5
    expected = torch.tensor(flat[: 8 * len(rows)]).view(-1, 8)
    expected[:, 0] = 2
    assert torch.equal(rows, expected)
    assert len(pack_texts(["x"], ctx.tokenizer, 8, bos_id=2)) == 0


def test_held_out_contexts_are_packed_with_eos_between_them(tiny_cache):
    ctx = make_context(tiny_cache)
    rows, counted = pack_contexts(ctx, 32)
    assert torch.equal(counted, ~torch.isin(rows, torch.tensor([0, 1, 2])))
    contexts = ctx.contexts
    flat = [i for ids, n in zip(contexts.ids, contexts.length, strict=True) for i in [*ids[1:n].tolist(), 1]]
    assert len(rows) == len(flat) // 32 and (rows[:, 0] == 2).all()
    assert rows[:, 1:].flatten().tolist() == [i for n, i in enumerate(flat[: rows.numel()]) if n % 32]


def test_selection_is_by_rounded_shares_with_the_last_of_ties_first():
    forget = np.array([0.2, 0.3, 0.0000004, 0.3, 0.9, 0.1000001, 0.1000004, 0.0])
    retain = np.array([0.0, 0.0, 0.0, 0.009999, 0.01, 0.00999999, 0.0, 0.0])
    assert select_forget_latents(forget, retain, 0.01) == (
        3,
        1,
        0,
        6,
    )  # latent 5 rounds up to the threshold, and latent 2 to 0
    assert select_forget_latents(forget, retain, 0.02) == (4, 3, 1, 0, 6, 5)  # latents 6 and 5 are a tie after rounding
