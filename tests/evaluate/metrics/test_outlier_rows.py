"""Every reader leaves out outlier rows in the same way as special tokens. SAEBench's scores are still of all rows.

The norm of the activations at the token SINK is 40 times that of the others, so leaving out the rows over a limit must
give the same result as declaring SINK a special token.
"""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.cache.outliers import outlier_mask
from sae.common.errors import UnavailableError, UsageError
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.datasets import labeled
from sae.evaluate.latents.stats import latent_stats
from sae.evaluate.latents.steering import steering
from sae.evaluate.metrics import sparse_probing as sparse_probing_module
from sae.evaluate.metrics.absorption import Absorption
from sae.evaluate.metrics.autointerp import Autointerp
from sae.evaluate.metrics.base import EvalTarget, Metric, MetricResult, RowSet
from sae.evaluate.metrics.core import Core
from sae.evaluate.metrics.first_letter import SpellingPrompts, read_spelling_rows
from sae.evaluate.metrics.packing import PackedRows, firing_frequencies
from sae.evaluate.metrics.pooled_activations import TextRows
from sae.evaluate.metrics.scr import Scr
from sae.evaluate.metrics.sparse_probing import SparseProbing
from sae.evaluate.metrics.tpp import Tpp
from sae.evaluate.reference_saes import reference_targets
from sae.evaluate.results import read_result, write_result
from sae.harvest.loading import find_model, load_tokenizer
from sae.harvest.model import load_model
from sae.train.activation_functions import BatchTopK, ReLU
from sae.train.sae import SAE

SINK, HOOK = 652, Hook(0)
FORMAT, SINK_IS_SPECIAL = ContextFormat(2, (0, 1, 2)), ContextFormat(2, (0, 1, 2, SINK))
LIMIT = 150.0  # between the norm of SINK (about 400) and that of other tokens (about 12)
REVIEWS = "canrager/amazon_reviews_mcauley_1and5"
SETS = {"train_set_size": 40, "test_set_size": 40, "context": 32}


def silent(done: int, total: int, note: str = "") -> None:
    pass


@pytest.fixture(scope="module")
def loaded(sink_model: Path) -> tuple[Any, Any, Any]:
    source, config = find_model(str(sink_model))
    return source, load_model(source, config, dtype="float32", device="cpu"), load_tokenizer(source)


def write_reviews(data: Path) -> None:
    """Write reviews of two categories and two ratings. Each category and each rating has its own words.

    Some texts with the rating 1.0 contain " value", which is SINK.
    """
    draw = random.Random(0)
    own = {24: "book page author", 26: "disc song singer", 1.0: "bad poor broken", 5.0: "good great nice"}
    for split in ("train", "test"):
        lines = []
        for category in (24, 26):
            for rating in (1.0, 5.0):
                for number in range(30):
                    words = draw.choices(f"{own[category]} {own[rating]} the a of".split(), k=draw.randrange(4, 9))
                    if number % 3 == 0 and rating == 1.0:
                        words.insert(2, "value")
                    lines.append({"text": " ".join(words), "category": category, "rating": rating})
        file = data / REVIEWS / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, lines)) + "\n")


def held_out() -> Contexts:
    """40 contexts of 14 to 24 tokens. Every third context contains SINK."""
    draw = np.random.default_rng(0)
    ids, length = np.zeros((40, 24), np.uint32), draw.integers(14, 25, 40).astype(np.uint16)
    for number, (row, size) in enumerate(zip(ids, length, strict=True)):
        row[:size] = [2, *draw.integers(3000, 3060, size - 1)]
        if number % 3 == 1:
            row[3 + number % 9] = SINK
    return Contexts(ids, length, np.arange(40, dtype=np.uint32) // 2, np.ones(40, bool))


@pytest.fixture
def ctx(loaded: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalContext:
    write_reviews(tmp_path / "data")
    table = labeled.DATASETS[REVIEWS]
    monkeypatch.setitem(labeled.DATASETS, REVIEWS, replace(table, classes=(24, 26), pairs=((24, 26),)))
    monkeypatch.setattr(sparse_probing_module, "EPOCHS", 4)
    source, model, tokenizer = loaded
    artifacts = ArtifactCache(tmp_path / "shelf")
    identity, text = source.identity(), {"text": "held out"}
    return EvalContext(
        lambda: model, tokenizer, held_out(), FORMAT, "0.6.0", identity, text, artifacts, tmp_path / "data"
    )


def make_sae(kind: str = "relu") -> SAE:
    """An SAE of which nearly all latents fire on SINK, as with a thresholded SAE on an attention sink."""
    torch.manual_seed(0)
    sae = SAE(32, 60, [BatchTopK(5)] if kind == "batchtopk" else [ReLU()])
    sae.b_dec.data.normal_(std=0.3)
    sae.b_enc.data.fill_(-3.0)
    sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    if kind == "batchtopk":
        sae.activation[0].threshold.fill_(0.3)
    return sae.eval().requires_grad_(False)


def result_of(metric: Metric) -> Callable[[EvalContext, EvalTarget], Any]:
    def read(ctx: EvalContext, target: EvalTarget) -> Any:
        (found,) = metric.measure(ctx, [target], silent)
        assert isinstance(found, MetricResult), found
        sound = found.sound
        groups = {name: group for name, group in sound.metrics.items() if name not in ("token_stats", "dictionary")}
        return {"metrics": groups, "details": sound.details, "intervals": sound.intervals, "extra": sound.extra}

    return read


def read_references(ctx: EvalContext, target: EvalTarget) -> Any:
    found = reference_targets(ctx, ctx.contexts, RowSet(target.hook, target.norm_limit), [target])
    assert all(one.norm_limit == target.norm_limit for one in found.values())
    return {name: (one.sae.W_dec, one.sae.b_dec) for name, one in found.items() if hasattr(one.sae, "W_dec")}


def read_latents(ctx: EvalContext, target: EvalTarget) -> Any:
    found = latent_stats(ctx, target.sae, target.hook, torch.arange(60), silent, norm_limit=target.norm_limit)
    stats, coactive = found.activations, found.coactive
    tables = [part for one in (stats.top, stats.sample) for part in (one.score, one.context, one.position, one.window)]
    return [
        found.density, stats.l0, found.mean, stats.peak_K, stats.histogram.count_KB, *tables, coactive.index,
        coactive.value, found.jaccard,
    ]  # fmt: skip


def read_frequencies(ctx: EvalContext, target: EvalTarget) -> Any:
    ids = torch.from_numpy(ctx.contexts.ids.astype(np.int64))
    (found,) = firing_frequencies(ctx.model, PackedRows(ids, ctx.context_format.counted(ids)), [target], silent)
    return found.share_F.tolist(), found.tokens


READERS: dict[str, Callable[[EvalContext, EvalTarget], Any]] = {
    "core": result_of(Core(batch_contexts=6)),
    "core, few losses": result_of(Core(batch_contexts=7, reconstruction_batches=2, sparsity_batches=4)),
    "sparse probing": result_of(SparseProbing((REVIEWS,), k=(1, 3), **SETS)),
    "scr": result_of(Scr((REVIEWS,), (2, 20), **SETS)),
    "tpp": result_of(Tpp((REVIEWS,), (2, 20), **SETS)),
    "autointerp": result_of(Autointerp(latents=6, tokens=640, context=32, dead_latent_threshold=3)),
    "references": read_references,
    "dashboard and inspect": read_latents,
    "firing frequencies": read_frequencies,
}


def same(one: Any, other: Any) -> bool:
    """Whether two nested results are equal. Numbers may differ by 1e-5."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        if one.shape != other.shape:
            return False
        return torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-5, abs=1e-5, nan_ok=True)
    return one == other


def test_the_limit_separates_the_sink_from_all_other_tokens(ctx: EvalContext) -> None:
    ids = torch.from_numpy(held_out().ids.astype(np.int64))
    norm = ctx.model.capture_hooks(ids, [HOOK])[HOOK].norm(dim=-1)
    assert norm[ids == SINK].min() > 2 * LIMIT > 8 * norm[ids != SINK].max()
    assert 10 * norm[ids != SINK].median() < LIMIT


@pytest.mark.parametrize(
    ("reader", "kind"),
    [
        pytest.param(reader, kind, marks=pytest.mark.slow if kind == "batchtopk" else ())
        for reader in READERS
        for kind in ("relu", "batchtopk")
    ],
)
def test_an_outlier_row_is_left_out_like_a_special_token(ctx: EvalContext, reader: str, kind: str) -> None:
    read, sae = READERS[reader], make_sae(kind)
    special = read(replace(ctx, context_format=SINK_IS_SPECIAL), EvalTarget(sae, HOOK))
    every = read(ctx, EvalTarget(sae, HOOK))  # the artifacts that it writes are not read by the others
    masked = read(ctx, EvalTarget(sae, HOOK, norm_limit=LIMIT))
    assert same(masked, special)
    assert not same(every, special)


def test_batches_without_an_outlier_count_before_and_after_the_first_with_one(ctx: EvalContext) -> None:
    """Separate sums without outlier rows are kept only from the first outlier on."""
    read, few = result_of(Core(batch_contexts=1)), replace(ctx, contexts=ctx.contexts.select(slice(0, 4)))
    assert (few.contexts.ids == SINK).any(1).tolist() == [False, True, False, False]
    masked = read(few, EvalTarget(make_sae(), HOOK, norm_limit=LIMIT))
    special = read(replace(few, context_format=SINK_IS_SPECIAL), EvalTarget(make_sae(), HOOK))
    assert same(masked, special)


METRICS = (
    Core(batch_contexts=6),
    SparseProbing((REVIEWS,), k=(1, 3), **SETS),
    Scr((REVIEWS,), (2, 20), **SETS),
    Tpp((REVIEWS,), (2, 20), rng="saebench", **SETS),
    Absorption(words=300, min_GT_probe_f1=-1, k_sparse_probe_num_epochs=2, k_sparse_probe_batch_size=64),
)


@pytest.mark.parametrize(
    "metric",
    [pytest.param(one, id=one.name, marks=pytest.mark.slow if one.name == "absorption" else ()) for one in METRICS],
)
def test_saebench_s_numbers_are_those_of_all_rows_and_the_others_stand_beside_them(
    ctx: EvalContext, metric: Metric, tmp_path: Path
) -> None:
    """The equality is exact, whichever SAEs are measured together, and also after writing and reading the result."""
    sae, limit = make_sae("batchtopk"), LIMIT
    if isinstance(metric, Absorption):
        limit = median_norm_of_words(ctx, metric)
    all_rows, with_masked = EvalTarget(sae, HOOK), EvalTarget(sae, HOOK, norm_limit=limit)
    (plain,) = metric.measure_both(ctx, [all_rows], silent)
    (alone,) = metric.measure(ctx, [with_masked], silent)
    other, found, roomy = metric.measure_both(
        ctx, [EvalTarget(make_sae(), Hook(1)), with_masked, replace(all_rows, norm_limit=1e9)], silent
    )
    assert isinstance(found, MetricResult) and found.masked is not None
    assert plain.masked is None and plain.sound is plain and "outlier_rows" not in plain.n
    assert roomy == plain  # a limit that no row exceeds changes nothing
    outliers = found.n["outlier_rows"]
    assert found.sound.n["outlier_rows"] == outliers > 0
    assert (found.metrics, found.details, found.intervals) == (plain.metrics, plain.details, plain.intervals)
    assert (found.extra, found.flags) == (plain.extra, plain.flags)
    assert found.n == plain.n | {"outlier_rows": outliers}
    assert found.masked == (alone.masked or alone) and found.masked.masked is None
    assert found.masked.metrics != plain.metrics
    assert any(
        "left out as outliers because of their norm" in flag for flag in found.masked.flags
    )  # more than 1 % of the rows

    write_result(tmp_path, metric, {}, found, {})
    assert read_result(tmp_path, metric, {}) == found
    envelope = json.loads((tmp_path / "evaluations" / f"{metric.name}.json").read_text())
    written = envelope["eval_result_metrics"]
    assert written.keys() == plain.metrics.keys() | {f"masked_{name}" for name in found.masked.metrics}


def test_the_model_runs_again_only_for_the_contexts_with_an_outlier(ctx: EvalContext, monkeypatch) -> None:
    runs: list[tuple[int, bool]] = []
    forward = ctx.model.forward

    def counting(ids: torch.Tensor, hooks: Any) -> Any:
        run = forward(ids, hooks)
        run_from = run.run_from

        def counted(hook: Hook, x: torch.Tensor, *chosen: torch.Tensor) -> torch.Tensor:
            runs.append((len(x), bool(chosen)))
            return run_from(hook, x, *chosen)

        run.run_from = counted
        return run

    monkeypatch.setattr(ctx.model, "forward", counting)
    Core(batch_contexts=40).measure(ctx, [EvalTarget(make_sae(), HOOK, norm_limit=LIMIT)], silent)
    with_sink = int((held_out().ids == SINK).any(1).sum())
    # zeroed, spliced, and spliced with the sinks' own rows
    assert sorted(runs) == sorted([(40, False), (40, False), (with_sink, True)])


def test_references_of_saes_that_are_all_damaged_are_refused(ctx: EvalContext) -> None:
    with pytest.raises(UnavailableError, match="no SAE at .* could be read"):
        reference_targets(ctx, ctx.contexts, RowSet(HOOK, LIMIT), [])


def test_zero_scores_zero_and_the_identity_one_without_outlier_rows_too(ctx: EvalContext) -> None:
    target = EvalTarget(make_sae(), HOOK, norm_limit=LIMIT)
    references = reference_targets(ctx, ctx.contexts, RowSet(HOOK, LIMIT), [target])
    for name, score in (("zero", 0.0), ("identity", 1.0)):
        (found,) = Core().measure(ctx, [references[name]], silent)
        behavior = found.masked.metrics["model_behavior_preservation"]
        assert behavior["kl_div_score"] == pytest.approx(score, abs=1e-6)


def test_a_limit_below_all_norms_is_refused(ctx: EvalContext) -> None:
    (found,) = Core().measure_both(ctx, [EvalTarget(make_sae(), HOOK, norm_limit=1.0)], silent)
    assert isinstance(found, UsageError) and "all of them are outliers" in str(found)


# --- absorption -------------------------------------------------------------------------------------------------------


def median_norm_of_words(ctx: EvalContext, metric: Absorption) -> float:
    """A norm limit that keeps most words, but not all: the 97 % quantile."""
    prompts = SpellingPrompts.of(ctx.tokenizer, metric.words, metric.random_seed, bos_id=2)
    rows = read_spelling_rows(ctx, prompts, [RowSet(HOOK)], metric.random_seed, silent)[RowSet(HOOK)]
    return float(torch.cat([rows.train_ND, rows.fresh_ND]).norm(dim=1).quantile(0.97))


def test_absorption_leaves_out_words_whose_row_is_an_outlier_in_either_prompt(ctx: EvalContext) -> None:
    prompts, metric = SpellingPrompts.of(ctx.tokenizer, 300, 0, bos_id=2), Absorption(words=300)
    limit = median_norm_of_words(ctx, metric)
    every, kept = (
        read_spelling_rows(ctx, prompts, [row_set], 0, silent)[row_set]
        for row_set in (RowSet(HOOK), RowSet(HOOK, limit))
    )
    train = every.train_ND.norm(dim=1) <= limit
    test = (every.test_ND.norm(dim=1) <= limit) & (every.fresh_ND.norm(dim=1) <= limit)
    assert torch.equal(kept.train_ND, every.train_ND[train]) and torch.equal(kept.test_ND, every.test_ND[test])
    assert torch.equal(kept.fresh_ND, every.fresh_ND[test])
    assert torch.equal(kept.test_letter_N, every.test_letter_N[test])
    assert kept.outliers == int((~train).sum() + (~test).sum()) > 0
    assert not torch.equal(kept.probe.weight_LD, every.probe.weight_LD)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_the_norm_is_that_of_float32() -> None:
    """A bfloat16 norm has 8 significant bits, so a norm up to 0.2 % over the limit would be rounded to the limit."""
    x = torch.full((2, 1024), 3.0, dtype=torch.bfloat16)
    x[1, 0] = 4.0
    assert 96 < x[1].float().norm() < 96.1 and x[1].norm() == 96
    assert outlier_mask(x, 96.0).tolist() == [False, True]
    assert outlier_mask(x, 96.0).equal(outlier_mask(x.float(), 96.0))
    assert outlier_mask(x[None], None).tolist() == [[False, False]]


def test_more_than_one_percent_of_outliers_is_flagged() -> None:
    result = MetricResult({})
    assert result.without_outliers(0, 100) is result
    few, many = result.without_outliers(1, 99), result.without_outliers(2, 98)
    assert few == MetricResult({}, n={"outlier_rows": 1})
    assert many.n == {"outlier_rows": 2} and many.flags[0].startswith("2 of 100 rows (2.0%) are left out as outliers")


def test_a_text_of_outlier_rows_alone_keeps_them() -> None:
    rows = TextRows(torch.tensor([[1.0], [9.0], [9.0], [2.0]]), torch.tensor([2, 1, 1]))
    kept = rows.without_outliers(5.0)
    assert kept.x_TD.flatten().tolist() == [1, 9, 2] and kept.count_N.tolist() == [1, 1, 1] and kept.outliers == 1
    assert rows.without_outliers(None) is rows


def test_steering_clamps_no_latent_at_an_outlier_row(ctx: EvalContext) -> None:
    sae = make_sae()
    sae.origin = {"layer": 0, "norm_limit": LIMIT}
    ids = torch.tensor([[2, 3000, SINK, 3001]])
    x = ctx.model.capture_hooks(ids, [HOOK])[HOOK]
    with steering(ctx.model.model, sae, 5, clamp=4.0):
        steered = ctx.model.model(ids, output_hidden_states=True).hidden_states[1]
    expected = x + (4.0 - sae.encode(x)[..., 5:6]) * sae.W_dec[5]
    expected[0, 2] = x[0, 2]
    torch.testing.assert_close(steered, expected)
