"""Rows of labeled texts equal those of padded passes, are computed once, and are pooled as in SAEBench."""

from dataclasses import replace

import pytest
import torch

from sae.cache.hooks import Hook
from sae.common.errors import UsageError
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.metrics import pooled_activations as module
from sae.evaluate.metrics.pooled_activations import pool_latents, read_text_rows
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE

TEXTS = ["the quick brown fox jumps", "dog", "seven zebras quietly read their yellow books in june " * 9]
SKIP = [0, 1, 2]
CONTEXT = 32


def silent(done, total, note=""):
    pass


def padded(ctx: EvalContext, hook: Hook) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as SAEBench reads them, (N, CONTEXT, D) with zeros at positions that do not count, and each text's count."""
    rows = []
    for text in TEXTS:
        ids = torch.tensor([ctx.tokenizer(text, truncation=True, max_length=CONTEXT)["input_ids"]])
        x = ctx.model.forward(ids, [hook]).activations[hook][0]
        x[torch.isin(ids[0], torch.tensor(SKIP))] = 0
        rows.append(torch.nn.functional.pad(x, (0, 0, 0, CONTEXT - len(x))))
    x = torch.stack(rows)
    return x, (x != 0).any(-1).sum(1)


def test_rows_and_sums_are_those_of_padded_passes(ctx, monkeypatch):
    monkeypatch.setattr(module, "rows_per_encode", lambda *_: 7)
    torch.manual_seed(0)
    sae = SAE(32, 20, [ReLU()]).requires_grad_(False)
    sae.b_enc += 0.3  # so that latents fire on a zero row
    for hook, rows in read_text_rows(ctx, [Hook(0), Hook(1)], TEXTS, silent, CONTEXT).items():
        x, count = padded(ctx, hook)
        assert torch.equal(rows.count_N, count)
        torch.testing.assert_close(rows.x_TD, x[(x != 0).any(-1)])
        torch.testing.assert_close(rows.mean_ND(), x.sum(1) / count[:, None])
        pooled = pool_latents(sae, rows, torch.device("cpu"))
        everywhere = sae.encode(x).sum(1)
        leak = (CONTEXT - count)[:, None] * pooled.zero_F
        assert leak.max() > 1
        torch.testing.assert_close(pooled.sum_NF + leak, everywhere)
        mask = (x != 0).any(-1, keepdim=True)
        torch.testing.assert_close(pooled.mean_NF, (sae.encode(x) * mask).sum(1) / count[:, None])


def test_the_model_runs_once_and_only_for_what_lacks(ctx, monkeypatch):
    passes = []
    capture = ctx.model.capture_hooks
    monkeypatch.setattr(
        ctx.model, "capture_hooks", lambda ids, hooks: passes.append([h.layer for h in hooks]) or capture(ids, hooks)
    )
    first = read_text_rows(ctx, [Hook(0)], TEXTS, silent, CONTEXT)[Hook(0)]
    again = read_text_rows(ctx, [Hook(0), Hook(1)], TEXTS, silent, CONTEXT)[Hook(0)]
    assert passes == [[0], [1]]
    assert torch.equal(first.x_TD, again.x_TD)
    read_text_rows(ctx, [Hook(0)], TEXTS[:2], silent, CONTEXT)
    assert passes == [[0], [1], [0]]


def test_rows_of_other_positions_are_others(ctx):
    """Positions that are skipped are left out, even if rows of the same texts are already among the artifacts."""
    every = read_text_rows(ctx, [Hook(0)], TEXTS, silent, CONTEXT)[Hook(0)]
    later = replace(ctx, context_format=replace(ctx.context_format, skip_positions=3))
    found = read_text_rows(later, [Hook(0)], TEXTS, silent, CONTEXT)[Hook(0)]
    kept = torch.cat([torch.arange(count) >= 2 for count in every.count_N.tolist()])  # BOS is the first of three
    assert torch.equal(found.x_TD, every.x_TD[kept]) and len(found.x_TD) < len(every.x_TD)


def test_what_is_damaged_on_the_shelf_is_made_again(tmp_path):
    artifacts, made = ArtifactCache(tmp_path), []

    def make():
        made.append(1)
        return {"a": torch.arange(6.0)}

    artifacts.get_or_compute("numbers", {"of": 1}, make)
    assert torch.equal(artifacts.get_or_compute("numbers", {"of": 1}, make)["a"], torch.arange(6.0))
    assert len(made) == 1
    path = artifacts.path("numbers", {"of": 1})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert torch.equal(artifacts.get_or_compute("numbers", {"of": 1}, make)["a"], torch.arange(6.0))
    path.write_bytes(data[:10])
    artifacts.get_or_compute("numbers", {"of": 1}, make)
    assert len(made) == 3
    artifacts.get_or_compute("numbers", {"of": 2}, make)
    assert len(made) == 4


def test_no_block_behind_the_last_layer_asked_for_is_run(ctx):
    ran = []
    for number, block in enumerate(ctx.model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    ids = torch.tensor([[2, 300, 301]])
    alone = ctx.model.capture(ids, [0])[0]
    assert ran == [0]
    assert torch.equal(alone, ctx.model.forward(ids, [Hook(0), Hook(1)]).activations[Hook(0)])
    ran.clear()  # the first pass also ran a check that the model can be resumed at these hooks
    ctx.model.forward(ids, [Hook(0), Hook(1)])
    assert ran == [0, 1]


@pytest.mark.parametrize("context", [-1, 0, 1])
def test_a_context_without_room_for_text_is_refused(ctx, context):
    with pytest.raises(UsageError, match=f"a context of {context} tokens has no room for text"):
        read_text_rows(ctx, [Hook(0)], TEXTS, silent, context)
