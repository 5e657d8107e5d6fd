"""The rows of held-out text equal those of a plain pass. They are captured once, and again if a file is damaged."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae.cache.hooks import Hook
from sae.cache.outliers import outlier_mask
from sae.common.errors import UnavailableError
from sae.evaluate.metrics import held_out_rows as module
from sae.evaluate.metrics.base import EvalTarget, RowSet
from sae.evaluate.metrics.held_out_rows import read_rows
from sae.evaluate.metrics.latent_correlation import read_latents
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.train.sae import save_sae

from ...run_records import write_run_record
from .test_stability import make_sae

pytestmark = pytest.mark.usefixtures("one_thread")


def silent(*progress) -> None:
    pass


@pytest.fixture
def ctx(tiny_cache, home):
    """The evaluation context of a run on `tiny_cache`."""
    save_sae(make_sae(0), home / "run", {
        "model": tiny_cache.identity["model"], "layer": 0, "cache": str(tiny_cache.folder),
        "fingerprint": tiny_cache.fingerprint,
    })  # fmt: skip
    write_run_record(home / "run", d_in=32, d_sae=48, layer=0, variant="topk", seed=0)
    config = EvaluateConfig((home / "run",), suite="core", device="cpu", references=False)
    (group,) = plan_evaluation(config).groups
    return group.ctx


@pytest.fixture
def passes(monkeypatch) -> list:
    """The row sets of each pass of the model."""
    calls, capture = [], module.capture_rows
    monkeypatch.setattr(
        module, "capture_rows", lambda ctx, sets, *rest: calls.append(sets) or capture(ctx, sets, *rest)
    )
    return calls


def test_they_are_the_first_rows_of_a_plain_pass_that_are_no_outliers(ctx):
    parts = {hook: [] for hook in (Hook(0), Hook(1))}
    for batch in ctx.batches(1, len(ctx.contexts)):
        for hook, x in ctx.model.capture_hooks(batch.ids, list(parts)).items():
            parts[hook].append(x[batch.counted])
    every = {hook: torch.cat(found) for hook, found in parts.items()}
    limit = float(every[Hook(0)].norm(dim=1).median())
    sets = [RowSet(Hook(0)), RowSet(Hook(0), limit), RowSet(Hook(1))]
    for tokens in (150, 10**6):
        found = read_rows(ctx, sets, tokens, 4, silent)
        for row_set in sets:
            x, outlier = every[row_set.hook], outlier_mask(every[row_set.hook], row_set.norm_limit)
            torch.testing.assert_close(found[row_set].x_TD, x[~outlier][:tokens])
            if tokens > len(x):
                assert found[row_set].outliers == int(outlier.sum())
    assert 0 < found[sets[1]].outliers < len(every[Hook(0)]) == len(found[sets[0]].x_TD)


def test_the_model_runs_once_for_all_hooks_and_again_for_other_rows_only(ctx, passes):
    first, second, masked = RowSet(Hook(0)), RowSet(Hook(1)), RowSet(Hook(0), 9.0)
    found = read_rows(ctx, [first, second], 100, 4, silent)
    assert passes == [[first, second]]
    again = read_rows(ctx, [second, first], 100, 4, silent)
    assert all(torch.equal(again[one].x_TD, found[one].x_TD) for one in (first, second))
    assert len(passes) == 1
    read_rows(ctx, [first, masked], 100, 4, silent)
    assert passes[1:] == [[masked]]
    shorter = read_rows(ctx, [first], 60, 4, silent)[first]
    assert torch.equal(shorter.x_TD, found[first].x_TD[:60]) and passes[2:] == [[first]]
    others = [replace(ctx, text_identity={**ctx.text_identity, "text": "another"})]
    others += [replace(ctx, model_identity={**ctx.model_identity, name: "another"}) for name in ("model", "adapters")]
    for place, other in enumerate(others, 4):
        read_rows(other, [first], 100, 4, silent)
        assert len(passes) == place


def test_rows_of_another_site_batch_or_format_are_others(ctx, passes):
    """Rows of another site, batch size or format are not read from the cache of the first."""
    first = read_rows(ctx, [RowSet(Hook(1))], 50, 4, silent)[RowSet(Hook(1))]
    form = ctx.context_format
    skipping = replace(ctx, context_format=replace(form, skip_positions=3))
    fewer = replace(ctx, context_format=replace(form, skip_ids=(*form.skip_ids, int(ctx.contexts.ids[0, 4]))))
    for place, (other, hook, batch) in enumerate(
        [(ctx, Hook(1, "mlp_out"), 4), (skipping, Hook(1), 4), (fewer, Hook(1), 4)], 2
    ):
        found = read_rows(other, [RowSet(hook)], 50, batch, silent)[RowSet(hook)]
        assert len(passes) == place and not torch.equal(found.x_TD, first.x_TD)
    read_rows(ctx, [RowSet(Hook(1))], 50, 2, silent)  # rounding depends on the shape of matrix products
    assert len(passes) == 5


def test_no_more_text_is_read_than_is_needed(ctx, monkeypatch):
    (batch,) = ctx.batches(2, 1)
    capture, calls = ctx.model.capture_hooks, []
    monkeypatch.setattr(ctx.model, "capture_hooks", lambda *args: calls.append(1) or capture(*args))
    found = read_rows(ctx, [RowSet(Hook(0))], int(batch.counted.sum()), 2, silent)[RowSet(Hook(0))]
    assert len(found.x_TD) == int(batch.counted.sum()) and len(calls) == 1


def test_a_damaged_file_is_captured_again(ctx, passes):
    found = read_rows(ctx, [RowSet(Hook(0)), RowSet(Hook(1))], 100, 4, silent)
    rows = [one.x_TD.clone() for one in found.values()]
    files = sorted(ctx.artifacts.folder.glob("held_out-*.safetensors"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    again = read_rows(ctx, [RowSet(Hook(0)), RowSet(Hook(1))], 100, 4, silent)
    assert all(torch.equal(one.x_TD, before) for one, before in zip(again.values(), rows, strict=True))
    assert [len(sets) for sets in passes] == [2, 1, 1]


def test_a_full_disk_keeps_nothing_and_changes_no_row(ctx, monkeypatch):
    def full(path, *_):
        raise UnavailableError(f"The disk is full: {path}")

    with monkeypatch.context() as patch:
        patch.setattr("sae.evaluate.artifacts.atomic_write", full)
        found = read_rows(ctx, [RowSet(Hook(0))], 100, 4, silent)[RowSet(Hook(0))]
    assert not list(ctx.artifacts.folder.glob("held_out-*"))
    kept = read_rows(ctx, [RowSet(Hook(0))], 100, 4, silent)[RowSet(Hook(0))]
    assert torch.equal(found.x_TD, kept.x_TD) and found.outliers == kept.outliers


def test_each_sae_encodes_the_rows_that_it_reads(ctx):
    saes = [make_sae(seed) for seed in range(3)]
    targets = [EvalTarget(one, Hook(layer)) for one, layer in zip(saes, (0, 1, 0), strict=True)]
    found = read_latents(ctx, targets, 100, 4, silent)
    assert {row_set.hook: [*rows.f] for row_set, rows in found.items()} == {Hook(0): [0, 2], Hook(1): [1]}
    kept = read_rows(ctx, [*found], 100, 4, silent)
    for place, target in enumerate(targets):
        latents = found[target.row_set].latents(place).f_TF.toarray()
        expected = saes[place].encode(kept[target.row_set].x_TD.float())
        np.testing.assert_allclose(latents, expected.numpy(), atol=1e-6)


def test_each_sae_encodes_as_many_rows_at_once_whatever_is_beside_it(ctx, monkeypatch):
    monkeypatch.setattr("sae.evaluate.metrics.parts.tokens_at_once", lambda latents, _: 1920 // latents)
    sizes = {}
    for width in (48, 96):
        one, seen = make_sae(0, latents=width), sizes.setdefault(width, [])
        encode = one.encode
        one.encode = lambda x, encode=encode, seen=seen: (seen.append(len(x)), encode(x))[1]
        sizes[one] = seen
    targets = [EvalTarget(one, Hook(0)) for one in sizes if not isinstance(one, int)]
    read_latents(ctx, targets, 100, 4, silent)
    assert sizes[48] == [1, 40, 40, 20] and sizes[96] == [1, 20, 20, 20, 20, 20]


def test_text_without_a_token_has_no_rows(ctx):
    empty = replace(ctx, contexts=ctx.contexts.select(slice(0, 0)))
    assert read_rows(empty, [RowSet(Hook(0))], 100, 4, silent)[RowSet(Hook(0))].x_TD.shape[0] == 0
