"""Paper 004: what each recipe builds."""

from typing import Any, get_args

import pytest
import torch

from sae.common.errors import UsageError
from sae.train.activation_functions import BatchTopK, TopK
from sae.train.loop import Trainer
from sae.train.mechanisms import ResampleDead
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig, Variant
from sae.train.variants.hierarchical.merging import MergeSimilar
from sae.train.variants.hierarchical.penalty import AdaptivePenalty
from sae.train.variants.hierarchical.recipes import HierarchicalOptions
from sae.train.variants.hierarchical.window import ResampleByWindow

from .steps import build, firing, rows

LADDER = [
    "hierarchical-linear",
    "hierarchical-resample",
    "hierarchical-window",
    "hierarchical-adaptive",
    "hierarchical",
]


def test_each_ablation_adds_one_part() -> None:
    def parts(name: str) -> set[str]:
        return {type(mechanism).__name__ for mechanism in build(name).mechanisms} - {"DeadLatents", "UnitNormDecoder"}

    linear, resample, window, adaptive, full = (parts(name) for name in LADDER)
    assert linear == set() and resample == {"ResampleDead"} and window == {"ResampleByWindow"}
    assert adaptive == window | {"AdaptivePenalty"} and full == adaptive | {"MergeSimilar"}
    assert [type(mechanism).__name__ for mechanism in build("hierarchical").mechanisms] == [
        "DeadLatents", "AdaptivePenalty", "MergeSimilar", "ResampleByWindow", "UnitNormDecoder",
    ]  # fmt: skip


def test_baselines_keep_the_same_share_of_the_width() -> None:
    """k = 320 of 2304 is 32 of 230. All recipes have the same optimizer settings."""
    topk, batchtopk = build("hierarchical-topk320", d_in=230), build("hierarchical-batchtopk", d_in=2304, d_sae=2304)
    assert [a.k for a in topk.sae.modules() if isinstance(a, TopK)] == [32]
    assert [a.k for a in batchtopk.sae.modules() if isinstance(a, BatchTopK)] == [320]
    assert [a.k for a in build("hierarchical-topk320", k=7).sae.modules() if isinstance(a, TopK)] == [7]
    for name in ("hierarchical-topk320", "hierarchical-batchtopk", "hierarchical-l1", *LADDER):
        how = build(name).optimization
        assert (how.lr, how.weight_decay, how.clip) == (3e-4, 0.01, 1.0), name


def test_a_collapsed_dictionary_is_merged_and_comes_back() -> None:
    """Latents 16 to 31 start as copies of the others. Merging and restarting separate them, and rows keep norm 1."""
    variant = build("hierarchical", d_sae=32, steps=40, window=4, merge_every=4, lr=1e-2, warmup=0)
    variant.sae.W_dec.data[16:] = variant.sae.W_dec.data[:16]
    trainer = Trainer(variant, 40, "cpu")
    for i in range(20):
        trainer.run_periodic(i, trainer.step(rows(i)))
    cosine_FF = variant.sae.W_dec @ variant.sae.W_dec.T
    assert trainer.pop_metrics()["merged"] >= 16
    assert (cosine_FF.triu(1) <= 0.9).all()
    assert (cosine_FF.diagonal() - 1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("hierarchical", {"merge_partner": "drop"}, "merge_partner=drop is unknown: expected one of recycle, disable"),
        ("hierarchical", {"recon_in_alpha": "max"}, "recon_in_alpha=max is unknown: expected one of mean, sum"),
        ("hierarchical-adaptive", {"merge_above": 0.8}, "hierarchical-adaptive has no option merge_above"),
        ("hierarchical", {"window": 0}, "invalid window=0: expected 1 step or more"),
        ("hierarchical", {"merge_every": 0}, "invalid merge_every=0: expected 1 step or more"),
        ("hierarchical-resample", {"resample_every": 0}, "invalid resample_every=0: expected 1 step or more"),
        ("hierarchical", {"restart_share": 1.5}, "invalid restart_share=1.5: expected a share of the run, 0 to 1"),
        ("hierarchical-linear", {"restart_share": 0.5}, "hierarchical-linear has no option restart_share"),
        ("hierarchical-window", {"dead_by": "batch"}, "hierarchical-window has no option dead_by"),
        ("hierarchical-linear", {"window": 50}, "hierarchical-linear has no option window"),
    ],
)
def test_invalid_options_raise_a_usage_error(name: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_recipe(name).make(RunConfig(32, 64, 100, 64), given)


def part_of(variant: Variant, kind: type) -> Any:
    (part,) = (mechanism for mechanism in variant.mechanisms if isinstance(mechanism, kind))
    return part


def test_options_reach_their_parts() -> None:
    given = {"window": 3, "below": 0.2, "merge_every": 1, "merge_on": "encoder", "merge_weights": "activity",
             "merge_above": 0.5, "alpha_ema": 0.7}  # fmt: skip
    variant = build("hierarchical", **given)
    merge, resample = part_of(variant, MergeSimilar), part_of(variant, ResampleByWindow)
    assert (merge.every, merge.on, merge.weights, merge.above) == (1, "encoder", "activity", 0.5)
    assert (resample.every, resample.below, part_of(variant, AdaptivePenalty).ema) == (3, 0.2, 0.7)
    early = part_of(build("hierarchical-resample", dead_by="batch", below=0.3, resample_every=1), ResampleByWindow)
    assert (early.every, early.below) == (1, 0.3)
    silent = build("hierarchical-linear", l1=0.0)  # l1 = 0 means no penalty, not the default
    assert float(silent.coefficients["l1"](firing(torch.zeros(1, 64), 0))) == 0


def test_the_defaults_are_those_of_the_runs_that_exist() -> None:
    """A run that is older than an option is resumed with the option's default, so no default may change."""
    assert vars(HierarchicalOptions()) == {
        "restarts": "window", "adaptive": True, "merging": True, "l1": None, "lambda_by": "d_in", "l1_end": 0.0,
        "resample_every": 100, "dead_by": "tokens", "restart_share": 0.9, "window": 100, "terms": "w", "below": 0.01,
        "stability": "any", "recon_in_alpha": "mean", "alpha_units": "raw", "target": 2.5, "alpha_low": 0.1,
        "alpha_high": 2.0, "alpha_ema": 0.0, "merge_above": 0.9, "merge_every": 100, "merge_on": "decoder",
        "merge_average": "all", "merge_weights": "equal", "merge_partner": "recycle", "pre_bias": False,
    }  # fmt: skip
    assert find_recipe("hierarchical-l1").options == {"l1": 0.04, "l1_warmup": 0, "pre_bias": False}
    for name in ("hierarchical-topk320", "hierarchical-batchtopk"):
        assert find_recipe(name).options == {"k": 320, "aux": 1 / 32}


def fingerprint(variant: Variant) -> list[object]:
    """The attributes and tensor shapes of every part, and the penalty's strength in the middle of the run."""
    found: list[object] = [variant.sae.pre_bias]
    variant.scale.fill_(7.0)
    for part in variant.mechanisms:
        plain = {name: value for name, value in vars(part).items() if isinstance(value, str | int | float)}
        found += [type(part).__name__, plain]
        found += [(name, tensor.shape) for name, tensor in part.named_buffers()]
        found.append(part.scale() if isinstance(part, AdaptivePenalty) else None)
    step = firing(torch.zeros(1, 64), 500)
    variant.coefficients["l1"](step)
    return [*found, float(step.metrics["lambda"])]


@pytest.mark.parametrize("name", LADDER)
def test_an_ablation_takes_the_options_of_its_parts_and_no_other(name: str) -> None:
    recipe = find_recipe(name)
    plain: dict[str, Any] = {"dead_by": "batch"} if name == "hierarchical-resample" else {}  # else nothing is `below`
    default = fingerprint(build(name, **plain))
    assert default == fingerprint(build(name, **plain))
    for option, value in recipe.options.items():
        others = [one for one in get_args(recipe.types[option]) if one != value and isinstance(one, str)]
        other = others[0] if others else not value if isinstance(value, bool) else (value or 0) / 2 + 0.3
        other = int(other) if recipe.types[option] is int else other
        assert fingerprint(build(name, **{**plain, option: "tokens" if option == "dead_by" else other})) != default
    if name != LADDER[-1]:
        one_more = find_recipe(LADDER[LADDER.index(name) + 1])
        assert set(recipe.options) - {"resample_every", "dead_by"} <= set(one_more.options)


@pytest.mark.parametrize("name", LADDER[1:])
def test_restarts_end_with_nine_tenths_of_the_run_and_in_the_papers_reading_with_it(name: str) -> None:
    """The trainer runs a built variant in which all latents are always dead and a restart is due every two steps."""

    def last_restart(steps: int, **options: object) -> int:
        every = {option: 2 for option in ("resample_every", "window") if option in find_recipe(name).options}
        variant = build(name, steps=steps, warmup=0, **every, **options)
        part, last = part_of(variant, ResampleDead), -1
        trainer = Trainer(variant, steps, "cpu")
        for i in range(steps):
            variant.sae.b_enc.data.fill_(-9.0)
            variant.dead.since_F.fill_(10**9)
            before = int(part.restarts)
            trainer.run_periodic(i, trainer.step(rows(i)))
            last = i if int(part.restarts) > before else last
        return last

    assert last_restart(12) == 9 and last_restart(12, restart_share=1.0) == 11
    assert part_of(build(name, steps=20, restart_share=0.5), ResampleDead).until == 10
    assert [part_of(build(name, steps=n), ResampleDead).until for n in (7, 70, 4882)] == [6, 63, 4393]


def test_the_paper_exact_model_is_built_as_it_is_printed() -> None:
    torch.manual_seed(0)
    variant = find_recipe("hierarchical").make(RunConfig(32, 64, 1000, 64, paper_exact=True, variance=6.0), {})
    merge, resample, modulate = (part_of(variant, kind) for kind in (MergeSimilar, ResampleByWindow, AdaptivePenalty))
    assert (len(resample.fired_WF), resample.window, resample.every, resample.until) == (101, 100, 100, 1000)
    assert (resample.below, resample.stability) == (0.01, "mean")
    assert (merge.above, merge.every, merge.on, merge.average, merge.partner) == (
        0.9, 100, "decoder", "encoder", "disable",
    )  # fmt: skip
    variant.scale.fill_(7.0)
    assert (modulate.reading, modulate.target, modulate.scale()) == ("sum", 2.5, 1.0)
    assert (modulate.low, modulate.high, modulate.ema) == (0.1, 2.0, 0.0)


def test_before_there_is_a_window_the_last_batch_can_say_who_is_dead() -> None:
    """Of four tokens, latent 0 fires on all and one other latent on one. Here `any` gives the same as `mean`."""
    variant = build("hierarchical-resample", d_sae=4, dead_by="batch", stability="mean", resample_every=7)
    resample = part_of(variant, ResampleByWindow)
    assert (len(resample.fired_WF), resample.window, resample.every) == (1, 1, 7)
    resample.after_step(firing(torch.tensor([[1.0, 0, 0, 0]] * 3 + [[1.0, 1, 0, 0]]), 3))
    assert resample.silent().tolist() == [False, False, True, True]
    resample.after_step(firing(torch.tensor([[1.0, 0, 0, 0]] * 3 + [[1.0, 0, 1, 0]]), 4))
    assert resample.silent().tolist() == [False, True, False, True]  # only the last batch counts
    default = build("hierarchical-resample", resample_every=7)
    assert type(part_of(default, ResampleDead)) is ResampleDead


def test_in_the_papers_readings_every_mechanism_acts_and_says_so() -> None:
    """In thirty steps with two equal latents, `silent`, `resampled`, `merged` and `alpha_moves` all count something."""
    options = {"window": 5, "merge_every": 5, "warmup": 0, "normalize": "standardize", "lr": 0.02}
    torch.manual_seed(0)
    variant = find_recipe("hierarchical").make(RunConfig(32, 64, 30, 64, paper_exact=True), options)
    variant.set_normalization(torch.zeros(32), 1.0, torch.cat([rows(i) for i in range(4)]))
    variant.sae.W_dec.data[1] = variant.sae.W_dec.data[0]
    variant.sae.b_enc.data[40:] = -9.0  # never fire
    trainer = Trainer(variant, 30, "cpu")
    for i in range(30):
        trainer.run_periodic(i, trainer.step(rows(i)))
    metrics = trainer.pop_metrics()
    assert metrics["silent"] >= 24 and metrics["resampled"] >= 24
    assert metrics["merged"] >= 1 and metrics["alpha_moves"] >= 5  # alpha is 2.5 / (32 (1 - EV)), at first 0.1


def test_where_nothing_is_dead_the_counters_stay_at_zero_and_the_ablation_is_the_run_before() -> None:
    """hierarchical-resample and hierarchical-window equal hierarchical-linear bit for bit."""
    trained = {}
    for name in LADDER[:3]:
        variant = build(name, steps=20, **({} if name.endswith("linear") else {"below": 0.0}))
        trainer = Trainer(variant, 20, "cpu")
        for i in range(20):
            trainer.run_periodic(i, trainer.step(rows(i)))
        metrics = trainer.pop_metrics()
        assert metrics.get("resampled", 0) == metrics.get("silent", 0) == 0
        trained[name] = variant.sae.state_dict()
    for name in LADDER[1:3]:
        assert all(torch.equal(tensor, trained[LADDER[0]][key]) for key, tensor in trained[name].items())


def test_the_baselines_have_no_auxk_in_the_papers_readings() -> None:
    for name in ("hierarchical-topk320", "hierarchical-batchtopk"):
        step = firing(torch.zeros(1, 64), 0)
        assert [build(name, **given).coefficients["aux"](step) for given in ({}, {"aux": 0.0})] == [1 / 32, 0]


def test_options_of_the_l1_baseline_and_the_ends_of_restart_share_reach_their_parts() -> None:
    step, settings = firing(torch.zeros(1, 64), 4), {"l1": 0.5, "pre_bias": True}
    constant, rising = (build("hierarchical-l1", l1_warmup=steps, **settings) for steps in (0, 10))
    assert float(constant.coefficients["l1"](step)) == 0.5 and 0 < float(rising.coefficients["l1"](step)) < 0.5
    assert constant.sae.pre_bias and not build("hierarchical-l1").sae.pre_bias
    assert [part_of(build("hierarchical", steps=50, restart_share=n), ResampleDead).until for n in (0, 1)] == [0, 50]
    assert [build("hierarchical", pre_bias=one).sae.pre_bias for one in (True, False)] == [True, False]


def test_a_printed_k_that_is_no_choice_of_latents_keeps_its_share() -> None:
    """With 128 latents, k = 320 is impossible, so k is 18 as in the other readings. With 512 latents k is 320."""

    def k(d_sae: int) -> object:
        return find_recipe("hierarchical-topk320").make(RunConfig(128, d_sae, 9, 64, paper_exact=True), {}).options["k"]

    assert (k(128), k(319), k(320), k(512)) == (18, 18, 320, 320)
