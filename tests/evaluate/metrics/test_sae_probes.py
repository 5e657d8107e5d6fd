"""sae_probes: its scores, that neither the model nor a probe runs twice, what is left out and what is refused."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae.cache.hooks import Hook
from sae.common.errors import UnavailableError, UsageError
from sae.evaluate.datasets import sae_probes as data
from sae.evaluate.metrics import last_token_rows as rows_module
from sae.evaluate.metrics import logistic_probes
from sae.evaluate.metrics import sae_probes as module
from sae.evaluate.metrics.base import EvalTarget, MetricColumn, MetricResult
from sae.evaluate.metrics.registry import SUITES, metrics_of_suite
from sae.evaluate.metrics.sae_probes import SaeProbes
from sae.evaluate.reference_saes import Identity, Zero
from sae.evaluate.results import read_result, write_result
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE

from ...probe_wheel import TEXTS, write_wheel

NAMES = ["5_pets", "21_more pets"]
METRIC = SaeProbes(ks=(1, 3))
HOOK = Hook(1)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Use the data of the made-up wheel, two values of C instead of ten, and two folds instead of six."""
    data.get_data(write_wheel(tmp_path, monkeypatch))
    folds = logistic_probes.folds_of
    monkeypatch.setattr(logistic_probes, "folds_of", lambda label_M: itertools.islice(folds(label_M), 2))
    monkeypatch.setattr(logistic_probes, "STRENGTHS", np.logspace(3, 0, 2))


def silent(done, total, note=""):
    pass


def make_sae(seed: int = 0, latents: int = 40) -> SAE:
    torch.manual_seed(seed)
    return SAE(32, latents, [ReLU()]).requires_grad_(False)


def measured(ctx, *coders, metric=METRIC, limit=None) -> list:
    return metric.measure(ctx, [EvalTarget(coder, HOOK, norm_limit=limit) for coder in coders], silent)


def count_calls(monkeypatch, where, name) -> list:
    calls, real = [], getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args, **kw: calls.append(args) or real(*args, **kw))
    return calls


def test_the_fields_and_that_means_are_over_data_sets(ctx):
    (found,) = measured(ctx, make_sae())
    fields = [f"sae_top_{k}_{score}" for k in (1, 3) for score in ("test_auc", "test_accuracy")]
    assert {side: [*group] for side, group in found.metrics.items()} == {
        "llm": ["llm_test_auc", "llm_test_accuracy"], "sae": fields,
    }  # fmt: skip
    assert [one["dataset_name"] for one in found.details] == NAMES
    for side, group in found.metrics.items():
        for name, value in group.items():
            each = [one[name] for one in found.details]
            assert value == pytest.approx(sum(each) / 2)
            low, high = found.intervals[side][name]
            assert min(each) <= low <= value <= high <= max(each)
            column = MetricColumn("", side, name)
            assert METRIC.values_by_unit(found, column) == ("data set", dict(zip(NAMES, each, strict=True)))
    assert found.n == {"data_sets": 2, "tested_texts": 2 * (TEXTS - 30 - 1)} and found.flags == []
    (split,) = found.extra["5_pets"]
    assert (split["train"], split["test"], split["share"]) == (30, 99, 0.5) and len(split["latents"]) == 3
    assert split["sae"]["3"]["test_auc"] == found.details[0]["sae_top_3_test_auc"]
    assert found.metrics["llm"]["llm_test_auc"] > 0.95  # the classes have no word in common


def test_the_plan_says_what_is_kept_at_most(ctx):
    """The row of the last token of each text is kept, for each hook, in the model's dtype."""
    identity = ctx.model_identity | {"llm_dtype": "float32"}
    ctx = replace(ctx, model_config=ctx.model.config, model_identity=identity)
    targets = [EvalTarget(make_sae(), Hook(layer)) for layer in (1, 0)]
    metric = replace(METRIC, max_texts=TEXTS)
    announced = metric.kept_bytes(ctx, [*targets, targets[0]])
    assert announced == 2 * TEXTS * 2 * 32 * 4
    half = replace(ctx, model_identity=identity | {"llm_dtype": "bfloat16"})
    assert metric.kept_bytes(half, targets) == announced / 2
    metric.measure(ctx, targets, silent)
    files = list(ctx.artifacts.folder.glob("last_rows-*.safetensors"))
    written = sum(file.stat().st_size for file in files)
    assert len(files) == 4 and 0.9 * announced < written < announced + 400 * len(files)


def test_a_result_is_read_as_it_was_written(ctx, home):
    (found,) = measured(ctx, make_sae(latents=2))
    write_result(home / "run", METRIC, METRIC.settings(ctx), found, {})
    assert read_result(home / "run", METRIC, METRIC.settings(ctx)) == found


def test_the_latent_of_a_class_is_found_and_separates_it(ctx):
    class Planted:
        """Latent 17 fires on the texts of one class only."""

        def __init__(self) -> None:
            problem = METRIC.read_problems(ctx, [EvalTarget(self, HOOK).row_set], "5_pets", silent)
            (one,) = problem.values()
            self.x, self.label = one.x_ND, one.label_N

        def encode(self, x):
            f = torch.rand(len(x), 20, generator=torch.Generator().manual_seed(len(x)))
            same = torch.cdist(x, self.x).argmin(1)
            f[:, 17] = torch.from_numpy(self.label)[same].float() * 0.2
            return f

    (found,) = measured(ctx, Planted(), metric=replace(METRIC, datasets=("5",)))
    assert found.extra["5_pets"][0]["latents"][0] == 17
    assert found.metrics["sae"]["sae_top_1_test_auc"] == found.metrics["sae"]["sae_top_1_test_accuracy"] == 1
    assert found.intervals == {"llm": {}, "sae": {}}  # there is no interval over one data set


def test_the_identity_is_the_model_and_zero_is_chance(ctx):
    identity, zero = measured(ctx, Identity(), Zero(), metric=replace(METRIC, ks=(1, 32), penalty="l2"))
    assert identity.metrics["sae"]["sae_top_32_test_auc"] == pytest.approx(identity.metrics["llm"]["llm_test_auc"])
    assert {value for name, value in zero.metrics["sae"].items() if name.endswith("auc")} == {0.5}
    assert zero.flags == [
        f"k={k}: in 2 of 2 data sets, the chosen latents never vary in the training texts, so the AUC is exactly 0.5."
        for k in (1, 32)
    ]


def test_no_sae_changes_another_s_numbers(ctx):
    together = measured(ctx, make_sae(0), make_sae(1))
    assert measured(ctx, make_sae(1), make_sae(0)) == together[::-1] and together[0] != together[1]


def test_saes_share_the_pass_of_the_model_and_probes_on_it(ctx, monkeypatch):
    passes = count_calls(monkeypatch, rows_module, "capture_last_rows")
    fits = count_calls(monkeypatch, module, "fit_probe")
    targets = [EvalTarget(make_sae(), Hook(0)), EvalTarget(make_sae(), HOOK), EvalTarget(make_sae(1), HOOK)]
    below, first, second = METRIC.measure(ctx, targets, silent)
    assert [len(call[1]) for call in passes] == [2, 2]  # one pass per data set captures both hooks
    assert len(fits) == 2 * (2 + 3 * 2)  # per data set: the model at two hooks, three SAEs with two ks
    assert below.metrics["llm"] != first.metrics["llm"]
    assert measured(ctx, make_sae(2))[0].metrics["llm"] == first.metrics["llm"]
    assert len(passes) == 2 and len(fits) == 16 + 2 * 2
    assert measured(ctx, make_sae(1)) == [second] and len(fits) == 20


def test_a_killed_evaluation_loses_one_data_set_at_most(ctx, monkeypatch):
    expected = measured(ctx, make_sae())
    fresh = replace(ctx, artifacts=type(ctx.artifacts)(ctx.artifacts.folder.with_name("fresh")))
    fits = count_calls(monkeypatch, module, "fit_probe")
    real = module.rank_latents

    def killed(f_MF, label_M, count):
        if len(fits) > 3:
            raise KeyboardInterrupt
        return real(f_MF, label_M, count)

    monkeypatch.setattr(module, "rank_latents", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(fresh, make_sae())
    assert len(fits) == 1 + 2 + 1  # first data set: one probe on the model and one for each k; second: the model's
    monkeypatch.setattr(module, "rank_latents", real)
    assert measured(fresh, make_sae()) == expected and len(fits) == 4 + 2


def test_another_setting_or_sae_is_measured_anew(ctx):
    first = measured(ctx, make_sae())[0]
    assert measured(ctx, make_sae(), metric=replace(METRIC, penalty="l2"))[0] != first
    fewer = measured(ctx, make_sae(), metric=replace(METRIC, max_texts=124))[0]
    assert fewer.details[0]["texts"] == 124 and fewer.extra["5_pets"][0]["train"] == 24
    shorter = measured(ctx, make_sae(), metric=replace(METRIC, max_train=20))[0]
    assert shorter.extra["5_pets"][0]["train"] == 20 and shorter.extra["5_pets"][0]["test"] == 109
    assert shorter.extra["5_pets"][0]["sae"] != first.extra["5_pets"][0]["sae"]
    assert shorter.metrics["llm"] != first.metrics["llm"]


def test_scarcity_has_a_split_for_each_size_and_their_mean_counts(ctx):
    metric = replace(METRIC, setting="scarcity", datasets=("5_pets",), ks=(1,), max_train=7)
    (found,) = measured(ctx, make_sae(), metric=metric)
    splits = found.extra["5_pets"]
    assert [one["train"] for one in splits] == [2, 3, 4, 5, 7] and all(
        one["test"] == 129 - one["train"] for one in splits
    )
    for score in ("test_auc", "test_accuracy"):
        mean = sum(one["sae"]["1"][score] for one in splits) / 5
        assert found.metrics["sae"][f"sae_top_1_{score}"] == pytest.approx(mean)
    assert found.details[0]["splits"] == 5
    with pytest.raises(UsageError, match="5_pets: 130 texts are too few for the setting imbalance.*Raise max_texts"):
        measured(ctx, make_sae(), metric=replace(metric, setting="imbalance"))


def test_the_shares_of_the_model_s_probes_are_rounded_as_in_sae_probes():
    """0.55 * 100 is 55.000000000000007 and is rounded up, so 56 texts are positive for the probes on the model.

    The share for the probes on latents is slightly below 0.55, so 55 texts are positive.
    """
    metric, label_N = replace(METRIC, setting="imbalance", max_train=100), np.arange(3000) % 2
    positive = {
        side: [int(label_N[one.train_M].sum()) for one in metric.splits(label_N, side)] for side in ("sae", "llm")
    }
    assert (positive["sae"][10], positive["llm"][10]) == (55, 56)
    assert positive["sae"][:10] == positive["llm"][:10] == [*range(5, 55, 5)]


def test_texts_that_end_in_an_outlier_row_are_left_out_and_named(ctx):
    (target,) = [EvalTarget(make_sae(), HOOK)]
    rows = {
        name: METRIC.read_problems(ctx, [target.row_set], name, silent)[target.row_set].x_ND.norm(dim=1).sort().values
        for name in NAMES
    }
    limit = float((rows["5_pets"][-3] + rows["5_pets"][-4]) / 2)
    over = {name: int((norms > limit).sum()) for name, norms in rows.items()}
    assert over["5_pets"] == 3
    (both,) = METRIC.measure_both(ctx, [EvalTarget(make_sae(), HOOK, norm_limit=limit)], silent)
    masked = both.sound
    assert masked.n["outlier_rows"] == sum(over.values()) and [one["outlier_texts"] for one in masked.details] == [
        *over.values()
    ]
    assert any(
        flag.startswith("Texts that end in an outlier row are left out") and "5_pets 3" in flag for flag in masked.flags
    )
    kept = masked.details[0]["texts"]
    assert kept % 2 == 0 and TEXTS - 6 <= kept <= TEXTS - 3
    (all_rows,) = measured(ctx, make_sae())
    assert both.metrics == all_rows.metrics and both.details == all_rows.details


def test_a_k_over_the_number_of_latents_has_no_number(ctx):
    (found,) = measured(ctx, make_sae(latents=2))
    assert found.metrics["sae"]["sae_top_3_test_auc"] is None and found.metrics["sae"]["sae_top_1_test_auc"] is not None
    assert "k=3: there is no number, because the SAE has fewer latents." in found.flags


def test_latents_that_are_not_finite_are_an_error_of_that_sae_alone(ctx):
    broken = make_sae()
    broken.b_enc[3] = math.nan
    first, second = measured(ctx, broken, make_sae())
    assert "latents are NaN or infinite" in str(first) and isinstance(second, MetricResult)


def test_the_row_is_that_of_the_last_token_and_long_texts_lose_their_beginning(ctx, monkeypatch):
    texts = ["fox", "the quick brown fox jumps over a lazy dog", "seven zebras"]
    monkeypatch.setattr(rows_module, "TOKENS_PER_FORWARD", 16)
    rows = rows_module.last_token_rows(ctx, [HOOK], texts, {"texts": "three"}, silent)[HOOK]
    for text, row in zip(texts, rows, strict=True):
        ids = torch.tensor(ctx.encode_texts([text]))
        torch.testing.assert_close(row, ctx.model.capture_hooks(ids, [HOOK])[HOOK][0, -1], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(rows_module, "MAX_TOKENS", 4)
    (ids,) = ctx.encode_texts(texts[1:2])
    cut = rows_module.last_token_rows(ctx, [HOOK], texts[1:2], {"texts": "one"}, silent)[HOOK][0]
    expected = ctx.model.capture_hooks(torch.tensor([[ids[0], *ids[-3:]]]), [HOOK])[HOOK][0, -1]
    torch.testing.assert_close(cut, expected, rtol=1e-4, atol=1e-4)
    without = replace(ctx, context_format=replace(ctx.context_format, bos_id=None))
    assert rows_module.keep_last_tokens(without, [5, 6, 7, 8, 9]) == [6, 7, 8, 9]


def test_what_is_asked_for_is_checked_before_the_work(ctx, tmp_path, monkeypatch):
    def settings(*options):
        (metric,) = metrics_of_suite("sae_probes", [f"sae_probes.{option}" for option in options])
        return metric.settings(ctx)

    assert settings("datasets=21,5_pets", "ks=1,2")["datasets"] == NAMES == settings()["datasets"]
    for option, problem in (
        ("setting=scarce", "setting=scarce is unknown. Expected one of normal, scarcity, imbalance"),
        ("penalty=l3", "penalty=l3 is unknown"), ("ks=0", "a probe needs at least one latent"),
        ("datasets=5_pet", "no data set 5_pet; did you mean 5_pets"), ("datasets=", "datasets= names no data set"),
        ("max_texts=-5", "max_texts=-5: give 2 or more"), ("max_train=1", "max_train=1: give 2 or more"),
        ("max_texts=101", "max_texts=101: 100 texts are too few for the setting normal.*Raise max_texts"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=problem):
            settings(option)
    assert settings("max_texts=102")["max_texts"] == 102
    monkeypatch.setenv("SAE_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(UnavailableError, match="Get them with `sae data get sae-probes`"):
        settings()


def test_it_is_in_the_full_suite_and_not_in_the_quick_one():
    assert "sae_probes" in SUITES["full"] and "sae_probes" not in SUITES["quick"]
